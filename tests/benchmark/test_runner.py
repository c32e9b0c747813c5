"""Running: every method gives figures, nothing is run twice, what fails is said and costs nobody else anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stfbnn.benchmark import runner
from stfbnn.benchmark.methods import METHODS
from stfbnn.benchmark.methods.base import Context, best_noise, by_grid, choose
from stfbnn.benchmark.records import Candidate, load_record, load_records, record_path
from stfbnn.benchmark.runner import run_units, units_of
from stfbnn.benchmark.suites import SUITES, Suite
from stfbnn.errors import InputError
from stfbnn.likelihood import Gaussian
from stfbnn.predictive import MemberOutputs

SMOKE = {task.source: task for task in SUITES["smoke"].tasks}


def tiny(source: str = "digits", **changes: Any) -> Suite:
    options = {"train": 150, "test": 60, "choose": 60, "shifted": 10, "samples": 2, "epochs": 2, **changes}
    return Suite("tiny", "", 1, (replace(SMOKE[source], **options),))


def run(folder: Path, suite: Suite, *methods: str, **options: Any) -> list[str]:
    units, skipped = units_of(suite, folder, methods=methods)
    assert not skipped
    return run_units(units, progress=False, **options)


@pytest.mark.parametrize("source", SMOKE)
def test_every_method_gives_all_figures(tmp_path: Path, source: str) -> None:
    assert run(tmp_path, tiny(source)) == []
    records = {one.method: one for one in load_records(tmp_path)}
    assert set(records) == set(METHODS)
    for name, one in records.items():
        if one.failed is not None:
            # What is not for this task, and what is not installed, is said.
            assert name in ("label-smoothing", "laplace-last", "laplace-all"), one.failed
            continue
        assert one.raw is not None
        assert one.cost is not None
        assert all(value is not None for value in one.raw.metrics.values()), name
        assert one.cost.predict_ratio > 0
        assert one.cost.trainable_parameters > 0
        assert (one.cost.peak_bytes is None) == (METHODS[name].step is None)
        assert all(len(curve) == 5 for curve in one.raw.shift.values())
        assert (one.scaled is None) == (source == "diabetes")
        # Runs of one epoch and of two, which is the usual length of stage one; stage two's is one.
        # A course is in the order of time, in which short runs on a busy machine may change places.
        lengths = sorted(run.setting["epochs"] for run in one.course)
        assert lengths == {"stf-bnn": [1, 2], "bnn-scratch": [1, 2], "bnn-scratch-natural": [1, 2]}.get(
            name, [1] if name.startswith("bnn") else []
        ), name
        assert all(run.seconds > 0 for run in one.course)
        if source == "digits":
            assert set(one.raw.ood) == {"inverted", "photo patches"}
            assert sum(one.raw.entropies["test"]) == 60
            assert len(one.raw.risk_coverage["coverage"]) <= 101
            assert one.raw.abstention["target_risk"] == 0.05
            assert one.scaled is not None
            assert one.scaled.tau is not None
    assert records["network"].cost is not None
    assert records["network"].cost.seconds == 0


def test_nothing_is_run_twice_and_other_settings_are_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, tiny(), "network", "deep-ensemble")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}

    def never(*_: Any) -> None:
        raise AssertionError("this was done already")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_run_method", never)
        assert run(tmp_path, tiny(), "network", "deep-ensemble") == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == before
    run(tmp_path, tiny(epochs=1), "network")
    assert load_record(record_path(tmp_path, "digits-mlp", 0, "network")).settings["task"]["epochs"] == 1


def test_the_usual_length_in_a_course_is_the_run_that_was_chosen(tmp_path: Path) -> None:
    assert run(tmp_path, tiny(), "stf-bnn", "bnn-scratch") == []
    for method in ("stf-bnn", "bnn-scratch"):
        one = load_record(record_path(tmp_path, "digits-mlp", 0, method))
        by_length = sorted(one.course, key=lambda run: run.setting["epochs"])
        usual = by_length[0 if method == "stf-bnn" else -1]
        assert one.chosen is not None
        assert usual.held_out_nll == pytest.approx(one.candidates[one.chosen[0]].held_out_nll, rel=1e-6)


def test_a_task_can_do_without_some_methods_settings_and_courses(tmp_path: Path) -> None:
    suite = replace(tiny(left_out=("swag",), courses=False, budget=1), budget=2)
    assert run(tmp_path, suite, "network", "swag", "stf-bnn") == []
    found = {one.method: one for one in load_records(tmp_path)}
    assert found["swag"].failed == "left out of this task for time"
    assert len(found["network"].candidates) == 1
    assert found["stf-bnn"].course == ()


def test_equal_rows_in_a_table_are_how_the_data_are(tmp_path: Path) -> None:
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    lines = [",".join(f"{value:.4f}" for value in [*row, sum(row)]) for row in rows.tolist()]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["a,b,c,target", *lines]) + "\n")
    (task,) = tiny("diabetes").tasks
    suite = Suite("tiny", "", 1, (replace(task, source=str(table)),))
    assert run(tmp_path / "out", suite, "network", "stf-bnn") == []


def test_a_network_that_was_lost_is_trained_again_to_the_same(tmp_path: Path) -> None:
    run(tmp_path, tiny(), "network")
    weights = next(tmp_path.rglob("network.safetensors"))
    before = weights.read_bytes()
    weights.write_bytes(before[: len(before) // 2])
    run(tmp_path, tiny(), "deep-ensemble")
    assert weights.read_bytes() == before


def test_a_method_without_the_network_s_own_record_gets_its_network(tmp_path: Path) -> None:
    assert run(tmp_path, tiny(), "stf-bnn") == []
    assert [one.method for one in load_records(tmp_path)] == ["stf-bnn"]


def test_a_method_that_fails_is_recorded_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Context) -> Any:
        raise KeyError("no such thing")

    monkeypatch.setitem(METHODS, "swag", replace(METHODS["swag"], fit=fails))
    failures = run(tmp_path, tiny(), "network", "swag", "deep-ensemble")
    assert len(failures) == 1
    assert "swag" in failures[0]
    assert "no such thing" in failures[0]
    records = {one.method: one for one in load_records(tmp_path)}
    assert records["swag"].failed == "KeyError: 'no such thing'"
    assert records["deep-ensemble"].raw is not None
    monkeypatch.undo()
    # What failed is tried again.
    assert run(tmp_path, tiny(), "network", "swag", "deep-ensemble") == []
    assert load_record(record_path(tmp_path, "digits-mlp", 0, "swag")).failed is None


def test_a_task_that_cannot_begin_is_told_and_the_others_run(tmp_path: Path) -> None:
    (sound,) = tiny().tasks
    suite = Suite("tiny", "", 1, (replace(sound, name="unsound", network="nonsense"), sound))
    (failure,) = run(tmp_path, suite, "network")
    assert failure.startswith("unsound 0: InputError: task unsound names the network 'nonsense'")
    assert [one.task for one in load_records(tmp_path)] == ["digits-mlp"]


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    suite = tiny(seeds=(0, 1))
    run(tmp_path / "one", suite, "network")
    run(tmp_path / "two", suite, "network", jobs=2)
    one, two = load_records(tmp_path / "one"), load_records(tmp_path / "two")
    assert [record.seed for record in two] == [0, 1]
    assert [record.raw for record in one] == [record.raw for record in two]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    script = (
        "import dataclasses, sys\n"
        "from pathlib import Path\n"
        "from stfbnn.benchmark.runner import run_units, units_of\n"
        "from stfbnn.benchmark.suites import SUITES, Suite\n"
        "sizes = {'train': 150, 'test': 60, 'choose': 60, 'shifted': 10, 'samples': 2, 'epochs': 2}\n"
        "suite = Suite('tiny', '', 1, (dataclasses.replace(SUITES['smoke'].tasks[0], **sizes),))\n"
        "units, _ = units_of(suite, Path(sys.argv[1]), methods=('network', 'deep-ensemble', 'stf-bnn'))\n"
        "run_units(units, progress=False)\n"
    )
    first = record_path(tmp_path, "digits-mlp", 0, "network")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as child:
        deadline = time.monotonic() + 120
        while not first.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    assert first.exists()
    written = first.stat().st_mtime_ns
    assert run(tmp_path, tiny(), "network", "deep-ensemble", "stf-bnn") == []
    assert first.stat().st_mtime_ns == written
    assert len(load_records(tmp_path)) == 3
    assert not list(tmp_path.rglob("*.tmp"))


def test_names_that_are_unknown_are_refused(tmp_path: Path) -> None:
    for options in ({"tasks": ("nothing",)}, {"methods": ("magic",)}):
        with pytest.raises(InputError, match="there are"):
            units_of(tiny(), tmp_path, **options)
    with pytest.raises(InputError, match="jobs"):
        run_units([], jobs=0)


def test_tasks_whose_data_are_missing_are_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STFBNN_DATA", raising=False)
    units, skipped = units_of(SUITES["quick"], tmp_path)
    assert {unit.task.name for unit in units} == {"digits-mlp", "diabetes"}
    assert set(skipped) == {"fashion-mlp-small", "uci-yacht"}
    assert all("STFBNN_DATA" in reason for reason in skipped.values())


def test_a_damaged_record_is_run_again(tmp_path: Path) -> None:
    run(tmp_path, tiny(), "network")
    path = record_path(tmp_path, "digits-mlp", 0, "network")
    path.write_text(json.dumps({"schema": 1}))
    run(tmp_path, tiny(), "network")
    assert load_record(path).raw is not None


def test_the_candidate_of_lowest_held_out_score_is_chosen_for_each_row() -> None:
    scores = [(0.5, 0.30), (0.4, 0.35), (float("nan"), 0.31), (0.6, 0.29)]
    candidates = [Candidate({"number": index}, raw, scaled, 1.0, 2.0) for index, (raw, scaled) in enumerate(scores)]
    chosen = choose(candidates, [None] * 4)  # type: ignore[list-item]
    assert (chosen.raw, chosen.scaled) == (1, 3)
    assert chosen.search_seconds == 8.0
    assert choose([replace(one, held_out_nll_scaled=None) for one in candidates], [None] * 4).scaled is None  # type: ignore[list-item]


def test_no_method_tries_more_settings_than_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(
        "stfbnn.benchmark.methods.base.score", lambda _c, _p, setting, _s: Candidate(setting, 1.0, None, None, 0.0)
    )
    fit = by_grid(lambda _, setting: tried.append(setting), [{"a": index} for index in range(5)])  # type: ignore[func-returns-value,arg-type]
    task = SMOKE["digits"]
    fit(Context(task, None, 0, 2))  # type: ignore[arg-type]
    assert tried == [{"a": 0}, {"a": 1}]


def test_the_best_noise_is_that_of_the_residuals_where_there_is_one_member() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(1, 500), torch.randn(500)
    found = best_noise(MemberOutputs(outputs, Gaussian(noise_std=1.0)), targets)
    assert found == pytest.approx(float((outputs[0] - targets).square().mean().sqrt()), rel=0.01)


def test_the_best_noise_of_several_members_leaves_room_for_their_spread() -> None:
    torch.manual_seed(0)
    members, targets = torch.randn(50, 500), torch.randn(500) * 1.5
    outputs = MemberOutputs(members, Gaussian(noise_std=1.0))
    found = best_noise(outputs, targets)
    grid = [0.05 * step for step in range(1, 80)]
    scores = [
        float(replace(outputs, likelihood=Gaussian(noise_std=noise)).at().log_density(targets).mean()) for noise in grid
    ]
    assert found == pytest.approx(grid[scores.index(max(scores))], abs=0.05)
    assert found < float((members.mean(0) - targets).square().mean().sqrt())
