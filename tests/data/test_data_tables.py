"""CSV files and the folders of fixed splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stfbnn.data import load
from stfbnn.errors import DataError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " "])
def test_delimiters(tmp_path, delimiter):
    lines = ["a,b,z", "1,2.5,0.1", "-3,4e1,0.2", "", "5,6,0.7"]
    path = write(tmp_path / "t.csv", "\n".join(lines).replace(",", delimiter) + "\n")
    found = load(path)
    assert found.train.inputs.tolist() == [[1, 2.5], [-3, 40], [5, 6]]
    torch.testing.assert_close(found.train.targets, torch.tensor([0.1, 0.2, 0.7]))
    assert (found.kind, found.task, found.test) == ("csv", "regression", None)


def test_target_by_name(tmp_path):
    path = write(tmp_path / "t.csv", "\ufeffLabel,a,b\r\nyes,1,2\r\nno,3,4\r\n")
    found = load(path)
    assert found.train.inputs.tolist() == [[1, 2], [3, 4]]
    assert found.classes == ("no", "yes")
    assert found.train.targets.tolist() == [1, 0]
    with pytest.raises(DataError, match="text 'yes' in line 2, column 'Label'"):
        load(path, target="b")
    with pytest.raises(DataError, match="no column 'c'; it has 'Label', 'a', 'b'"):
        load(path, target="c")
    number = write(tmp_path / "n.csv", "y,a,b\n1,1.5,2\n2,2.5,4\n")
    assert load(number, target="a").train.targets.tolist() == [1.5, 2.5]


def test_quotes_and_blanks(tmp_path):
    path = write(tmp_path / "t.csv", '"sepal, length", "b",label\n1, 2,"a, b"\n"3",4,c\n')
    found = load(path)
    assert found.train.inputs.tolist() == [[1, 2], [3, 4]]
    assert found.classes == ("a, b", "c")


def test_folder(tmp_path):
    write(tmp_path / "train.csv", "a,b,label\n" + "1,2,0\n3,4,1\n" * 3)
    write(tmp_path / "sample_submission.csv", "id,label\n1,0\n")
    test = write(tmp_path / "test.csv", "a,b,label\n1,2,1\n")
    assert load(tmp_path).test.targets.tolist() == [1]
    write(test, "a,b\n1,2\n")
    assert load(tmp_path).test.targets is None
    write(test, "b,a,label\n1,2,1\n")
    with pytest.raises(DataError, match=r"\['b', 'a'\].*\['a', 'b'\]"):
        load(tmp_path)
    write(test, "a,b,label\n1,2,7\n")
    with pytest.raises(DataError, match="'7', but the training part has only '0', '1'"):
        load(tmp_path)


def test_folder_without_known_names(tmp_path):
    write(tmp_path / "one.csv", "a,b\n1,2\n3,4\n")
    assert len(load(tmp_path).train) == 2
    write(tmp_path / "two.csv", "a,b\n1,2\n3,4\n")
    with pytest.raises(DataError, match=r"one\.csv, two\.csv"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("a,b\n", "empty; at least one"),
        ("a\n1\n", "one column only"),
        ("1,2\n3,4\n", "first line that names"),
        (",a,b\n0,1,2\n", "no name for column 1"),
        ("a,a,b\n0,1,2\n", "several columns called 'a'"),
        ("label,y,b\n0,1,2\n", "several columns that may be the target"),
        ("a,b,c\n1,2,3\n1,2\n", "2 columns in line 3, but 3"),
        ("a,b,c\n1,2,3\n\n1,2,3,4\n", "4 columns in line 4"),
        ("a,b,c\n1,Paris,3\n", "text 'Paris' in line 2, column 'b'"),
        ("a,b,c\n1,,3\n", "no value in line 2, column 'b'"),
        ("a,b,c\n1,2,\n", "no target in line 2"),
        ("a,b,c\n1,2,3\nnan,2,3\n", "row 2, column 'a'"),
        ("a,b,c\n1,inf,3\n", "row 1, column 'b'"),
        ("a,b,c\n1,2,nan\n", "target of .* NaN"),
        ('a,b,c\n1,2,"3\n', "unexpected end"),
    ],
)
def test_refused(tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        load(write(tmp_path / "t.csv", text))


def test_encoding(tmp_path):
    with pytest.raises(DataError, match="UTF-8"):
        load(write(tmp_path / "t.csv", "größe,b\n1,2\n", encoding="latin-1"))


def test_tsv_of_texts_is_refused_for_its_text(tmp_path):
    with pytest.raises(DataError, match="text 'so good' in line 2, column 'sentence'"):
        load(write(tmp_path / "t.tsv", "sentence\tlabel\nso good\t1\nso bad, very bad\t0\n"))


TABLE = np.arange(24.0).reshape(6, 4)


def write_uci(folder: Path, **changes: str) -> Path:
    files = {
        "data": "\n".join("  ".join(f"{value:.2f}" for value in row) for row in TABLE) + "\n\n",
        "index_features": "0\n1\n2\n",
        "index_target": "3\n",
        "index_train_0": "5\n0\n1\n2\n",
        "index_test_0": "3\n4\n",
        "index_train_1": "0\n1\n",
        "index_test_1": "2.0e+00\n",
    }
    for name, text in (files | changes).items():
        write(folder / f"{name}.txt", text)
    return folder


def test_uci(tmp_path):
    found = load(write_uci(tmp_path))
    assert (found.kind, found.task) == ("uci", "regression")
    np.testing.assert_array_equal(found.train.inputs, TABLE[[5, 0, 1, 2], :3])
    assert found.train.targets.tolist() == TABLE[[5, 0, 1, 2], 3].tolist()
    assert found.test.targets.tolist() == [15, 19]
    second = load(tmp_path, split=1)
    assert second.test.inputs.tolist() == [TABLE[2, :3].tolist()]
    np.testing.assert_allclose(second.mean, TABLE[:2, :3].mean(0))
    write(tmp_path / "index_test_1.txt", "0\n")
    write(tmp_path / "index_train_1.txt", "1\n2\n")
    with pytest.raises(DataError, match="'3', but the training part has only '7', '11'"):
        load(tmp_path, split=1, task="classification")
    with pytest.raises(DataError, match="no split 2; it has 0, 1"):
        load(tmp_path, split=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"index_test_0": "2\n"}, "1 rows are in both"),
        ({"index_test_0": "6\n"}, "names the rows 6 to 6, but there are 6"),
        ({"index_test_0": "-1\n"}, "-1"),
        ({"index_test_0": "3\n3\n"}, "twice"),
        ({"index_test_0": "1.5\n"}, "whole numbers"),
        ({"index_test_0": "nan\n"}, "whole numbers"),
        ({"index_test_0": ""}, "empty"),
        ({"index_target": "2\n"}, "as a feature and as target"),
        ({"index_target": "4\n"}, "columns"),
        ({"data": "1 2 3 4\n1 2 3\n"}, "no table"),
        ({"data": "a b\n"}, "no table"),
        ({"data": "1 2 nan 4\n" * 6}, "row 1, column 3"),
    ],
)
def test_uci_refused(tmp_path, changes, said):
    with pytest.raises(DataError, match=said):
        load(write_uci(tmp_path, **changes))


def test_uci_missing_file(tmp_path):
    write_uci(tmp_path)
    (tmp_path / "index_test_0.txt").unlink()
    with pytest.raises(DataError, match=r"index_test_0\.txt is missing"):
        load(tmp_path)
