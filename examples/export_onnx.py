"""From a fitted network to one ONNX file, and predictions from it without PyTorch."""

from pathlib import Path
from tempfile import mkdtemp

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import stfbnn

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1200], y[:1200]), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
stfbnn.train(model, loader, epochs=10, progress=False)
bnn = stfbnn.bayesianize(model, x[:2])
stfbnn.fit(bnn, loader, epochs=3, temperature=0.1, progress=False)

path = Path(mkdtemp()) / "digits.onnx"
done = stfbnn.export(bnn, path, x[:4], samples=16)
print(f"{done.size:,} bytes, {done.samples} draws, differs from PyTorch by {done.difference:.1e}")

# From here on there is neither PyTorch nor this library, but for the comparison.
session = onnxruntime.InferenceSession(path)
test, noise = x[1200:1205].numpy(), torch.rand(5, 64).numpy()
probs, entropy, aleatoric, epistemic = session.run(None, {"input": test})
print("classes          ", probs.argmax(1).tolist(), "of", y[1200:1205].tolist())
print("epistemic, digits", epistemic.round(3))
print("epistemic, noise ", session.run(["epistemic"], {"input": noise})[0].round(3))
assert abs(probs - stfbnn.predict(bnn, x[1200:1205], samples=16).probs.numpy()).max() < 1e-4
