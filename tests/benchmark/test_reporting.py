"""From records to a report: marks and ranks by the statistics, tables for a terminal, files on disk."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from made_records import record
from rich.console import Console

from stfbnn.benchmark.claims import claims_of
from stfbnn.benchmark.records import Record, Row
from stfbnn.benchmark.reporting import figure_of, marks, rankings, values_of, write_benchmark_report
from stfbnn.report.html.content import MethodRow

# Per seed; the second is better by far and with little noise, the third cannot be told from the first.
NLL = {"network": (0.50, 0.51, 0.49, 0.50), "good": (0.300, 0.311, 0.289, 0.304), "alike": (0.51, 0.50, 0.50, 0.49)}


def several(task: str = "digits", source: str = "digits") -> list[Record]:
    made = [record(method, task, seed, nll) for method, values in NLL.items() for seed, nll in enumerate(values)]
    return [dataclasses.replace(one, settings={"task": {"source": source}}) for one in made]


def test_only_what_is_significant_is_marked() -> None:
    mark = marks(several())
    assert mark("digits", "nll") == {MethodRow("good")}
    # All are equally accurate.
    assert mark("digits", "accuracy") == frozenset()
    assert mark("digits", "count") == frozenset()


def test_divisions_of_one_table_are_not_independent() -> None:
    # Resampled splits share their data: what four seeds show is less, and here no longer enough.
    noisy = {"network": (0.50, 0.51, 0.49, 0.50), "good": (0.485, 0.45, 0.44, 0.41)}
    for source, expected in (("digits", {MethodRow("good")}), ("uci-gal-splits/yacht", set())):
        made = [record(method, "t", seed, nll) for method, values in noisy.items() for seed, nll in enumerate(values)]
        found = marks([dataclasses.replace(one, settings={"task": {"source": source}}) for one in made])("t", "nll")
        assert found == expected


def test_lines_with_a_temperature_are_a_family_of_their_own() -> None:
    made = [
        record(method, seed=seed, nll=0.9, scaled=nll)
        for method, values in NLL.items()
        for seed, nll in enumerate(values)
    ]
    assert marks(made)("digits", "nll") == {MethodRow("good", scaled=True)}


def test_figures_are_found_by_their_names() -> None:
    row = Row({"nll": 0.5}, ood={"photo/odd": {"entropy": {"auroc": 0.7}}})
    assert figure_of(row, "nll") == 0.5
    assert figure_of(row, "ood/photo/odd/entropy/auroc") == 0.7
    assert figure_of(row, "ood/none/entropy/auroc") is None
    one = dataclasses.replace(record(), raw=row, scaled=Row({"nll": 0.4}, tau=2.0))
    assert values_of([one], "nll") == {MethodRow("network"): {0: 0.5}, MethodRow("network", True): {0: 0.4}}


def test_methods_are_ranked_over_tasks_by_their_better_line() -> None:
    (found,) = rankings([*several("a"), *several("b"), record("only here", "a")])
    # Both tasks have the same figures: alike and network have equal means, and share the ranks two and three.
    assert dict(found.average_ranks) == {"good": 1.0, "alike": 2.5, "network": 2.5}
    assert "only here" not in found.average_ranks
    assert "only here" in found.note
    assert found.tasks == 2
    assert rankings([record("network")]) == ()


def test_numbers_are_ranked_by_their_density() -> None:
    made = [
        record(name, "t", seed, nll, kind="regression") for name, nll in (("a", 1.0), ("b", 2.0)) for seed in (0, 1)
    ]
    (found,) = rankings(made)
    assert found.average_ranks["a"] == 1
    assert found.average_ranks["b"] == 2


def test_the_report_is_written_with_claims_and_tables(tmp_path: Path) -> None:
    made = [*several(), record("broken", failed="no such package")]
    written = write_benchmark_report(tmp_path, made, "stfbnn benchmark quick", "Quick")
    assert written.files == (tmp_path / "report.html", tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "stfbnn benchmark quick" in text
    assert "no such package" in text
    assert written.claims == tuple(claims_of(made))
    console = Console(width=80, record=True, file=io.StringIO())
    for table in written.tables:
        console.print(table)
    shown = console.export_text()
    assert "good" in shown
    # 0.300, 0.311, 0.289 and 0.304: mean and standard error.
    assert "0.3010 ± 0.0046" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("scaled", [None, 0.45])
def test_a_single_seed_has_no_error(tmp_path: Path, scaled: float | None) -> None:
    written = write_benchmark_report(tmp_path, [record("network", scaled=scaled), record("other")], "c", "t")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(written.tables[0])
    assert "±" not in console.export_text().split("┃", 1)[1]
