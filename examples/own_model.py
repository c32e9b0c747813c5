"""Your own trained network, from its weights to predictions with uncertainty: the five calls."""

from pathlib import Path
from tempfile import mkdtemp

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn

# Data, through a noisy sensor: training, held out (no stage may see them), and test.
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
x += 0.3 * torch.randn(x.shape)
rest, test = train_test_split(torch.arange(len(x)), test_size=0.3, random_state=0, stratify=y)
train, held_out = train_test_split(rest, test_size=0.25, random_state=0, stratify=y[rest])
train_loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=32, shuffle=True)
val_loader = DataLoader(TensorDataset(x[held_out], y[held_out]), batch_size=256)

# A network that is already trained: here in a few lines, in your case torch.load or a model hub.
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(40):
    for inputs, target in train_loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()

# The five calls.
bnn = stfbnn.bayesianize(model, example_inputs=x[:2])
run = stfbnn.fit(bnn, train_loader, epochs=10, val_loader=val_loader)
pred = stfbnn.predict(bnn, x[test], samples=32)
folder = stfbnn.save(bnn, Path(mkdtemp()) / "posterior")
again = stfbnn.load(folder, model)

with torch.no_grad():
    before = nn.functional.cross_entropy(model(x[test]), y[test])
print(f"NLL of the test digits: {before:.3f} before, {-pred.log_density(y[test]).mean():.3f} after")
print(f"first layer {bnn.layer_name!r}, {bnn.layout.size} random weights, T = {run.temperature:g}")
print("classes     ", pred.labels[:5].tolist())
print("confidence  ", [round(value, 2) for value in pred.confidence[:5].tolist()])
print("epistemic   ", [round(value, 3) for value in pred.epistemic[:5].tolist()])
assert torch.equal(stfbnn.predict(again, x[test]).probs, pred.probs)
