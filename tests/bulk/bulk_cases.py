"""Networks, folders of shards and stand-ins that the tests of bulk prediction share."""

import io
import json
import tarfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from core_models import mlp
from stfbnn.bulk import Rows, Source
from stfbnn.conversion import bayesianize
from stfbnn.likelihood import Categorical

SIZES = (50, 0, 33, 71, 1)
X = torch.randn(sum(SIZES), 6, generator=torch.Generator().manual_seed(0))
IDS = [f"id-{index}" for index in range(len(X))]


def network(likelihood=None, outputs=3, seed=0):
    """A network that predicts, with the initial posterior."""
    bnn = bayesianize(mlp(outputs=outputs, seed=seed), X[:2])
    bnn.likelihood = likelihood or Categorical()
    return bnn


def parquet_folder(folder, sizes=SIZES, x=X):
    """The rows of ``x`` in files of these sizes, as six columns and an identifier."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, size in enumerate(sizes):
        stop = start + size
        columns = {f"x{index}": x[start:stop, index].numpy() for index in range(x.shape[1])}
        table = pa.table({"id": pa.array(IDS[start:stop], pa.string()), **columns})
        pq.write_table(table, folder / f"data-{number}.parquet")
        start = stop
    return folder


def tar_file(path, samples):
    """A WebDataset shard: samples are (key, {extension: bytes})."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def npy(values):
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def vector_samples(start, stop):
    return [
        (
            f"{index:05d}",
            {"npy": npy(X[index].numpy()), "cls": b"%d" % (index % 3), "json": json.dumps([index]).encode()},
        )
        for index in range(start, stop)
    ]


class HubDataset:
    """The part of the interface of Hugging Face's ``datasets.Dataset`` that is used, over columns of lists."""

    def __init__(self, columns, fingerprint="a"):
        self._columns, self._fingerprint = columns, fingerprint

    @property
    def column_names(self):
        return list(self._columns)

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key):
        assert isinstance(key, slice)
        return {name: values[key] for name, values in self._columns.items()}

    def shard(self, num_shards, index, contiguous=True):
        raise AssertionError("slices alone keep the order whatever the number of shards is")


class SlowSource(Source):
    """The rows of ``x`` in equal shards, a pause before every batch, and a count of what was read."""

    def __init__(self, x, shards=6, pause=0.0):
        self._parts = x.chunk(shards)
        self._pause = pause
        self.batches = 0

    def shards(self):
        return [f"part-{index}" for index in range(len(self._parts))]

    def identity(self, name):
        return name

    def open(self, name, keep, batch_size):
        part = self._parts[int(name.split("-")[1])]
        for start in range(0, len(part), batch_size):
            time.sleep(self._pause)
            self.batches += 1
            values = part[start : start + batch_size]
            yield Rows(values, {column: values[:, 0].tolist() for column in keep})


def contents(folder):
    """The bytes of a folder's files by name, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
