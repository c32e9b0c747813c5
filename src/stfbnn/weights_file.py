"""A network's weights as a file that holds nothing else."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import nn

from stfbnn.files import atomic_path


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a network's state dict as safetensors, atomically."""
    # Cloned, for safetensors refuses tensors that share memory, as tied weights do.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        # Not by safetensors' own writing, whose errors do not tell a full disk from others.
        temporary.write_bytes(safetensors.torch.save(tensors))
