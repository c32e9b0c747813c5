"""Batches as loaders give them, and the one rule by which a model is called on them.

A tensor is given as ``model(x)``, a tuple as ``model(*xs)``, a mapping as ``model(**xs)``. A batch is a pair
``(inputs, target)`` whose inputs follow the same rule, or a mapping whose ``labels`` entry is the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
OutputFunction: TypeAlias = Callable[[Any], Tensor]


def as_inputs(value: Any) -> Inputs:
    """Check that ``value`` can be given to a model, turning a list into a tuple.

    Raises:
        InputError: It is not a tensor, a tuple or list, or a mapping, or holds no tensor at all.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        inputs: Inputs = dict(value)
    elif isinstance(value, tuple | list):
        inputs = tuple(value)
    else:
        raise InputError(
            f"inputs must be a tensor, a tuple of tensors or a mapping of tensors, but they are a "
            f"{type(value).__name__}; convert them with torch.as_tensor first"
        )
    if not tensors_of(inputs):
        raise InputError("inputs hold no tensor; give at least one tensor whose first dimension is the batch")
    return inputs


def split_batch(batch: Any, target_key: str = "labels", has_targets: bool = True) -> tuple[Inputs, Tensor | None]:
    """Split what a loader yields into inputs and target.

    Args:
        batch: A pair (inputs, target), or a mapping with ``target_key``, or, without targets, the inputs.
        target_key: The entry of a mapping that is the target; it is removed before the model is called.
        has_targets: False for a loader that yields inputs alone; a mapping's target is removed all the same.

    Returns:
        The inputs, and the target or None.

    Raises:
        InputError: The batch has none of these forms.
    """
    if isinstance(batch, Mapping):
        entries = dict(batch)
        target = entries.pop(target_key, None)
        if has_targets and target is None:
            raise InputError(
                f"a batch is a mapping without the entry {target_key!r} (it has {sorted(map(str, batch))}); "
                f"name the target's entry with target_key=, or pass has_targets=False"
            )
        return as_inputs(entries), _as_target(target) if has_targets else None
    if not has_targets:
        return as_inputs(batch), None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return as_inputs(batch[0]), _as_target(batch[1])
    found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise InputError(
        f"a batch must be a pair (inputs, target), where inputs may be a tuple of tensors, or a mapping with "
        f"{target_key!r}; the loader gave a {found}. Without targets pass has_targets=False"
    )


def call_model(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Call ``model`` on ``inputs`` by the rule of this module."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def output_tensor(raw: Any, output: OutputFunction | None = None) -> Tensor:
    """Take the tensor of predictions out of what a model returned.

    Args:
        raw: A tensor, an object or a mapping with ``logits``, or anything that ``output`` can read.
        output: The user's own way to read it; it wins over the others.

    Raises:
        InputError: No tensor can be found.
    """
    value: Any
    if output is not None:
        value = output(raw)
    elif isinstance(raw, Tensor):
        value = raw
    elif isinstance(raw, Mapping):
        value = raw.get("logits")
    else:
        value = getattr(raw, "logits", None)
    if not isinstance(value, Tensor):
        raise InputError(
            f"the model returned a {type(raw).__name__}, in which no tensor of predictions was found; "
            f"pass output=, a function that takes what the model returns and gives the tensor"
        )
    return value


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors of ``inputs``, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    values: Iterable[Any] = inputs.values() if isinstance(inputs, Mapping) else inputs
    return [value for value in values if isinstance(value, Tensor)]


def map_tensors(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply ``function`` to every tensor of ``inputs`` and leave what is not a tensor."""

    def apply(value: Any) -> Any:
        return function(value) if isinstance(value, Tensor) else value

    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: apply(value) for key, value in inputs.items()}
    return tuple(apply(value) for value in inputs)


def batch_size(inputs: Inputs) -> int:
    """Rows of a batch: the first dimension that all its tensors share.

    Raises:
        InputError: A tensor has no dimension, the tensors disagree, or there are no rows.
    """
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in tensors_of(inputs)}
    if len(sizes) != 1 or None in sizes or sizes == {0}:
        shapes = [tuple(tensor.shape) for tensor in tensors_of(inputs)]
        raise InputError(
            f"the tensors of a batch must share their first dimension, the number of examples, and it must "
            f"be positive; their shapes are {shapes}"
        )
    size = sizes.pop()
    assert size is not None  # noqa: S101 - excluded above, said for the type checker
    return size


def rows(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The examples ``start`` to ``stop`` (exclusive) of a batch."""
    return map_tensors(inputs, lambda tensor: tensor[start:stop])


def concatenate(parts: Sequence[Inputs]) -> Inputs:
    """Join batches of one structure along their first dimension."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    keys: Iterable[Any] = first.keys() if isinstance(first, Mapping) else range(len(first))
    joined = {
        key: torch.cat([part[key] for part in parts]) if isinstance(first[key], Tensor) else first[key] for key in keys
    }
    return joined if isinstance(first, Mapping) else tuple(joined.values())


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Copy a batch to ``device`` where it is not there yet."""
    return map_tensors(inputs, lambda tensor: tensor.to(device, non_blocking=True))


def rechunk(batches: Iterable[Inputs], size: int) -> Iterator[Inputs]:
    """Cut a stream of batches anew into batches of ``size`` rows; the last may be smaller, or larger by one row.

    A single row is not left over, for many models squeeze their outputs and would take it for no batch at all.

    What comes out depends on the rows and on ``size`` alone, not on how the rows came in; except that batches whose
    rows differ in shape (sequences padded batch by batch) are not joined.
    """
    waiting: list[Inputs] = []
    count = 0
    for batch in batches:
        if waiting and _row_shapes(waiting[0]) != _row_shapes(batch):
            yield concatenate(waiting)
            waiting, count = [], 0
        waiting.append(batch)
        count += batch_size(batch)
        if count <= size + 1:
            continue
        joined, start = concatenate(waiting), 0
        while count - start > size + 1:
            yield rows(joined, start, start + size)
            start += size
        waiting = [rows(joined, start, count)]
        count -= start
    if waiting:
        yield concatenate(waiting)


def require_finite(inputs: Inputs, what: str) -> None:
    """Refuse NaN and infinite values, naming ``what`` holds them.

    Raises:
        InputError: A floating-point tensor of ``inputs`` is not finite everywhere.
    """
    for tensor in tensors_of(inputs):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"{what} hold {bad} NaN or infinite values; clean them or drop the examples")


def module_device(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer, else the CPU."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _row_shapes(inputs: Inputs) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in tensors_of(inputs)]


def _as_target(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"targets must be a tensor, but they are a {type(value).__name__}; use torch.as_tensor")
    return value
