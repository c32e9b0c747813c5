"""A model whose weights stay in their file: for one that does not fit in memory even once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from stfbnn.errors import ArtifactError, InputError
from stfbnn.trunk.tensor_file import TensorFile

_Module = TypeVar("_Module", bound=nn.Module)


def map_weights(model: _Module, path: str | os.PathLike[str]) -> _Module:
    """Give a model the weights of a safetensors file, where they lie: they take no memory, and no time to load.

    The model may have been built without any memory, under ``with torch.device("meta"):``. It is then ready for `bayesianize`,
    and a trunk that is larger than the memory can be fitted and predict. The parameters are READ-ONLY and need no gradient:
    the model cannot be trained, and writing to one of them in place ends the process. Buffers are copied into memory.

    Args:
        model: The network; its parameters and buffers are replaced. Those that are tied stay tied.
        path: A state dict as safetensors.

    Returns:
        The model itself, in eval mode.

    Raises:
        ArtifactError: The file is missing or damaged, or its tensors are not those of the model; says which.
        InputError: A buffer that a state dict does not hold has no values, for the model was built on the meta device.
    """
    file = TensorFile(Path(path).absolute())
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - file.tensors.keys()), sorted(file.tensors.keys() - wanted.keys())
    if missing or unknown:
        raise ArtifactError(
            f"{file.path} is not a state dict of this {type(model).__name__}: it lacks {missing[:5]} ({len(missing)} in all) "
            f"and has {unknown[:5]} ({len(unknown)}) too many"
        )
    for name, tensor in wanted.items():
        found = file.tensors[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ArtifactError(
                f"{file.path}: {name!r} is {found.dtype} of shape {tuple(found.shape)}, but the model's is {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}; build the model alike, and convert it before its weights are mapped"
            )
    new: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for key, own in (*module._parameters.items(), *module._buffers.items()):
            name = f"{prefix}.{key}" if prefix else key
            if own is None:
                continue
            if name not in wanted:
                if own.is_meta:
                    raise InputError(
                        f"the buffer {name!r} is not in state dicts and has no values on the meta device; build the model on "
                        f"the CPU"
                    )
            elif key in module._parameters:
                setattr(module, key, new.setdefault(id(own), nn.Parameter(file.tensors[name], requires_grad=False)))
            else:
                setattr(module, key, new.setdefault(id(own), file.tensors[name].clone()))
    return model.eval()
