"""The idx format: round trips, and damage that never loads."""

from __future__ import annotations

import gzip
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stfbnn.data import load
from stfbnn.data.idx import read_file
from stfbnn.errors import DataError

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx_bytes(array: np.ndarray) -> bytes:
    code = CODES[array.dtype.str[1:]]
    head = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_set(folder: Path, train: int = 6, test: int = 2, zipped: bool = True, dotted: bool = False) -> Path:
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        arrays = {
            "images-idx3": rng.integers(0, 256, (count, 4, 5), dtype=np.uint8),
            "labels-idx1": (np.arange(count) % 2).astype(np.uint8),
        }
        for what, array in arrays.items():
            stem = f"{name}-{what.replace('-idx', '.idx') if dotted else what}-ubyte"
            data = idx_bytes(array)
            (folder / (stem + ".gz" * zipped)).write_bytes(gzip.compress(data, 1) if zipped else data)
    return folder


ARRAYS = st.sampled_from(sorted(CODES)).flatmap(
    lambda code: hnp.arrays(np.dtype(code), hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
)


@settings(max_examples=50, deadline=None)
@given(ARRAYS, st.booleans())
def test_round_trip(array, zipped):
    data = idx_bytes(array)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(gzip.compress(data) if zipped else data)
        found = read_file(path)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@settings(max_examples=100, deadline=None)
@given(ARRAYS, st.booleans(), st.data())
def test_truncation_at_any_byte_is_seen(array, zipped, data):
    whole = gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="file"):
            read_file(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_of_one_file(tmp_path, zipped):
    whole = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))
    whole = gzip.compress(whole) if zipped else whole
    path = tmp_path / "file"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            read_file(path)
    path.write_bytes(whole)
    assert read_file(path).shape == (3, 4)


def test_damage_inside_gzip_is_seen(tmp_path):
    data = bytearray(gzip.compress(idx_bytes(np.zeros((50, 4), np.uint8)), 0))
    data[-20] ^= 1  # stored, not packed: only the check sum can tell
    path = tmp_path / "file.gz"
    path.write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        read_file(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "starts with nothing"),
        (b"\x89PNG....", "no idx file"),
        (b"\0\0\x0a\x01\0\0\0\x01\0", "no idx file"),
        (b"\0\0\x08\x00", "no idx file"),
        (b"\0\0\x08\x03\0\0", "cut short"),
        (b"\0\0\x08\x01\0\0\0\x02\0\0\0", "holds more"),
        (b"\0\0\x08\x04" + b"\xff" * 16 + b"\0", "only 1"),
    ],
)
def test_refused_files(tmp_path, data, said):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(DataError, match=said):
        read_file(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dotted", [True, False])
def test_folder(tmp_path, zipped, dotted):
    found = load(write_set(tmp_path, zipped=zipped, dotted=dotted), show_progress=False)
    assert found.kind == "idx"
    assert found.input_shape == (1, 4, 5)
    assert (len(found.train), len(found.test)) == (6, 2)
    assert found.train.targets.tolist() == [0, 1] * 3
    assert found.train.stored.flatten().tolist() == np.random.default_rng(0).integers(
        0, 256, 120, dtype=np.uint8
    ).tolist()  # fmt: skip


def test_one_part_alone_is_the_training_part(tmp_path):
    write_set(tmp_path, zipped=False)
    for path in tmp_path.glob("train*"):
        path.unlink()
    found = load(tmp_path)
    assert (len(found.train), found.test) == (2, None)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert load(tmp_path).task == "unlabelled"


def test_folder_errors(tmp_path):
    write_set(tmp_path, zipped=False)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match=r"6 images.*5 labels"):
        load(tmp_path)
    labels.write_bytes(idx_bytes(np.zeros((6, 1), np.uint8)))
    with pytest.raises(DataError, match="labels have 1"):
        load(tmp_path)
    labels.write_bytes(good)
    pixels = images.read_bytes()
    images.write_bytes(good)
    with pytest.raises(DataError, match="images have 3"):
        load(tmp_path)
    images.write_bytes(idx_bytes(np.zeros((0, 4, 5), np.uint8)))
    labels.write_bytes(idx_bytes(np.zeros(0, np.uint8)))
    with pytest.raises(DataError, match="empty"):
        load(tmp_path)
    images.write_bytes(pixels)
    images.unlink()
    with pytest.raises(DataError, match=r"without its images.*train-images-idx3-ubyte\.gz"):
        load(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"none of train-images.*found nothing"):
        load(empty, "idx")
