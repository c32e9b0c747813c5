"""Costs against counts done by hand, another way of counting, and a clock that the test turns."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stfbnn.errors import InputError
from stfbnn.evaluation import cost
from stfbnn.evaluation.cost import (
    Spread,
    alternating_seconds,
    artifact_bytes,
    bytes_of,
    peak_tensor_bytes,
    ratios,
    saved_bytes,
)

SIZE = 1000
BYTES = 4 * SIZE


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# Bytes of tensors


def test_a_storage_counts_once_however_many_tensors_look_at_it() -> None:
    base = torch.zeros(10, 10)
    assert bytes_of([base, base.T, base[3], base.view(-1), base.detach()]) == 400
    assert bytes_of([base, base.clone(), torch.zeros(3, dtype=torch.float64)]) == 824
    # A view holds the whole of its storage.
    assert bytes_of([torch.zeros(10, 10)[0]]) == 400
    tied = nn.Linear(5, 5, bias=False)
    assert bytes_of([*tied.parameters(), tied.weight.T]) == 100
    assert bytes_of([torch.zeros(0), torch.zeros(0)]) == bytes_of([]) == 0


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(InputError, match=r"layout torch.sparse_coo cannot be counted"):
        bytes_of([torch.eye(3).to_sparse()])


# The peak of a step


@pytest.mark.usefixtures("threads")
def test_a_chain_whose_intermediate_results_are_released_holds_two_at_a_time() -> None:
    def chain() -> Tensor:
        x = torch.ones(SIZE)
        for _ in range(5):
            x = x + x
        return x

    assert peak_tensor_bytes(chain) == 2 * BYTES


@pytest.mark.parametrize("length", [0, 5])
def test_a_chain_whose_intermediate_results_are_kept_holds_all(length: int) -> None:
    def chain() -> list[Tensor]:
        kept = [torch.ones(SIZE)]
        for _ in range(length):
            kept.append(kept[-1] + kept[-1])
        return kept

    assert peak_tensor_bytes(chain) == (1 + length) * BYTES


def test_the_peak_is_that_of_the_worst_moment() -> None:
    def step() -> None:
        torch.ones(5 * SIZE)
        a, b = torch.ones(2 * SIZE), torch.ones(SIZE)
        del a
        torch.ones(7 * SIZE)
        del b
        torch.ones(6 * SIZE)

    assert peak_tensor_bytes(step) == 8 * BYTES


@pytest.mark.parametrize("depth", [2, 8])
def test_a_graph_of_exponentials_holds_every_result_and_two_gradients(depth: int) -> None:
    x, gradient = torch.zeros(SIZE, requires_grad=True), torch.ones(SIZE)

    def step() -> None:
        x.grad = None
        y: Tensor = x
        for _ in range(depth):
            y = y.exp()
        y.backward(gradient)

    # An exponential saves its result; the last one is also y. Going back, the gradient that comes in and the one that goes
    # out are alive together, while the first result to be released is the one before the last.
    assert peak_tensor_bytes(step) == (depth + 2) * BYTES
    assert peak_tensor_bytes(step, held=[x, gradient]) == (depth + 4) * BYTES


def test_gradients_of_an_earlier_step_change_nothing() -> None:
    weight, inputs = torch.ones(SIZE, requires_grad=True), torch.ones(SIZE)

    def step() -> None:
        weight.grad = None
        (weight * inputs).backward(inputs)

    counts = []
    for gradient in (None, torch.ones(SIZE)):
        weight.grad = gradient
        del gradient
        counts.append(peak_tensor_bytes(step, held=[weight, inputs]))
    # The product and the gradient, beside what is held.
    assert counts == [4 * BYTES] * 2


def test_the_state_of_an_optimiser_counts_whether_it_is_made_before_or_in_the_step() -> None:
    weight = torch.ones(SIZE, requires_grad=True)
    optimizer = torch.optim.Adam([weight], foreach=False)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        weight.square().sum().backward()
        optimizer.step()

    fresh = peak_tensor_bytes(step, held=[weight])
    state = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    assert bytes_of(state) >= 2 * BYTES
    assert peak_tensor_bytes(step, held=[weight, *state]) == fresh
    assert fresh >= 4 * BYTES


class Tracker(TorchDispatchMode):
    """Another way to count: the storages of what operations return, until they are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and (key := one.untyped_storage()._cdata) not in given | set(self.live):
                self.live[key] = one.untyped_storage().nbytes()
                weakref.finalize(one.untyped_storage(), self.live.pop, key)
        self.most = max(self.most, sum(self.live.values()))
        return result


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("widths", [(50, 64, 10), (50, 200, 200, 30, 10)])
def test_a_step_of_an_mlp_agrees_with_another_way_of_counting(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = [module for i in range(len(widths) - 1) for module in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())][
        :-1
    ]
    network, inputs, labels = nn.Sequential(*layers), torch.randn(128, widths[0]), torch.randint(0, 10, (128,))

    def step() -> None:
        network.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(inputs), labels).backward()

    step()
    network.zero_grad(set_to_none=True)
    with Tracker() as tracker:
        step()
        step()
    held = [*network.parameters(), inputs, labels]
    found = peak_tensor_bytes(step, held=held)
    assert found == tracker.most + bytes_of(held)
    # The results of the hidden layers at least, and of gradients at least those of the layers that came before the widest.
    assert found > bytes_of(held) + 128 * 4 * sum(widths[1:-1])


def test_what_an_operation_allocates_inside_counts() -> None:
    # An LSTM is one operation to anybody who looks at results: its gates are seen in its allocations only.
    layer, inputs = nn.LSTM(32, 64, batch_first=True), torch.randn(16, 20, 32)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        layer(inputs)[0].square().mean().backward()

    with Tracker() as tracker:
        step()
    assert peak_tensor_bytes(step) > tracker.most


def test_a_count_is_repeatable_and_none_disturbs_the_next() -> None:
    def small() -> Tensor:
        return torch.ones(SIZE) + 1

    def large() -> Tensor:
        return torch.ones(10 * SIZE).exp()

    first = peak_tensor_bytes(small)
    kept = torch.ones(50 * SIZE)
    assert peak_tensor_bytes(large) == 20 * BYTES
    del kept
    assert peak_tensor_bytes(small) == first


def test_a_step_is_called_twice_and_its_results_are_dropped() -> None:
    calls = []

    def step() -> Tensor:
        calls.append(1)
        return torch.ones(SIZE)

    assert peak_tensor_bytes(step) == BYTES
    assert len(calls) == 2


def test_the_profiler_is_silent_and_the_step_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    old = [torch.ones(SIZE)]

    def step() -> None:
        old.clear()  # what was allocated before the profiler started makes it complain
        os.write(2, b"the step says this\n")
        os.write(1, b"and this\n")

    peak_tensor_bytes(step)
    assert capfd.readouterr() == ("and this\n" * 2, "the step says this\n" * 2)

    def fails() -> None:
        os.write(2, b"before it fails")
        raise ValueError("failed on purpose")

    with pytest.raises(ValueError, match="failed on purpose"):
        peak_tensor_bytes(fails)
    assert capfd.readouterr().err == "before it fails"
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"
    assert peak_tensor_bytes(lambda: torch.ones(SIZE)) == BYTES


def test_a_running_profiler_and_other_devices_are_refused() -> None:
    with (
        cost._without_noise(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(InputError, match="a profiler is running"),
    ):
        peak_tensor_bytes(lambda: None)
    with pytest.raises(InputError, match="on cpu and cuda, but the device is meta"):
        peak_tensor_bytes(lambda: None, device="meta")


def test_on_cuda_what_others_hold_there_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # A caching allocator with 1000 bytes of others' and held tensors, whose peak in the step is 300 more.
    allocated = {"now": 1000, "most": 5000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(most=allocated["now"]))
    # Tensors on the CPU do not count there.
    assert peak_tensor_bytes(lambda: allocated.update(most=1300), held=[torch.ones(SIZE)], device="cuda") == 300


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_chain_holds_two_at_a_time() -> None:
    held = torch.ones(512, device="cuda")

    def chain() -> None:
        x = torch.ones(512, device="cuda")
        for _ in range(5):
            x = x + x

    others = torch.ones(4096, device="cuda")
    assert peak_tensor_bytes(chain, held=[held], device="cuda") == 3 * 2048
    del others


# What autograd keeps


def test_what_autograd_keeps_is_counted_by_storage_and_without_what_is_owned() -> None:
    weight, x = torch.ones(SIZE, requires_grad=True), torch.ones(SIZE)

    def squared() -> Tensor:
        return (weight * weight).exp()

    assert saved_bytes(lambda: weight * x) == BYTES  # x: only weight's gradient is wanted
    assert saved_bytes(lambda: weight * x, owned=[x]) == 0
    assert saved_bytes(squared) == 2 * BYTES
    assert saved_bytes(squared, owned=[weight]) == BYTES
    assert saved_bytes(lambda: x * x) == 0


# Seconds


class Clock:
    """Time that passes only when a function says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_functions_are_timed_in_turn_and_each_starts_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = Clock(), []
    monkeypatch.setattr(cost, "perf_counter", clock)

    def taking(name: str, seconds: float) -> Callable[[], None]:
        def function() -> None:
            called.append(name)
            clock.now += seconds * (1 + len(called) // 3)

        return function

    functions = {name: taking(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    found = alternating_seconds(functions, rounds=3, warmup=2)
    assert "".join(called[6:]) == "abcbcacab"
    assert sorted(called[:3]) == sorted(called[3:6]) == ["a", "b", "c"]
    # The clock runs slower and slower; each number is from the call of that round.
    speed = [1 + index // 3 for index in range(7, 16)]
    assert found["a"] == (speed[0], speed[5], speed[7])
    assert found["b"] == (2 * speed[1], 2 * speed[3], 2 * speed[8])
    assert found["c"] == (4 * speed[2], 4 * speed[4], 4 * speed[6])


def test_real_time_is_measured() -> None:
    found = alternating_seconds({"nothing": lambda: None, "sum": lambda: sum(range(300_000))}, rounds=3, warmup=0)
    assert all(value >= 0 for value in found["nothing"])
    assert min(found["sum"]) > 1e-4
    assert ratios(found, of="sum", over="sum") == Spread(1, 1, 1)


def test_ratios_are_taken_round_by_round() -> None:
    seconds = {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 8.0]}
    assert ratios(seconds, of="a", over="b") == Spread(2.0, 0.5, 3.0)
    assert ratios(seconds, of="b", over="a") == Spread(0.5, 1 / 3, 2.0)


# Bytes on disk


def test_a_file_and_a_folder_have_the_bytes_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 100)
    (tmp_path / "inner" / ".hidden").write_bytes(b"y" * 23)
    (tmp_path / "again.bin").symlink_to(tmp_path / "a.bin")
    (tmp_path / "empty").mkdir()
    assert artifact_bytes(tmp_path / "a.bin") == artifact_bytes(tmp_path / "again.bin") == 100
    assert artifact_bytes(tmp_path) == 123
    assert artifact_bytes(str(tmp_path / "empty")) == 0
    with pytest.raises(InputError, match="there is no file or folder"):
        artifact_bytes(tmp_path / "absent")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alternating_seconds({}, 1), "at least one function"),
        (lambda: alternating_seconds({"a": lambda: None}, 0), "at least one round"),
        (lambda: alternating_seconds({"a": lambda: None}, 1, warmup=-1), "no negative warm-up"),
        (lambda: ratios({"a": [1.0]}, of="a", over="b"), "no times of 'b', only of 'a'"),
        (lambda: ratios({"a": [1.0], "b": [1.0, 2.0]}, of="a", over="b"), "1 rounds of 'a' and 2 of 'b'"),
        (lambda: ratios({"a": [], "b": []}, of="a", over="b"), "0 rounds"),
        (lambda: ratios({"a": [1.0], "b": [0.0]}, of="a", over="b"), "must be positive"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
