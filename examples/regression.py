"""A regression: means and standard deviations, split into noise and what the network does not know."""

import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn

features, progression = load_diabetes(return_X_y=True)
x = torch.tensor(features / features.std(0), dtype=torch.float32)
y = torch.tensor((progression - progression.mean()) / progression.std(), dtype=torch.float32)
rest, test = train_test_split(torch.arange(len(x)), test_size=0.2, random_state=0)
train, held_out = train_test_split(rest, test_size=0.25, random_state=0)


def batches(rows: torch.Tensor, shuffle: bool = False) -> DataLoader:
    """Batches of some of the rows."""
    return DataLoader(TensorDataset(x[rows], y[rows]), batch_size=32, shuffle=shuffle)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1), nn.Flatten(0))
stfbnn.train(model, batches(train, shuffle=True), epochs=60, optimizer="adam", lr=1e-2)

bnn = stfbnn.bayesianize(model, x[:2])
stfbnn.fit(bnn, batches(train, shuffle=True), epochs=20, val_loader=batches(held_out))
pred = stfbnn.predict(bnn, batches(test))

inside = ((y[test] - pred.mean).abs() < 1.645 * pred.std).float().mean()
print(f"90 % intervals cover {inside:.0%} of the test targets")
print(f"variance from noise {pred.aleatoric.mean():.3f}, from not knowing the weights {pred.epistemic.mean():.3f}")
print(f"log density of the test targets {pred.log_density(y[test]).mean():.3f} nats")
