"""Batches as loaders give them, and the one rule by which a model is called on them.

A tensor is given as ``model(x)``, a tuple as ``model(*xs)``, a mapping as ``model(**xs)``. A batch is a pair
``(inputs, target)`` whose inputs follow the same rule, or a mapping whose ``labels`` entry is the target. What each example
counts in training may stand beside them: ``(inputs, target, weight)``, or the mapping's entry ``sample_weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from stfbnn.errors import InputError

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
OutputFunction: TypeAlias = Callable[[Any], Tensor]

TARGET_KEY, WEIGHT_KEY = "labels", "sample_weight"


@dataclass(frozen=True)
class Batch:
    """A batch to learn from.

    Attributes:
        inputs: B examples.
        target: Their targets, (B, …).
        weight: What each example counts, (B,), finite and not negative; None where all count 1.
    """

    inputs: Inputs
    target: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def total_weight(self) -> float:
        """The sum of the weights: B where none are given."""
        return float(len(self)) if self.weight is None else float(self.weight.sum(dtype=torch.float64))

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``."""
        weight = None if self.weight is None else self.weight.to(device)
        return Batch(to_device(self.inputs, device), self.target.to(device), weight)

    def rows(self, start: int, stop: int) -> Batch:
        """The examples ``start`` to ``stop`` (exclusive)."""
        weight = None if self.weight is None else self.weight[start:stop]
        return Batch(rows(self.inputs, start, stop), self.target[start:stop], weight)

    def weighted(self, values: Tensor) -> Tensor:
        """One number an example, (B,), times what the example counts."""
        return values if self.weight is None else values * self.weight.to(values)


def as_inputs(value: Any) -> Inputs:
    """Check that ``value`` can be given to a model, turning a list into a tuple.

    Raises:
        InputError: It is not a tensor, a tuple or list, or a mapping, or it holds no tensor at all, or tensors within further
            containers.
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
    for name, part in _parts(inputs).items():
        if _holds_tensors(part):
            # Its tensors would be neither cut into chunks nor moved, and those of the first batch would stand for all.
            raise InputError(
                f"the input {name!r} is a {type(part).__name__} that holds tensors: the tensors of a batch must stand in one "
                f"tuple or mapping; wrap the model in a module that takes them one by one and puts them together"
            )
    if not tensors_of(inputs):
        raise InputError("inputs hold no tensor; give at least one tensor whose first dimension is the batch")
    return inputs


def split_batch(
    batch: Any, target_key: str = TARGET_KEY, has_targets: bool = True, weight_key: str = WEIGHT_KEY
) -> tuple[Inputs, Tensor | None]:
    """Split what a loader yields into inputs and target, leaving the examples' weights out.

    Args:
        batch: A pair (inputs, target), three with the examples' weights, or a mapping with ``target_key``; or, without
            targets, the inputs.
        target_key: The entry of a mapping that is the target; it is removed before the model is called.
        has_targets: False for a loader that yields inputs alone; a mapping's target and weights are removed all the same.
        weight_key: The entry of a mapping that holds the weights, likewise.

    Returns:
        The inputs, and the target or None.

    Raises:
        InputError: The batch has none of these forms.
    """
    if not has_targets:
        known = (target_key, weight_key)
        plain = (
            {key: value for key, value in batch.items() if key not in known} if isinstance(batch, Mapping) else batch
        )
        return as_inputs(plain), None
    whole = training_batch(batch, target_key, weight_key)
    return whole.inputs, whole.target


def training_batch(batch: Any, target_key: str = TARGET_KEY, weight_key: str = WEIGHT_KEY) -> Batch:
    """Split what a loader yields into inputs, target and the examples' weights.

    Args:
        batch: (inputs, target), (inputs, target, weight), or a mapping with ``target_key`` and perhaps ``weight_key``.
        target_key: The entry of a mapping that is the target; it is removed before the model is called.
        weight_key: The entry of a mapping that holds the weights, likewise.

    Raises:
        InputError: The batch has none of these forms, or the weights are not (B,) finite floats of at least 0.
    """
    if isinstance(batch, Mapping):
        entries = dict(batch)
        target, weight = entries.pop(target_key, None), entries.pop(weight_key, None)
        if target is None:
            raise InputError(
                f"a batch is a mapping without the entry {target_key!r} (it has {sorted(map(str, batch))}); "
                f"name the target's entry with target_key=, or pass has_targets=False"
            )
        return Batch(as_inputs(entries), _as_target(target), _as_weight(weight, target))
    if isinstance(batch, tuple | list) and len(batch) in (2, 3):
        target, weight = batch[1], batch[2] if len(batch) == 3 else None
        return Batch(as_inputs(batch[0]), _as_target(target), _as_weight(weight, target))
    found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
    raise InputError(
        f"a batch must be a pair (inputs, target), where inputs may be a tuple of tensors, or three with the examples' "
        f"weights, or a mapping with {target_key!r}; the loader gave a {found}. Without targets pass has_targets=False"
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
        return join_rows([part for part in parts if isinstance(part, Tensor)], "the batches' inputs")
    keys: Iterable[Any] = first.keys() if isinstance(first, Mapping) else range(len(first))
    joined = {
        key: join_rows([part[key] for part in parts], f"the batches' inputs {key!r}")
        if isinstance(first[key], Tensor)
        else first[key]
        for key in keys
    }
    return joined if isinstance(first, Mapping) else tuple(joined.values())


def join_targets(batches: Sequence[Batch]) -> tuple[Tensor, Tensor | None]:
    """The targets of all batches, (N, …), and the weights, (N,); None where no batch has any, 1 for one that has none.

    Raises:
        InputError: The targets' shapes do not agree but for the number of examples.
    """
    target = join_rows([batch.target for batch in batches], "the batches' targets")
    if all(batch.weight is None for batch in batches):
        return target, None
    return target, torch.cat(
        [torch.ones(len(one), device=target.device) if one.weight is None else one.weight for one in batches]
    )


def join_rows(parts: Sequence[Tensor], what: str, dim: int = 0) -> Tensor:
    """Join tensors along the dimension of the examples.

    Raises:
        InputError: Their other dimensions differ, as those of sequences that were padded batch by batch do.
    """
    if len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) > 1:
        shapes = sorted({tuple(part.shape) for part in parts})[:3]
        raise InputError(
            f"{what} differ in shape, such as {', '.join(map(str, shapes))}, and cannot be joined: pad all examples to one "
            f"length, or take batches of one shape at a time"
        )
    return torch.cat(list(parts), dim=dim)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Copy a batch to ``device`` where it is not there yet."""
    return map_tensors(inputs, lambda tensor: tensor.to(device, non_blocking=True))


def rechunk(batches: Iterable[Inputs], size: int) -> Iterator[Inputs]:
    """Cut a stream of batches anew into batches of ``size`` rows; the last may be smaller, or larger by one row.

    A single row is not left over, for many models squeeze their outputs and would take it for no batch at all.

    What comes out depends on the rows and on ``size`` alone, not on how the rows came in; except that batches whose
    rows differ in shape (sequences padded batch by batch), or that differ in what is no tensor, are not joined.
    """
    waiting: list[Inputs] = []
    count = 0
    for batch in batches:
        if waiting and not _are_alike(waiting[0], batch):
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


def _are_alike(one: Inputs, other: Inputs) -> bool:
    """Whether rows of the two batches may stand in one chunk: its constants are those of the first."""
    left, right = _parts(one), _parts(other)
    return left.keys() == right.keys() and all(_is_alike(left[key], right[key]) for key in left)


def _is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape[1:] == other.shape[1:]
    plain = isinstance(one, bool | int | float | str) and type(one) is type(other)
    return one is other or (plain and bool(one == other))


def _parts(inputs: Inputs) -> dict[Any, Any]:
    if isinstance(inputs, Tensor):
        return {0: inputs}
    return dict(inputs if isinstance(inputs, Mapping) else enumerate(inputs))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return False
    return any(isinstance(part, Tensor) or _holds_tensors(part) for part in value)


def _as_target(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"targets must be a tensor, but they are a {type(value).__name__}; use torch.as_tensor")
    return value


def _as_weight(value: Any, target: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != target.shape[:1]:
        found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"a batch is a pair (inputs, target), or three with the weights of the examples, which are floats, one for each "
            f"example, of shape {tuple(target.shape[:1])}, but they are {found}. Where the model takes several inputs, give "
            f"((x1, x2), target); without targets pass has_targets=False"
        )
    bad = int((~(torch.isfinite(value) & (value >= 0))).sum())
    if bad:
        raise InputError(f"weights of examples must be finite and not negative, but {bad} of a batch are not")
    return value
