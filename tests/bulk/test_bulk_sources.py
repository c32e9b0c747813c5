"""Sources: each kind gives its rows in order, as often as it is opened, and says which shard is damaged."""

import gzip
import io
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bulk_cases import IDS, HubDataset, X, npy, parquet_folder, tar_file, vector_samples
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from stfbnn.bulk import HuggingFaceSource, IterableSource, Normalise, ParquetSource, TarSource
from stfbnn.bulk.recognise import as_source
from stfbnn.errors import DataError, InputError


def read(source, keep=(), batch_size=4):
    """All rows of a source: inputs joined, kept columns as lists."""
    batches = [batch for name in source.shards() for batch in source.open(name, keep, batch_size)]
    assert all(len(batch) <= batch_size for batch in batches)
    kept = {name: [pa.scalar(v).as_py() for b in batches for v in b.columns[name]] for name in keep}
    return torch.cat([batch.inputs for batch in batches]), kept


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4), dtype=np.uint8)


def test_a_folder_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path):
    source = as_source(parquet_folder(tmp_path, (7, 5)), 100)
    (tmp_path / "_metadata.parquet").write_text("not data")
    values, kept = read(ParquetSource(tmp_path), ["id"])
    assert torch.equal(values, X[:12])
    assert kept["id"] == IDS[:12]
    assert list(source.shards()) == ["data-0.parquet", "data-1.parquet"]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 6)])
def test_a_column_of_lists_takes_the_shape_of_an_example(tmp_path, kind):
    pq.write_table(pa.table({"x": pa.array(X[:9].tolist(), kind), "y": list(range(9))}), tmp_path / "a.parquet")
    values, kept = read(ParquetSource(tmp_path, inputs="x", shape=(2, 3)), ["y"])
    assert torch.equal(values, X[:9].reshape(9, 2, 3))
    assert kept["y"] == list(range(9))
    with pytest.raises(InputError, match=r"6 numbers a row cannot be given the shape \(4,\)"):
        read(ParquetSource(tmp_path, inputs="x", shape=(4,)))


def test_a_mapping_of_columns_becomes_keyword_arguments_whose_integers_stay(tmp_path):
    pq.write_table(pa.table({"t": [[1, 2], [3, 4]], "m": [[1.0, 0.5], [1.0, 1.0]]}), tmp_path / "a.parquet")
    (batch,) = ParquetSource(tmp_path, inputs={"input_ids": "t", "mask": "m"}).open("a.parquet", (), 10)
    assert torch.equal(batch.inputs["input_ids"], torch.tensor([[1, 2], [3, 4]]))
    assert batch.inputs["mask"].dtype == torch.float32


def test_images_in_parquet_are_decoded_and_normalised(tmp_path):
    encoded = [{"bytes": png(PIXELS), "path": None}, {"bytes": png(255 - PIXELS), "path": None}]
    pq.write_table(pa.table({"image": encoded, "label": [0, 1]}), tmp_path / "a.parquet")
    values, _ = read(ParquetSource(tmp_path, transform=Normalise((0.5,), (0.25,))))
    expected = torch.from_numpy(np.stack([PIXELS, 255 - PIXELS])).unsqueeze(1).float() / 255
    torch.testing.assert_close(values, (expected - 0.5) / 0.25)
    resized, _ = read(ParquetSource(tmp_path, inputs="image", image_size=(8, 8)))
    assert resized.shape == (2, 1, 8, 8)


def test_gaps_texts_and_ragged_lists_are_named_with_their_row(tmp_path):
    def source(values):
        pq.write_table(pa.table({"x": values}), tmp_path / "a.parquet")
        return ParquetSource(tmp_path / "a.parquet")

    with pytest.raises(DataError, match=r"a.parquet, column 'x' has no value in row 5"):
        read(source([1.0] * 5 + [None, 2.0]))
    with pytest.raises(DataError, match=r"shape \(1,\) in row 6"):
        read(source([[1.0, 2.0]] * 6 + [[1.0]]))
    with pytest.raises(DataError, match="must be numbers"):
        read(source(["a", "b"]))
    with pytest.raises(DataError, match=r"lacks the columns \['z'\]; it has \['x'\]"):
        ParquetSource(tmp_path, inputs="z")


def test_webdataset_members_with_one_key_are_one_example(tmp_path):
    tar_file(tmp_path / "a.tar", vector_samples(0, 6))
    tar_file(tmp_path / "b.tar.gz", vector_samples(6, 11))
    tar_file(tmp_path / "c.tar", [])
    values, kept = read(as_source(tmp_path, 100), ["__key__", "cls", "json"])
    assert torch.equal(values, X[:11])
    assert kept["__key__"] == [f"{index:05d}" for index in range(11)]
    assert kept["cls"] == [index % 3 for index in range(11)]
    assert kept["json"] == [f"[{index}]" for index in range(11)]


def test_webdataset_images_are_decoded(tmp_path):
    tar_file(tmp_path / "a.tar", [("x/1", {"png": png(PIXELS), "txt": "für".encode()})])
    values, kept = read(TarSource(tmp_path), ["txt"])
    torch.testing.assert_close(values[0, 0], torch.from_numpy(PIXELS).float() / 255)
    assert kept["txt"] == ["für"]


def test_pickles_are_never_opened(tmp_path):
    tar_file(tmp_path / "a.tar", [("1", {"npy": npy(X[0].numpy()), "pyd": pickle.dumps([1])})])
    with pytest.raises(DataError, match=r"members .pyd are not read .* they can execute code"):
        read(TarSource(tmp_path), ["pyd"])
    tar_file(tmp_path / "a.tar", [("1", {"npy": npy(np.array([{"a": 1}], dtype=object))})])
    with pytest.raises(DataError, match="is damaged"):
        read(TarSource(tmp_path))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.97])
def test_a_tar_file_that_is_cut_short_is_never_taken_for_whole(tmp_path, name, share):
    path = tar_file(tmp_path / name, vector_samples(0, 20))
    whole = path.read_bytes()
    # A tar file's end is padding, which may be missing.
    size = len(whole) if name.endswith("gz") else 20 * 6 * 512
    path.write_bytes(whole[: int(size * share)])
    with pytest.raises(DataError, match=rf"{name} (cannot be read as a tar file|has no end-of-archive mark)"):
        read(TarSource(path))


def test_a_tar_file_cut_between_two_members_is_noticed(tmp_path):
    path = tar_file(tmp_path / "a.tar", vector_samples(0, 20))
    with tarfile.open(path) as archive:
        boundary = archive.getmembers()[30].offset
    path.write_bytes(path.read_bytes()[:boundary])
    with pytest.raises(DataError, match="no end-of-archive mark"):
        read(TarSource(path))


def test_a_flipped_bit_in_a_compressed_tar_is_noticed(tmp_path):
    path = tar_file(tmp_path / "a.tgz", vector_samples(0, 5))
    plain = bytearray(gzip.decompress(path.read_bytes()))
    good = gzip.compress(bytes(plain))
    path.write_bytes(good[:-8] + bytes([good[-8] ^ 1]) + good[-7:])
    with pytest.raises(DataError, match="CRC"):
        read(TarSource(path))


def test_which_member_is_the_input_must_be_clear(tmp_path):
    tar_file(tmp_path / "a.tar", [("1", {"x.npy": npy(X[0].numpy()), "y.npy": npy(X[1].numpy())})])
    with pytest.raises(DataError, match=r"name the extension of the inputs"):
        read(TarSource(tmp_path))
    values, _ = read(TarSource(tmp_path, inputs="y.npy"))
    assert torch.equal(values, X[1:2])
    rest, _ = read(TarSource(tmp_path), ["x.npy"])
    assert torch.equal(rest, X[1:2])


def test_a_data_set_of_the_hub_is_sliced_in_order():
    data = HubDataset({"x": X[:11].tolist(), "y": list(range(11))})
    source = as_source(data, 4)
    assert isinstance(source, HuggingFaceSource)
    assert len(source.shards()) == 3
    values, kept = read(source, ["y"], batch_size=3)
    torch.testing.assert_close(values, X[:11])
    assert kept["y"] == list(range(11))
    pictures = HubDataset({"image": [Image.fromarray(PIXELS)] * 2, "label": [1, 2]})
    images, _ = read(HuggingFaceSource(pictures, target="label"))
    torch.testing.assert_close(images[1, 0], torch.from_numpy(PIXELS).float() / 255)
    with pytest.raises(InputError, match=r"lacks the columns \['z'\]"):
        HuggingFaceSource(data, inputs="z")


@pytest.mark.parametrize("form", ["tensor", "data set", "loader", "function", "mappings"])
def test_whatever_has_no_files_is_cut_by_count(form):
    y = torch.arange(22)
    dataset = TensorDataset(X[:22], y)
    made = {
        "tensor": X[:22],
        "data set": dataset,
        "loader": DataLoader(dataset, batch_size=4),
        "function": lambda: iter(DataLoader(dataset, batch_size=4)),
        "mappings": [{"x": part, "target": target} for part, target in zip(X[:22].split(4), y.split(4), strict=True)],
    }[form]
    source = as_source(made, 8)
    names = list(source.shards())
    assert len(names) == 3
    if form == "mappings":
        assert torch.equal(next(source.open(names[0], ["target"], 3)).inputs["x"], X[:3])
        return
    keep = [] if form == "tensor" else ["target"]
    values, kept = read(source, keep)
    assert torch.equal(values, X[:22])
    assert kept.get("target", list(range(22))) == list(range(22))
    # In any order, and again.
    for name, start in ((names[2], 16), (names[0], 0), (names[1], 8)):
        assert torch.equal(next(source.open(name, (), 4)).inputs, X[start : start + 4])


def test_consecutive_shards_of_an_iterable_are_read_in_one_pass():
    passes = []

    def batches():
        passes.append(0)
        for part in X[:40].split(4):
            passes[-1] += 1
            yield part

    source = IterableSource(batches, 3, count=10)
    before = len(passes)
    read(source)
    assert passes[before:] == [10]


def test_what_can_be_gone_through_once_or_shuffles_is_refused():
    with pytest.raises(InputError, match="only once"):
        as_source(iter([X]), 10)
    with pytest.raises(InputError, match="shuffles"):
        as_source(DataLoader(TensorDataset(X), shuffle=True), 10)
    with pytest.raises(InputError, match="the source is a int"):
        as_source(3, 10)
    with pytest.raises(DataError, match="expected"):
        read(IterableSource([X[:4]], 1, count=2))


def test_files_of_no_or_of_two_kinds_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        ParquetSource(tmp_path / "none")
    with pytest.raises(DataError, match="no file that ends in"):
        as_source(tmp_path, 10)
    parquet_folder(tmp_path, (2,))
    tar_file(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="both parquet and tar"):
        as_source(tmp_path, 10)
