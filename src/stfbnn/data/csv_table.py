"""Tables in text: a header, then numbers, with the target in one column."""

from __future__ import annotations

import csv
from array import array
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TextIO

import numpy as np

from stfbnn.data.assembly import DataSet, assemble
from stfbnn.data.source import (
    Array,
    Options,
    Part,
    as_classes_or_numbers,
    check_finite,
    choose_target,
    find_parts,
    only_file,
)
from stfbnn.errors import DataError

SUFFIXES = (".csv", ".tsv")
_DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_LINES = 20


@dataclass(frozen=True)
class Table:
    """One file: the names of its columns without the target, their values (rows, columns), and the target's (rows,)."""

    columns: list[str]
    values: Array
    targets: Array | None


def read(path: Path, options: Options) -> DataSet:
    """Read one file, or the files ``train*.csv`` and ``test*.csv`` of a folder (``.tsv`` likewise).

    The first line names the columns. The target is the column ``options.target``, else the one called label, target,
    class or y, else the last. The test file may lack it. The delimiter (comma, semicolon, tab, bar or blank) is found
    from the first lines.

    Raises:
        DataError: A file is damaged, has no header, has text or gaps in a column, or the files' columns differ.
    """
    train_files, test_files = find_parts(path, SUFFIXES) if path.is_dir() else ([path], [])
    train_file = only_file(train_files, "training")
    header = read_header(train_file)
    target = choose_target(header, options.target, str(train_file))
    train = read_table(train_file, target)
    test: Part | None = None
    if test_files:
        test_file = only_file(test_files, "test")
        found = read_table(test_file, target if target in read_header(test_file) else None)
        if found.columns != train.columns:
            raise DataError(
                f"{test_file} has the columns {found.columns}, but {train_file.name} has {train.columns} "
                f"(the target {target!r} aside); both need the same in the same order"
            )
        test = Part(found.values, found.targets, str(test_file))
    return assemble("csv", Part(train.values, train.targets, str(train_file)), test, options, columns=train.columns)


def _delimiter(path: Path) -> str:
    lines: list[str] = []
    with _open(path) as stream:
        for line in stream:
            if line.strip():
                lines.append(line)
            if len(lines) == _SAMPLE_LINES:
                break
    if not lines:
        raise DataError(f"{path} is empty; a header line and data lines are expected")
    best, most = "", 1
    # A blank is only believed where nothing else divides the lines: names and texts are full of blanks.
    for delimiter in _DELIMITERS if path.suffix.lower() != ".tsv" else ("\t",):
        # The count that every line reaches: commas in numbers such as 1,5 are not in all of them.
        count = min(len(row) for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
        if count > most:
            best, most = delimiter, count
    if not best and all(" " in line.strip() for line in lines):
        best = " "
    if not best:
        raise DataError(
            f"{path} has one column only; at least one input and the target are expected, parted by comma, semicolon, "
            f"tab, bar or blank"
        )
    return best


def read_header(path: Path) -> list[str]:
    """The names of the columns, from the first line.

    Raises:
        DataError: It cannot be read, holds numbers, or names a column twice or not at all.
    """
    try:
        delimiter = _delimiter(path)
        with _open(path) as stream:
            names = next(row for row in csv.reader(stream, delimiter=delimiter, skipinitialspace=True) if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}") from error
    names = [name.strip() for name in names]
    if all(_is_number(name) for name in names):
        raise DataError(
            f"{path} starts with the numbers {', '.join(names[:4])}; add a first line that names the columns"
        )
    if "" in names:
        raise DataError(
            f"{path} has no name for column {names.index('') + 1} (a row index that was saved along?); name it, or "
            f"leave it out"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path} has several columns called {', '.join(map(repr, twice))}; give each its own name")
    return names


def read_table(path: Path, target: str | None) -> Table:
    """All rows, with the column ``target`` apart from the others; None where there is no target.

    Raises:
        DataError: A value is not a finite number, or a row has another length; names the line and the column.
    """
    names = read_header(path)
    place = None if target is None else names.index(target)
    columns = [name for name in names if name != target]
    numbers = array("d")
    labels: list[str] = []
    count = 0
    try:
        with _open(path) as stream:
            rows = csv.reader(stream, delimiter=_delimiter(path), skipinitialspace=True, strict=True)
            next(row for row in rows if row)
            for row in rows:
                if not row:
                    continue
                count += 1
                if len(row) != len(names):
                    raise DataError(
                        f"{path} has {len(row)} columns in line {rows.line_num}, but {len(names)} in its header"
                    )
                if place is not None:
                    labels.append(_label(row.pop(place), path, rows.line_num, target))
                try:
                    numbers.extend(map(float, row))
                except ValueError:
                    raise _bad_cell(row, columns, path, rows.line_num) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}") from error
    values = np.array(numbers, dtype=np.float64).reshape(count, len(columns))
    check_finite(values, str(path), columns)
    return Table(columns, values, None if target is None else as_classes_or_numbers(labels))


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")


def _label(text: str, path: Path, line: int, target: str | None) -> str:
    if not text.strip():
        raise DataError(f"{path} has no target in line {line} (column {target!r}); fill it in or drop the line")
    return text


def _bad_cell(row: list[str], columns: list[str], path: Path, line: int) -> DataError:
    cell, name = next(
        (cell, shorten(name, 40)) for name, cell in zip(columns, row, strict=True) if not _is_number(cell)
    )
    if not cell.strip():
        return DataError(f"{path} has no value in line {line}, column {name!r}; fill it in or drop the line")
    return DataError(
        f"{path} has the text {shorten(cell, 40)!r} in line {line}, column {name!r}; inputs must be numbers: "
        f"encode or drop the column, or name the target with target= if this is it"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
