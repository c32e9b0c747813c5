"""When not to trust a prediction: abstain where the risk of being wrong would be too high, with a guarantee."""

import json
from pathlib import Path
from tempfile import mkdtemp

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn
from stfbnn.decision import AbstentionRule, abstention_rule, evaluate_abstention

# Digits through a noisy sensor, in four parts: for training, for T and τ, for the rule, and for new examples.
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
x += 0.3 * torch.randn(x.shape)
rows, new = train_test_split(torch.arange(len(x)), test_size=500, random_state=0)
rows, held_out = train_test_split(rows, test_size=500, random_state=0)
train, val = train_test_split(rows, test_size=150, random_state=0)
train_loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=32, shuffle=True)
val_loader = DataLoader(TensorDataset(x[val], y[val]), batch_size=256)

model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
stfbnn.train(model, train_loader, epochs=40, optimizer="adam", lr=1e-2)
bnn = stfbnn.bayesianize(model, x[:2])
stfbnn.fit(bnn, train_loader, epochs=10, val_loader=val_loader)

# The rule: at most 5 % of the answers wrong, whatever the network's quality, with confidence 95 %.
rule = abstention_rule(stfbnn.predict(bnn, x[held_out]), y[held_out], max_risk=0.05, confidence=0.95)
print(rule)

pred = stfbnn.predict(bnn, x[new])
abstains = pred.abstain(rule)
answers = [
    ("?" if silent else str(label)) for silent, label in zip(abstains.tolist(), pred.labels.tolist(), strict=True)
]
print("answers ", " ".join(answers[:25]))
print("truth   ", " ".join(str(label) for label in y[new][:25].tolist()))
figures = evaluate_abstention(pred, y[new], rule)
low, high = figures.risk_interval
print(
    f"new examples: {figures.coverage:.0%} answered, of which {figures.risk:.1%} wrong (95 % interval {low:.1%}–{high:.1%})"
)
print(f"without the rule {figures.risk_of_all:.1%} would be wrong")

# It is kept as JSON beside the posterior.
path = Path(mkdtemp()) / "rule.json"
path.write_text(json.dumps(rule.as_dict(), indent=2), encoding="utf-8")
again = AbstentionRule.from_dict(json.loads(path.read_text(encoding="utf-8")))
assert torch.equal(pred.abstain(again), abstains)
