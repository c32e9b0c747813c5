"""What a method costs: bytes of tensors alive at once, seconds against another method's, and bytes on disk.

Memory is counted, not sampled: the process's resident size also holds what the allocator keeps and what libraries load, and
depends on what ran before. On the CPU every allocation and release of a tensor's storage is seen through PyTorch's profiler,
those inside an operation included; a mode that looks at operations' results would miss them (a fifth of an LSTM's step).
Seconds are taken in turn, so that a change of the machine's speed meets all that are compared.
"""

from __future__ import annotations

import gc
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

from stfbnn.errors import InputError

# What the profiler's C++ parts write to standard error whenever it runs, whatever it is told.
_NOISE = re.compile(
    rb"(?:(?:USDT|STAGE):[-0-9]+ \S+ \S+ \S*ProfilerHandler\.cpp"
    rb"|\[W[^\n]*CPUAllocator\.cpp[^\n]*before the profiling started)[^\n]*\n"
)


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds of a measurement.

    Attributes:
        median: The figure to quote.
        low: The smallest of the rounds.
        high: The largest.
    """

    median: float
    low: float
    high: float


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each storage once, however many tensors look at it.

    Args:
        tensors: Dense tensors, such as parameters, buffers and the optimiser's state.

    Raises:
        InputError: A tensor has no storage of its own (a sparse one).
    """
    return sum(_storages(tensors).values())


def peak_tensor_bytes(
    step: Callable[[], object], held: Iterable[Tensor] = (), device: torch.device | str = "cpu"
) -> int:
    """Most bytes of tensors alive at once during a step, with what it holds throughout.

    The step is called twice, because the first call may make what the second finds (gradients, the optimiser's state); the
    most over both counts. Tensors that exist before and are not in ``held`` do not count. Name in ``held`` what stays:
    parameters, buffers, the optimiser's state, the batch, gradients if they are zeroed in place; leave out what the step
    releases and makes anew (gradients set to None).

    On the CPU the count is exact, but for what a library allocates outside PyTorch's allocator (oneDNN's scratch space) and
    what other Python threads allocate. On CUDA it is the caching allocator's peak, which rounds every block up to 512 bytes,
    over what was allocated before; release gradients beforehand there, since they would pass for what is not the step's.
    The count depends on the number of threads where kernels give each thread a buffer.

    Args:
        step: One step; what it returns is dropped.
        held: Tensors that are alive before, during and after it; those on another device do not count.
        device: Where to count: the CPU or a CUDA device.

    Raises:
        InputError: A profiler is running already, the device is of another kind, or a held tensor has no storage.
    """
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise InputError(f"memory can be counted on cpu and cuda, but the device is {where}")
    if where.type == "cpu" and _profiler_enabled():
        raise InputError("a profiler is running, and memory is counted by another one; stop it first")
    constant = bytes_of(tensor for tensor in held if tensor.device.type == where.type)
    gc.collect()
    return constant + (_most_on_cpu(step) if where.type == "cpu" else _most_on_cuda(step, where))


def saved_bytes(forward: Callable[[], object], owned: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass: distinct storages, without those of given tensors.

    Args:
        forward: The forward pass; its result holds the graph and is dropped.
        owned: Tensors that are there anyway, such as parameters and buffers.

    Raises:
        InputError: An owned or a saved tensor has no storage of its own (a sparse one).
    """
    known = _storages(owned)
    kept: dict[tuple[torch.device, int], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update(_storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(size for key, size in kept.items() if key not in known)
    del output
    return total


def alternating_seconds(
    functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, device: torch.device | str = "cpu"
) -> dict[str, tuple[float, ...]]:
    """Time functions in turn, in this process: each round calls every one once, and starts with another than the last.

    Args:
        functions: What to call, by name.
        rounds: How many times.
        warmup: Rounds beforehand that do not count: they fill caches and choose kernels.
        device: Where the functions compute; one that works asynchronously is waited for before and after each call.

    Returns:
        For each name the seconds of each round, in the order of the rounds.

    Raises:
        InputError: There is no function or no round, or ``warmup`` is negative.
    """
    if not functions or rounds < 1 or warmup < 0:
        raise InputError(
            f"timing needs at least one function, at least one round and no negative warm-up, but there are "
            f"{len(functions)}, {rounds} and {warmup}"
        )
    where = torch.device(device)

    def wait() -> None:
        if where.type != "cpu":
            torch.accelerator.synchronize(where)

    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wait()
            start = perf_counter()
            functions[name]()
            wait()
            elapsed = perf_counter() - start
            if number >= 0:
                seconds[name].append(elapsed)
    return {name: tuple(values) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, Sequence[float]], of: str, over: str) -> Spread:
    """Compare two of the functions that were timed in turn, round by round.

    Args:
        seconds: For each name one time a round (:func:`alternating_seconds` makes it).
        of: The one above the line.
        over: The one below it.

    Returns:
        The median of the rounds' ratios, the smallest and the largest.

    Raises:
        InputError: A name was not timed, the two have different or no rounds, or a time is not positive.
    """
    for name in (of, over):
        if name not in seconds:
            raise InputError(f"there are no times of {name!r}, only of {', '.join(map(repr, seconds))}")
    if len(seconds[of]) != len(seconds[over]) or not seconds[of]:
        raise InputError(
            f"a ratio is taken round by round, but there are {len(seconds[of])} rounds of {of!r} and "
            f"{len(seconds[over])} of {over!r}"
        )
    if min(seconds[over]) <= 0:
        raise InputError(f"the times of {over!r} must be positive, but one is {min(seconds[over])}")
    each = [above / below for above, below in zip(seconds[of], seconds[over], strict=True)]
    return Spread(statistics.median(each), min(each), max(each))


def artifact_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes on disk of a file, or of all files in a folder and its folders.

    Args:
        path: The file or folder; a linked file counts by its target, and once.

    Raises:
        InputError: There is no such file or folder.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"there is no file or folder {root}, so it has no size")
    files = [root] if root.is_file() else [file for file in root.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in {file.resolve() for file in files})


def _storages(tensors: Iterable[Tensor]) -> dict[tuple[torch.device, int], int]:
    """Bytes of each distinct storage, by where it lies."""
    found = {}
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise InputError(
                f"the bytes of a tensor of layout {tensor.layout} cannot be counted; give its indices and values instead"
            )
        storage = tensor.untyped_storage()
        found[tensor.device, storage.data_ptr()] = storage.nbytes()
    return found


def _most_on_cpu(step: Callable[[], object]) -> int:
    """Most bytes over those at the start, by every allocation and release of two calls.

    Of what was allocated before, the profiler reports the release if an earlier profiler saw the allocation, and else not;
    so releases are told by their address, and only those of what the calls themselves allocated count.
    """
    with _without_noise(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
    inner = profiler.profiler
    if inner is None or inner.kineto_results is None:
        raise RuntimeError("PyTorch's profiler returned no events")
    live: dict[int, int] = {}
    now = most = 0
    for address, size in _allocations(inner.kineto_results.experimental_event_tree()):
        if size > 0:
            now += size - live.get(address, 0)
            live[address] = size
            most = max(most, now)
        else:
            now -= live.pop(address, 0)
    return most


def _allocations(roots: Iterable[_ProfilerEvent]) -> list[tuple[int, int]]:
    """Address and bytes of each allocation on the CPU, and of each release (negative bytes), in order of time."""
    found: list[tuple[int, int, int]] = []
    waiting = list(roots)[::-1]
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children[::-1])
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == "cpu" and fields.ptr is not None:
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    # The sort is stable: events that share a nanosecond stay in the order of the tree.
    return [(address, size) for _, address, size in sorted(found, key=lambda one: one[0])]


def _most_on_cuda(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes over those at the start, by the caching allocator, in two calls."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _without_noise() -> Iterator[None]:
    """Keep back what is written to standard error, and let through afterwards all but the profiler's own lines.

    They come from C++, past ``sys.stderr``, and the settings that would silence them are read once, when PyTorch is loaded.
    """
    sys.stderr.flush()
    try:
        original = os.dup(2)
    except OSError:  # a process without standard error has nothing to keep quiet
        yield
        return
    try:
        with tempfile.TemporaryFile() as kept:
            os.dup2(kept.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(original, 2)
                kept.seek(0)
                # Not line by line: the profiler's lines may come after one that the step has not ended.
                _write_all(2, _NOISE.sub(b"", kept.read()))
    finally:
        os.close(original)


def _write_all(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content) :]
