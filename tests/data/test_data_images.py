"""Encoded images in parquet files and in folders."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from stfbnn.data import load
from stfbnn.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = [2, 0, 1, 2, 0, 1]


def png(pixels: np.ndarray, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_images(path: Path, images, labels=None, struct=True, *, metadata=None, name="label") -> Path:
    data = [png(image) if isinstance(image, np.ndarray) else image for image in images]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.binary()
    columns = {"img": pa.array([{"bytes": item} for item in data] if struct else data, kind)}
    if labels is not None:
        columns[name] = pa.array(labels, None if len(labels) else pa.int64())
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_images(tmp_path, struct):
    write_images(tmp_path / "train-00000-of-00002.parquet", COLOUR[:4], LABELS[:4], struct)
    write_images(tmp_path / "train-00001-of-00002.parquet", COLOUR[4:], LABELS[4:], struct)
    write_images(tmp_path / "test.parquet", COLOUR[:2], LABELS[:2], struct)
    found = load(tmp_path)
    assert (found.kind, found.classes) == ("parquet", ("0", "1", "2"))
    np.testing.assert_array_equal(found.train.stored, COLOUR.transpose(0, 3, 1, 2))
    assert found.train.targets.tolist() == LABELS
    assert found.test.targets.tolist() == LABELS[:2]
    few = load(tmp_path, limit=1)
    assert few.train.targets.tolist() == [2]
    np.testing.assert_array_equal(few.train.stored, found.train.stored[:1])


def test_parquet_many_images_keep_their_order(tmp_path):
    # More than the threads have in hand at once, and more than one batch of rows.
    values = np.arange(1500)
    pixels = np.stack([values // 256, values % 256, values * 0], -1).astype(np.uint8)[:, None, None]
    found = load(write_images(tmp_path / "a.parquet", list(pixels), values % 7), limit=1400)
    np.testing.assert_array_equal(found.train.stored[:, :, 0, 0], pixels[:1400, 0, 0])
    assert found.train.targets.tolist() == (values[:1400] % 7).tolist()


def test_parquet_names_of_classes(tmp_path):
    metadata = {"info": {"features": {"label": {"names": ["ape", "bee", "cat", "dog"], "_type": "ClassLabel"}}}}
    path = write_images(tmp_path / "train.parquet", COLOUR, LABELS, metadata=metadata)
    # The classes are the listed ones, also those that do not occur.
    found = load(path)
    assert found.classes == ("ape", "bee", "cat", "dog")
    assert found.train.targets.tolist() == LABELS
    write_images(path, COLOUR, [0, 1, 2, 3, 4, 0], metadata=metadata)
    with pytest.raises(DataError, match="labels '4', but the names of 4 classes"):
        load(path)
    write_images(path, COLOUR, LABELS, metadata={"info": None})
    assert load(path).classes == ("0", "1", "2")


def test_parquet_unlabelled_and_other_names(tmp_path):
    assert load(write_images(tmp_path / "a.parquet", COLOUR)).task == "unlabelled"
    path = write_images(tmp_path / "b.parquet", COLOUR, list("abcabc"), name="fine_label")
    with pytest.raises(DataError, match=r"fine_label.*target="):
        load(path)
    assert load(path, target="fine_label").classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([*COLOUR[:2], None], "no bytes for the image in row 3"),
        ([*COLOUR[:2], b""], "row 3"),
        ([*COLOUR[:2], b"no image"], "row 3 cannot be read as an image"),
        ([*COLOUR[:2], png(COLOUR[2])[:-30]], "row 3 is damaged"),
        ([*COLOUR[:2], COLOUR[2, :3]], "row 3 is 3x5 pixels.*are 4x5.*image_size"),
        ([*COLOUR[:2], np.zeros((4, 5), np.uint16)], "more than 8 bits"),
        ([], "empty"),
    ],
)
def test_parquet_images_refused(tmp_path, images, said):
    path = write_images(tmp_path / "a.parquet", images, [0] * len(images))
    with pytest.raises(DataError, match=said):
        load(path)


def test_resize_is_asked_for(tmp_path):
    images = [COLOUR[0], COLOUR[1, :3]]
    found = load(write_images(tmp_path / "a.parquet", images, [0, 1]), image_size=(2, 7))
    assert found.input_shape == (3, 2, 7)
    for index, image in enumerate(images):
        expected = np.asarray(Image.fromarray(image).resize((7, 2), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(found.train.stored[index], expected.transpose(2, 0, 1))
    assert load(tmp_path, image_size=8).input_shape == (3, 8, 8)


def test_modes(tmp_path):
    grey = COLOUR[0, :, :, 0]
    transparent = np.dstack([COLOUR[1], np.full((4, 5), 7, np.uint8)])
    palette = io.BytesIO()
    Image.fromarray(COLOUR[2]).quantize(256).save(palette, "png", transparency=bytes(range(256)))
    both = load(write_images(tmp_path / "a.parquet", [grey, transparent, palette.getvalue()], [0, 1, 1])).train.stored
    np.testing.assert_array_equal(both[0], np.repeat(grey[None], 3, 0))
    np.testing.assert_array_equal(both[1], COLOUR[1].transpose(2, 0, 1))
    assert both.shape == (3, 3, 4, 5)
    assert load(write_images(tmp_path / "a.parquet", [grey, grey], [0, 1])).input_shape == (1, 4, 5)


def test_parquet_table(tmp_path):
    columns = {"a": [1, 2, 3, 4], "b": [0.5, 1.5, 2.5, 3.5], "c": [True, False, True, False], "z": [0.1, 0.2, 0.3, 0.4]}
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table(columns), path)
    found = load(path)
    assert found.train.inputs.tolist() == [[1, 0.5, 1], [2, 1.5, 0], [3, 2.5, 1], [4, 3.5, 0]]
    np.testing.assert_allclose(found.train.targets, columns["z"])
    assert load(path, target="c").classes == ("0", "1")
    pq.write_table(pa.table({key: columns[key][:2] for key in "abc"}), tmp_path / "test.parquet")
    assert load(tmp_path).test.targets is None
    pq.write_table(pa.table({key: columns[key][:2] for key in "abz"}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"lacks the columns \['c'\]"):
        load(tmp_path)
    pq.write_table(pa.table({"a": ["1"], "b": [1], "c": [0]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet has the column 'a' of the type string, unlike train\.parquet"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"a": [1, None], "y": [0, 1]}, "1 missing values in column 'a', the first in row 2"),
        ({"a": [1, 2], "y": [None, 1]}, "missing values in column 'y', the first in row 1"),
        ({"a": ["x", "y"], "y": [0, 1]}, "column 'a' of the type string"),
        ({"a": [1, 2]}, "at least one input"),
        ({"a": [1.0, float("nan")], "y": [0, 1]}, "row 2, column 'a'"),
        ({"a": [1, 2], "y": [[1], [2]]}, "type list"),
        ({"a": [b"1"], "b": [b"1"]}, "several columns of images"),
    ],
)
def test_parquet_table_refused(tmp_path, columns, said):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=said):
        load(tmp_path / "a.parquet")


def test_parquet_texts_as_target(tmp_path):
    labels = pa.array(["b", "a", "b"]).dictionary_encode()
    pq.write_table(pa.table({"a": [1, 2, 3], "label": labels}), tmp_path / "a.parquet")
    found = load(tmp_path)
    assert found.classes == ("a", "b")
    assert found.train.targets.tolist() == [1, 0, 1]


def test_parquet_damage(tmp_path):
    path = write_images(tmp_path / "a.parquet", COLOUR, LABELS)
    whole = path.read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cannot be read as parquet"):
            load(path)


@pytest.mark.parametrize("module", ["pyarrow.parquet", "PIL.Image"])
def test_missing_extra_is_named(tmp_path, monkeypatch, module):
    path = write_images(tmp_path / "a.parquet", COLOUR, LABELS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'stfbnn\[data\]'"):
        load(path)


def test_cache_is_used_renewed_and_keyed(tmp_path):
    path, cache = write_images(tmp_path / "a.parquet", COLOUR, LABELS), tmp_path / "cache"
    first = load(path, cache_dir=cache)
    (kept,) = cache.iterdir()
    # Other pixels put into the cache come out of it: nothing was decoded.
    changed = np.zeros_like(first.train.stored.numpy())
    np.savez(kept, images=changed)
    assert not load(path, cache_dir=cache).train.stored.any()
    kept.write_bytes(kept.read_bytes()[:40])
    np.testing.assert_array_equal(load(path, cache_dir=cache).train.stored, first.train.stored)
    assert load(path, cache_dir=cache, image_size=3).input_shape == (3, 3, 3)
    assert load(path, cache_dir=cache, limit=2).train.stored.shape[0] == 2
    write_images(path, COLOUR[::-1], LABELS)
    np.testing.assert_array_equal(
        load(path, cache_dir=cache).train.stored, COLOUR[::-1].transpose(0, 3, 1, 2)
    )  # fmt: skip
    assert len(list(cache.iterdir())) == 4


def write_folder(root: Path, classes=("cat", "bee"), count=3, part="") -> Path:
    for place, name in enumerate(classes):
        folder = root / part / name
        folder.mkdir(parents=True)
        for index in range(count):
            (folder / f"{index}.png").write_bytes(png(COLOUR[(place * 3 + index) % 6]))
    return root


def test_image_folder(tmp_path):
    write_folder(tmp_path, part="train")
    write_folder(tmp_path, ("cat",), 1, part="val")
    (tmp_path / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "train" / ".hidden").mkdir()
    found = load(tmp_path)
    assert (found.kind, found.task, found.classes) == ("image-folder", "classification", ("bee", "cat"))
    assert found.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(found.train.stored, COLOUR[[3, 4, 5, 0, 1, 2]].transpose(0, 3, 1, 2))
    assert found.test.targets.tolist() == [1]
    # Spread over the classes, not all of the first.
    few = load(tmp_path, limit=2)
    assert few.train.targets.tolist() == [0, 1]
    assert few.classes == ("bee", "cat")


def test_image_folder_without_parts_or_labels(tmp_path):
    assert load(write_folder(tmp_path / "a")).test is None
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "x.jpg").write_bytes(png(COLOUR[0], "jpeg"))
    found = load(tmp_path / "flat")
    assert (found.task, found.classes, len(found.train)) == ("unlabelled", None, 1)


def test_image_folder_errors(tmp_path):
    root = write_folder(tmp_path / "set", part="train")
    write_folder(root, ("dog",), 1, part="test")
    with pytest.raises(DataError, match=r"classes \['dog'\].*bee/, cat/"):
        load(root)
    (root / "test" / "dog").rename(root / "test" / "cat")
    (root / "train" / "ant").mkdir()
    with pytest.raises(DataError, match="ant has no images"):
        load(root)
    (root / "train" / "ant").rmdir()
    loose = root / "train" / "x.png"
    loose.write_bytes(png(COLOUR[0]))
    with pytest.raises(DataError, match=r"x\.png beside the folders"):
        load(root)
    loose.unlink()
    odd = root / "train" / "cat" / "odd.png"
    odd.write_bytes(png(COLOUR[0, :2]))
    with pytest.raises(DataError, match=r"odd\.png is 2x5.*image_size"):
        load(root)
    assert load(root, image_size=4).input_shape == (3, 4, 4)
    odd.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"odd\.png cannot be read"):
        load(root)
    odd.write_bytes(png(COLOUR[0])[:-30])
    with pytest.raises(DataError, match=r"odd\.png is damaged"):
        load(root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        load(tmp_path / "empty", "image-folder")


def test_image_folder_cache(tmp_path):
    root = write_folder(tmp_path / "set")
    first = load(root, cache_dir=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    assert (load(root, cache_dir=tmp_path / "cache").train.stored == first.train.stored).all()
    with np.load(kept) as archive:
        np.testing.assert_array_equal(archive["images"], first.train.stored)
