"""Tasks: what is held out is apart, foreign and corrupted examples are what they say, networks fit the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stfbnn.benchmark.parts import TaskData, TensorPart, targets_of_part
from stfbnn.benchmark.suites import SUITES, suite_named
from stfbnn.benchmark.tasks import SHIFTS, Task
from stfbnn.data import Split
from stfbnn.errors import DataError, InputError
from stfbnn.evaluation.shift import TABLE_CORRUPTIONS

BUNDLED = {task.name: task for task in SUITES["quick"].tasks if task.source in ("digits", "diabetes")}


def rows(part: TensorPart) -> set[bytes]:
    return {row.numpy().tobytes() for row in part.split.inputs}


@pytest.mark.parametrize("name", BUNDLED)
def test_no_example_is_in_two_parts(name: str) -> None:
    data = BUNDLED[name].data(0)
    parts = [rows(part) for part in (data.train, data.held, data.test)]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_seed_is_a_division_of_the_data(name: str) -> None:
    task = BUNDLED[name]
    assert rows(task.data(1).held) == rows(task.data(1).held)
    assert rows(task.data(1).held) != rows(task.data(2).held)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_network_fits_the_data(name: str) -> None:
    data = BUNDLED[name].data(0)
    x, y = next(iter(data.train.batches(8)))
    outputs = data.network()(x)
    assert len(outputs) == len(y)
    if data.kind == "regression":
        # Outputs are in the targets' unit: of their size from the start.
        assert abs(outputs.mean().item() - float(targets_of_part(data.train).mean())) < 100


def test_columns_of_tables_are_normalised_by_the_training_rows() -> None:
    data = BUNDLED["diabetes"].data(0)
    x = torch.cat([batch[0] for batch in data.train.batches(64)])
    torch.testing.assert_close(x.mean(0), torch.zeros(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(10), atol=1e-4, rtol=0)


def test_corrupted_examples_are_the_test_examples_changed() -> None:
    for task, names in ((BUNDLED["digits-mlp"], SHIFTS), (BUNDLED["diabetes"], TABLE_CORRUPTIONS)):
        data = replace(task, shifted=30).data(0)
        assert data.shifted is not None
        assert data.corrupted is not None
        assert data.corruptions == names
        plain = data.shifted.split.inputs
        torch.testing.assert_close(plain, data.test.split.inputs[:30])
        for name in names:
            mild, strong = (data.corrupted(name, severity).split.inputs - plain for severity in (1, 5))
            assert 0 < mild.norm() < strong.norm()
        assert torch.equal(targets_of_part(data.corrupted(names[0], 1)), targets_of_part(data.shifted))


def test_foreign_examples_have_the_shape_of_the_others() -> None:
    data = BUNDLED["digits-mlp"].data(0)
    assert set(data.outside) == {"inverted", "photo patches"}
    for part in data.outside.values():
        assert part.split.stored.shape[1:] == data.test.split.stored.shape[1:]
        assert part.targets is None


def test_one_batch_of_a_task_is_one_batch() -> None:
    small = BUNDLED["digits-mlp"].data(0).only(16)
    assert (len(small.train), len(small.held)) == (16, 16)
    assert not small.outside


def test_a_file_of_the_users_own_is_a_task(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    lines = ["a,b,target"] + [f"{i % 7},{i % 5},{'yes' if i % 3 else 'no'}" for i in range(60)]
    table.write_text("\n".join(lines) + "\n")
    task = Task("own", str(table), "stfbnn.models:mlp", (0,), 1, {}, 1, arguments={"hidden": 4})
    assert task.missing() is None
    data = task.data(0)
    # A fifth of 60 to test with, a fifth of the rest held out.
    assert (len(data.test), len(data.held), len(data.train)) == (12, 10, 38)
    assert data.network()(next(iter(data.train.batches(4)))[0]).shape == (4, 2)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = next(task for task in SUITES["quick"].tasks if task.source == "fashion-mnist")
    monkeypatch.delenv("STFBNN_DATA", raising=False)
    assert "STFBNN_DATA" in str(task.missing())
    with pytest.raises(DataError, match="STFBNN_DATA"):
        task.data(0)
    monkeypatch.setenv("STFBNN_DATA", str(tmp_path))
    assert "fashion-mnist" in str(task.missing())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="quick"):
        suite_named("huge")
    with pytest.raises(InputError, match="transformer"):
        replace(BUNDLED["digits-mlp"], network="transformer").data(0)


def test_parts_need_targets() -> None:
    bare = TensorPart(Split(torch.zeros(4, 2)), 0.0, 1.0)
    with pytest.raises(InputError, match="train"):
        TaskData("regression", lambda: torch.nn.Linear(2, 1), bare, bare, bare)


def test_names_of_tasks_are_unique_in_a_suite() -> None:
    for suite in SUITES.values():
        names = [task.name for task in suite.tasks]
        assert len(set(names)) == len(names)


@pytest.mark.data
@pytest.mark.parametrize(
    "task", {task.name: task for suite in SUITES.values() for task in suite.tasks}.values(), ids=lambda task: task.name
)
def test_every_task_finds_its_data(task: Task, data_root: Path) -> None:
    assert data_root.is_dir()
    assert task.missing() is None
