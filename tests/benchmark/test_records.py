"""Records on disk: what was written is read, and what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from made_records import record

from stfbnn.benchmark.records import Row, load_record, load_records, record_path, succeeded
from stfbnn.errors import DataError


@pytest.mark.parametrize("one", [record(scaled=0.4), record(failed="no such package"), record(kind="regression")])
def test_a_record_is_read_as_it_was_written(tmp_path: Path, one: object) -> None:
    path = one.save(tmp_path)
    assert path == record_path(tmp_path, one.task, one.seed, one.method)
    assert load_record(path) == one


def test_what_json_has_no_number_for_becomes_none(tmp_path: Path) -> None:
    one = dataclasses.replace(record(), raw=Row({"nll": math.inf, "ece": math.nan, "accuracy": 0.5}))
    found = load_record(one.save(tmp_path))
    assert found.raw is not None
    assert found.raw.metrics == {"nll": None, "ece": None, "accuracy": 0.5}


def test_all_records_of_a_folder_come_in_order(tmp_path: Path) -> None:
    made = [record("b", seed=1), record("a", seed=1), record("b", seed=0), record("a", "adult", 7)]
    for one in made:
        one.save(tmp_path)
    order = [(one.task, one.seed, one.method) for one in load_records(tmp_path)]
    assert order == [("adult", 7, "a"), ("digits", 0, "b"), ("digits", 1, "a"), ("digits", 1, "b")]


def test_failed_records_have_no_figures() -> None:
    assert [one.method for one in succeeded([record("a"), record("b", failed="it broke")])] == ["a"]


@pytest.mark.parametrize("damage", ["", "{}", '{"schema": 1}', '{"schema": 2}', "[1]", "null"])
def test_a_damaged_record_is_named(tmp_path: Path, damage: str) -> None:
    path = record().save(tmp_path)
    path.write_text(damage)
    with pytest.raises(DataError, match=r"network\.json"):
        load_records(tmp_path)


def test_an_unknown_entry_is_refused(tmp_path: Path) -> None:
    path = record().save(tmp_path)
    content = json.loads(path.read_text())
    content["cost"]["colour"] = "blue"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="colour"):
        load_record(path)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no records"):
        load_records(tmp_path)
