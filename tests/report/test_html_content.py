"""How records become the numbers of a report: means over seeds, pooled bins, lines and tables."""

from __future__ import annotations

import dataclasses
import math

import benchmark_records as made
import numpy as np
import pytest

from stfbnn.benchmark.records import Row
from stfbnn.errors import InputError
from stfbnn.report.html.content import Comparison, MethodRow, Ranking, content_of, estimate
from stfbnn.report.html.measures import (
    best_table,
    choice_table,
    cost_table,
    failure_table,
    foreign_tables,
    prediction_table,
)
from stfbnn.report.html.pooling import mean_risks, pooled_bins, pooled_entropies, shifted
from stfbnn.report.verdicts import Claim


def test_an_estimate_is_the_mean_with_its_standard_error() -> None:
    values = [0.3, 0.5, 0.1, 0.25]
    found = estimate(values)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(np.std(values, ddof=1) / 2)
    single = estimate([0.3])
    assert single is not None
    assert (single.mean, single.error) == (0.3, None)


@pytest.mark.parametrize("values", [[], [0.3, None], [0.3, math.nan], [math.inf]])
def test_a_mean_over_the_seeds_that_went_well_is_none(values: list[float | None]) -> None:
    assert estimate(values) is None


def test_the_network_comes_first_and_failures_are_kept_apart() -> None:
    content = content_of(reversed(made.records()))
    assert content.methods[0] == "network"
    task = next(one for one in content.tasks if one.name == "fashion-mlp")
    assert "full-bnn" not in {row.method for row in task.rows}
    assert [(record.method, record.seed) for record in task.failures] == [("full-bnn", seed) for seed in made.SEEDS]
    regression = next(one for one in content.tasks if one.name == "concrete")
    assert regression.rows == (MethodRow("network"), MethodRow("stf-bnn"))


def test_the_prediction_table_shows_means_best_first_and_marks_what_it_is_told() -> None:
    content = content_of(made.records(), comparison=made.comparison())
    task = content.tasks[0]
    table = prediction_table(task, content)
    nll = [head.title for head in table.heads].index("NLL ↓")
    assert table.sorted_by == (nll, "ascending")
    order = [line.cells[nll].value for line in table.lines]
    assert order == sorted(order)
    expected = np.mean([record.raw.metrics["nll"] for record in task.of_method("stf-bnn")])
    cell = next(line.cells[nll] for line in table.lines if line.name == "stf-bnn")
    assert cell.value == pytest.approx(expected)
    assert cell.text == f"{expected:.4f}"
    marked = {(line.name, place) for line in table.lines for place, one in enumerate(line.cells) if one.marked}
    assert marked == {(MethodRow("stf-bnn mixture", True).label, nll)}


def test_the_statistics_are_asked_once_for_each_metric_of_a_task() -> None:
    asked: list[tuple[str, str]] = []
    content = content_of(made.records(), comparison=Comparison(lambda task, metric: asked.append((task, metric)) or ()))
    for _ in range(2):
        prediction_table(content.tasks[0], content)
        foreign_tables(content.tasks[0], content)
        best_table(content)
    assert len(asked) == len(set(asked))
    assert {("digits", "nll"), ("digits", "ood/noise/epistemic/fpr_at_95_tpr")} <= set(asked)


def test_an_undefined_figure_of_one_seed_leaves_a_dash() -> None:
    content = content_of(made.records())
    table = prediction_table(content.tasks[2], content)
    coverage = [head.title for head in table.heads].index("coverage 95 % → 0.95")
    assert {line.name: line.cells[coverage].text for line in table.lines} == {"network": "–", "stf-bnn": "0.940"}


def test_foreign_sets_have_a_table_each_and_marks_of_their_own() -> None:
    content = content_of(made.records(), comparison=made.comparison())
    tables = foreign_tables(content.tasks[0], content)
    assert [table.caption.split(":")[0] for table in tables] == ["Test data against letters", "Test data against noise"]
    assert [head.group for head in tables[0].heads] == [
        f"by {s}" for s in ("entropy", "epistemic", "confidence") for _ in "123"
    ]
    marked = [(line.name, place) for line in tables[0].lines for place, cell in enumerate(line.cells) if cell.marked]
    assert marked == [("stf-bnn", 0)]
    network = next(line for line in tables[0].lines if line.name == "network")
    assert [cell.value is None for cell in network.cells] == [False] * 3 + [True] * 3 + [False] * 3


def test_costs_are_ratios_to_stage_one_and_to_the_network() -> None:
    content = content_of(made.records())
    task = content.tasks[0]
    table = cost_table(task, content)
    line = next(one for one in table.lines if one.name == "full-bnn")
    costs = [record.cost for record in task.of_method("full-bnn")]
    assert line.cells[0].value == pytest.approx(np.mean([cost.seconds / cost.stage_one_seconds for cost in costs]))
    assert line.cells[1].value == pytest.approx(
        np.mean([cost.search_seconds / cost.stage_one_seconds for cost in costs])
    )
    assert line.cells[4].text == "2.10"
    assert line.cells[6].text == "814,120"
    assert [one.name for one in table.lines].count("full-bnn") == 1


def test_without_the_network_there_is_no_ratio_of_memory() -> None:
    content = content_of(record for record in made.records() if record.method != "network")
    assert {line.cells[4].text for line in cost_table(content.tasks[0], content).lines} == {"–"}


def test_a_method_that_lacks_a_seed_says_so() -> None:
    records = [one for one in made.records() if (one.task, one.method, one.seed) != ("digits", "stf-bnn", 2)]
    content = content_of(records)
    notes = {line.name: line.note for line in prediction_table(content.tasks[0], content).lines}
    assert notes["stf-bnn"] == "2 of 3 seeds"
    assert notes["network"] == ""


def test_equal_choices_of_several_seeds_share_a_line() -> None:
    table = choice_table(content_of(made.records()).tasks[0])
    line = next(one for one in table.lines if one.name == "stf-bnn")
    assert [cell.text for cell in line.cells] == ["0, 1, 2", "2", "scale = 0.1", "scale = 1", "1.500, 1.500, 1.500"]


def test_the_summary_names_the_best_mean_of_each_task() -> None:
    content = content_of(made.records(), comparison=made.comparison())
    lines = {(line.name, line.cells[0].text): line.cells for line in best_table(content).lines}
    task = content.tasks[0]
    means = {row: task.metric(row, "accuracy").mean for row in task.rows if not row.scaled}
    assert lines["digits", "accuracy ↑"][1].text == max(means, key=means.get).method
    assert lines["digits", "NLL ↓"][3].marked
    assert not lines["digits", "NLL ↓"][1].marked
    assert lines["concrete", "RMSE ↓"][3].text == "–"


def test_failures_of_several_seeds_are_one_line() -> None:
    table = failure_table(content_of(made.records()))
    assert table is not None
    assert [[line.name, *(cell.text for cell in line.cells)] for line in table.lines] == [
        ["fashion-mlp", "full-bnn", "0, 1, 2", "the library it needs is not installed"]
    ]
    assert failure_table(content_of(made.records(("digits",))[:2])) is None


def test_bins_are_pooled_by_their_examples() -> None:
    rows = [
        Row(
            {},
            reliability={
                "edges": [0, 0.5, 1],
                "confidences": [None, 0.8],
                "accuracies": [None, 0.5],
                "counts": [0, 10],
            },
        ),
        Row(
            {},
            reliability={"edges": [0, 0.5, 1], "confidences": [0.4, 0.9], "accuracies": [0.2, 0.7], "counts": [5, 30]},
        ),
    ]
    bins = pooled_bins(rows)
    assert bins is not None
    assert bins.counts == [5, 40]
    assert bins.confidences == pytest.approx([0.4, (0.8 * 10 + 0.9 * 30) / 40])
    assert bins.accuracies == pytest.approx([0.2, (0.5 * 10 + 0.7 * 30) / 40])
    assert bins.gap == pytest.approx((5 * 0.2 + 10 * 0.3 + 30 * 0.2) / 45)
    other = dataclasses.replace(rows[0], reliability={**rows[0].reliability, "edges": [0, 0.6, 1]})
    assert pooled_bins([rows[1], other]) is None
    assert pooled_bins([Row({})]) is None


def test_entropies_are_shares_with_the_test_data_first() -> None:
    rows = [Row({}, entropies={"edges": [0, 1, 2], "noise": [1, 3], "test": [6, 2]})] * 2
    assert pooled_entropies(rows) == ([0, 1, 2], {"test": [0.75, 0.25], "noise": [0.25, 0.75]})


def test_risks_are_averaged_at_common_coverages() -> None:
    rows = [
        Row({}, risk_coverage={"coverage": [0.1, 1.0], "risk": [0.0, 0.9]}),
        Row({}, risk_coverage={"coverage": [0.5, 1.0], "risk": [0.2, 0.4]}),
    ]
    found = mean_risks(rows)
    assert found is not None
    risks = dict(zip(*found, strict=True))
    assert min(risks) == 0.5
    assert risks[0.5] == pytest.approx((0.4 + 0.2) / 2)
    assert risks[1.0] == pytest.approx((0.9 + 0.4) / 2)
    assert mean_risks(rows[:1]) == ([0.1, 1.0], [0.0, 0.9])


def test_shift_begins_with_the_clean_test_data_and_averages_over_corruptions() -> None:
    curves = {
        "blur": [{"nll": float(step)} for step in range(1, 6)],
        "noise": [{"nll": 3.0 * step} for step in range(1, 6)],
    }
    rows = [Row({"nll": 0.5}, shift=curves)]
    mean, blur = shifted(rows, None, "nll"), shifted(rows, "blur", "nll")
    assert mean is not None
    assert blur is not None
    assert [one.mean for one in mean] == [0.5, 2, 4, 6, 8, 10]
    assert [one.mean for one in blur] == [0.5, 1, 2, 3, 4, 5]
    assert shifted(rows, None, "ece") is None


def test_contradicting_records_are_refused() -> None:
    records = made.records()
    with pytest.raises(InputError, match="none were given"):
        content_of([])
    with pytest.raises(InputError, match="two records are of task 'digits', seed 0, method 'network'"):
        content_of([*records, records[0]])
    with pytest.raises(InputError, match=r"one of classification, regression, but its records say \['ranking'\]"):
        content_of([dataclasses.replace(records[0], kind="ranking")])
    with pytest.raises(InputError, match="several kinds: classification, regression"):
        content_of([records[0], dataclasses.replace(made.regression("digits", 1, "network"))])


def test_rankings_and_claims_are_checked() -> None:
    with pytest.raises(InputError, match=r"name \['c'\], which have no rank"):
        Ranking("NLL", {"a": 1.0, "b": 2.0}, 0.5, [{"a", "c"}], 5)
    with pytest.raises(InputError, match="at least two methods, not 1"):
        Ranking("NLL", {"a": 1.0}, 0.5, [], 5)
    with pytest.raises(InputError, match="rank of 'b' must be a number of at least 1, but it is nan"):
        Ranking("NLL", {"a": 1.0, "b": math.nan}, 0.5, [], 5)
    with pytest.raises(InputError, match=r"must be one of holds, holds in part.*but is 'true'"):
        Claim("It works.", "true", "figures")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a text"):
        Claim(" ", "holds", "figures")
    assert Comparison().mark("task", "nll") == frozenset()
