"""What a table says and marks, in its three forms."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from stfbnn.errors import InputError
from stfbnn.evaluation import ClassificationMetrics, OODMetrics
from stfbnn.report import Column, Comparison, compare, known_column

MAP = ClassificationMetrics(100, 0.91, 0.4, 0.15, 0.05, 0.05, 0.01)
OURS = ClassificationMetrics(100, 0.90, 0.3, 0.14, 0.01, 0.06, 0.01)


def printed(comparison: Comparison) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=160, color_system=None).print(comparison.table())
    return out.getvalue().splitlines()


def best(comparison: Comparison) -> dict[str, list[str]]:
    return comparison.as_dict()["best"]


def test_marks_the_best_of_each_column() -> None:
    assert best(compare({"MAP": MAP, "ours": OURS})) == {
        "count": [],
        "accuracy": ["MAP"],
        "nll": ["ours"],
        "brier": ["ours"],
        "ece": ["ours"],
        "adaptive_ece": ["MAP"],
        "classwise_ece": ["MAP", "ours"],
    }


def test_equal_to_the_eye_is_equally_good() -> None:
    rows = {"a": {"nll": 0.123449}, "b": {"nll": 0.123401}, "c": {"nll": 0.1236}}
    assert best(compare(rows)) == {"nll": ["a", "b"]}


def test_nearest_to_a_target() -> None:
    rows = {
        "a": {"coverage_90": 0.88},
        "b": {"coverage_90": 0.92},
        "c": {"coverage_90": 0.99},
        "d": {"coverage_90": None},
    }
    comparison = compare(rows)
    assert comparison.columns[0].head == "coverage 90 % → 0.9"
    assert best(comparison) == {"coverage_90": ["a", "b"]}


@pytest.mark.parametrize("worst", [math.nan, math.inf, None])
def test_undefined_values_never_win(worst: float | None) -> None:
    assert best(compare({"a": {"nll": worst}, "b": {"nll": 2.0}, "c": {"nll": 3.0}})) == {"nll": ["b"]}
    assert best(compare({"a": {"nll": math.nan}, "b": {"nll": 2.0}})) == {"nll": []}


def test_terminal_table() -> None:
    lines = printed(compare({"MAP [red]": MAP, "ours": OURS}, title="Fashion [bold]"))
    assert "Fashion [bold]" in lines[0]
    assert "examples" in lines[2]
    assert "accuracy ↑" in lines[2]
    row = next(line for line in lines if "MAP" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "MAP [red]",
        "100",
        "0.9100*",
        "0.4000",
        "0.1500",
        "0.0500",
        "0.0500*",
        "0.0100*",
    ]
    assert "* best in its column" in lines[-1]
    assert not any("*" in line for line in printed(compare({"MAP": MAP})))


def test_markdown() -> None:
    rows = {"a|b": {"auroc": 0.9, "note": 1234.5}, "c": OODMetrics(0.95, 0.5, 0.25)}
    columns = (known_column("auroc"), Column("note", "my\nnote", digits=1))
    assert compare(rows, columns, title="OOD").markdown() == (
        "**OOD**\n\n"
        "| method | AUROC ↑ | my note |\n"
        "| --- | ---: | ---: |\n"
        "| a\\|b | 0.9000 | 1,234.5 |\n"
        "| c | **0.9500** | – |\n"
    )


def test_json_form_survives_strict_json() -> None:
    comparison = compare({"a": {"nll": math.inf, "ece": math.nan, "x": None}, "b": {"nll": 0.123456789}})
    assert json.loads(json.dumps(comparison.as_dict(), allow_nan=False))["rows"] == {
        "a": {"nll": "inf", "ece": "nan", "x": None},
        "b": {"nll": 0.123456789, "ece": None, "x": None},
    }


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ({}, None, "at least one method"),
        ({"a": 3}, None, "figures of 'a' must be a metrics dataclass or a mapping, but are a int"),
        ({"a": {"nll": "low"}}, None, "figure 'nll' of 'a' must be a number or None, but is 'low'"),
        ({"a": {"nll": 1}}, (Column("ece", "ECE"),), "no method has the figure 'ece'; those given have nll"),
    ],
)
def test_bad_input(rows: dict, columns: tuple[Column, ...] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(rows, columns)


def test_unknown_column() -> None:
    with pytest.raises(InputError, match="unknown figure 'f1'; known are count, accuracy"):
        known_column("f1")


def test_unknown_direction() -> None:
    with pytest.raises(InputError, match=r"best must be 'higher', 'lower'.*'smaller'"):
        Column("nll", "NLL", "smaller")
