"""Two posteriors for one network, each for another camera: switched at run time, and one merged to its mean."""

from pathlib import Path
from tempfile import mkdtemp

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train, test = torch.randperm(len(x)).split([1200, len(x) - 1200])

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
first_loader = DataLoader(TensorDataset(x[train], y[train]), 32, shuffle=True)
stfbnn.train(model, first_loader, epochs=15, optimizer="adam", lr=3e-3, progress=False)

# Stage two for each camera on the same trained network; what is saved is the first layer's posterior alone.
cameras = {"good": x, "dim": 0.3 * x + 0.1 * torch.randn(x.shape)}
adapters = stfbnn.Adapters(model)
for name, pictures in cameras.items():
    bnn = stfbnn.bayesianize(model, pictures[:2])
    loader = DataLoader(TensorDataset(pictures[train], y[train]), 32, shuffle=True)
    stfbnn.fit(bnn, loader, epochs=10, temperature=0.03, progress=False)
    adapters.add(name, stfbnn.save(bnn, Path(mkdtemp()) / "posterior"))

for camera, pictures in cameras.items():
    scores = {name: -stfbnn.predict(adapters[name], pictures[test]).log_density(y[test]).mean() for name in adapters}
    print(f"NLL of the {camera} camera:", ", ".join(f"{score:.3f} by {name!r}" for name, score in scores.items()))

adapters.activate("dim")
merged = stfbnn.merge(adapters.current)
assert torch.equal(merged(x[test]), adapters(x[test], weights="mean"))
