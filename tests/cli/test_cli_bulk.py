"""``stfbnn predict-shards``: what it writes is what ``stfbnn predict`` writes, whatever the form of the data."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import run
from stfbnn.data import load as load_data

SMALL = ["--model-args", '{"hidden": 8}', "--device", "cpu"]


def bulk(*arguments, code=0):
    return run("predict-shards", *arguments, code=code)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bulk") / "run"
    run("train", "--data", "digits", "-o", folder, "--epochs", 2, *SMALL)
    run("fit", folder, "--epochs", 1, "--temperature", 0.3, "--samples", 2)
    return folder


@pytest.fixture(scope="module")
def images():
    # The pixels as they are stored, before any normalisation.
    return load_data("digits").test.stored.numpy()


@pytest.fixture(scope="module")
def expected(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("expected") / "p.npz"
    run("predict", fitted, "-o", path, "--samples", 3, "--seed", 5)
    with np.load(path) as file:
        return dict(file)


def rows_of(folder):
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("shard-*.parquet"))])


def test_parquet_files_of_flat_lists_give_what_predict_gives(fitted, images, expected, tmp_path):
    (tmp_path / "in").mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(images)), 3)):
        flat = images[part].reshape(len(part), -1).astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
        table = pa.table({"id": part, "pixels": list(flat), "label": np.zeros(len(part))})
        pq.write_table(table, tmp_path / "in" / f"{number}.parquet")
    arguments = ["--data", tmp_path / "in", "-o", tmp_path / "out", "--keep", "id=number", "--target", "label"]
    arguments += ["--samples", 3, "--seed", 5, "--rows-per-file", 100]
    said = json.loads(bulk(fitted, *arguments, "--json").stdout)
    assert (said["rows"], said["missing"], said["skipped"]) == (len(images), [], [])
    table = rows_of(tmp_path / "out")
    assert table.column("number").to_pylist() == list(range(len(images)))
    probs = np.array(table.column("probs").to_pylist())
    np.testing.assert_allclose(probs[:, 3], expected["probability_3"], atol=1e-6)
    np.testing.assert_allclose(table.column("epistemic"), expected["epistemic"], atol=1e-6)
    assert "0 rows were predicted" in bulk(fitted, *arguments).stdout
    refused = bulk(fitted, *arguments, "--seed", 6, code=1).stderr
    assert refused.startswith("error:")
    assert "seed (5 there, 6 now)" in refused


def test_tar_files_give_what_predict_gives_and_a_damaged_one_is_told(fitted, images, expected, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "in" / f"{number}.tar", "w") as archive:
            for index in range(20 * number, 20 * number + 20):
                stream = io.BytesIO()
                np.save(stream, images[index].astype(np.float32) / (255 if images.dtype == np.uint8 else 1))
                info = tarfile.TarInfo(f"{index:04d}.npy")
                info.size = stream.tell()
                stream.seek(0)
                archive.addfile(info, stream)
    damaged = tmp_path / "in" / "1.tar"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    arguments = ["--data", tmp_path / "in", "-o", tmp_path / "out", "--keep", "__key__", "--samples", 3, "--seed", 5]
    assert "1.tar" in bulk(fitted, *arguments, code=1).stderr
    result = bulk(fitted, *arguments, "--on-error", "skip")
    assert "warning: 1.tar was left out" in result.stderr
    assert "not finished yet: 1.tar" in result.stdout
    table = rows_of(tmp_path / "out")
    assert table.column("__key__").to_pylist() == [f"{index:04d}" for index in range(20)]
    np.testing.assert_allclose(table.column("entropy"), expected["entropy"][:20], atol=1e-6)


def test_wrong_options_end_in_one_line(fitted, tmp_path):
    arguments = [fitted, "--data", tmp_path, "-o", tmp_path / "out"]
    assert "no file that ends in .parquet" in bulk(*arguments, code=1).stderr
    assert "--on-error must be raise or skip" in bulk(*arguments, "--on-error", "stop", code=1).stderr
    assert "--keep takes COLUMN" in bulk(*arguments, "--keep", "a=", code=1).stderr
