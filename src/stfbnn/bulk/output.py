"""The files that bulk prediction writes: their names, their columns, and what each says of itself.

A shard of the source becomes one file, or several of ``rows_per_shard`` rows: ``shard-000003-000001.parquet`` holds the
second part of the fourth shard, so that the files sorted by name hold the rows in the source's order. Each appears whole or
not at all, and says in its metadata which run wrote it, from which shard, and whether it is the shard's last: no other record
of what is done is needed, so none can disagree with the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stfbnn.errors import CheckpointError, DataError
from stfbnn.files import atomic_path, storing
from stfbnn.predictive import BernoulliPrediction, CategoricalPrediction, CustomPrediction, Prediction

ROW = "row"
# All names that a prediction's columns can have, and the row's.
RESERVED = (
    ROW,
    "label",
    "probs",
    "confidence",
    "entropy",
    "aleatoric",
    "epistemic",
    "mean",
    "std",
    "aleatoric_std",
    "epistemic_std",
)
_KEY = b"stfbnn"
# Parquet's own checksums leave out the pages' headers, of which a changed byte changes what is read.
_CHECKSUM, _PREFIX = b"stfbnn.checksum", b"sha256:"
_NO_DIGEST = _PREFIX + b"0" * 64


@dataclass(frozen=True)
class Mark:
    """What a file says of itself.

    Attributes:
        run: Digest of the run's settings.
        shard: The source shard's name.
        identity: What says that the shard is still the same.
        first_row: Number of the file's first row within the shard.
        rows: Rows of the file.
        last: Whether the shard ends with it.
        settings: What the run was made with, for a reader of the one file.
    """

    run: str
    shard: str
    identity: str
    first_row: int
    rows: int
    last: bool
    settings: dict[str, Any]


@dataclass(frozen=True)
class Written:
    """How much of a shard is on disk, from its start without a gap.

    Attributes:
        parts: Whole files.
        rows: Their rows.
        finished: Whether the shard's last row is among them.
    """

    parts: int = 0
    rows: int = 0
    finished: bool = False


def part_path(folder: Path, shard: int, part: int) -> Path:
    """The file of part ``part`` of shard number ``shard``."""
    return folder / f"shard-{shard:06d}-{part:06d}.parquet"


def figures_of(prediction: Prediction) -> dict[str, Tensor]:
    """A prediction's columns, each (N, …): of classes and labels, or of numbers (in the target's unit)."""
    if isinstance(prediction, CategoricalPrediction | BernoulliPrediction):
        # Classes go last, so that those of one position stand together.
        probs = prediction.probs.movedim(1, -1) if isinstance(prediction, CategoricalPrediction) else prediction.probs
        return {
            "label": prediction.labels,
            "probs": probs,
            "confidence": prediction.confidence,
            "entropy": prediction.entropy,
            "aleatoric": prediction.aleatoric,
            "epistemic": prediction.epistemic,
        }
    if isinstance(prediction, CustomPrediction):
        return {"mean": prediction.mean}
    numbers: Any = prediction
    return {
        "mean": numbers.mean,
        "std": numbers.std,
        "aleatoric_std": numbers.aleatoric.sqrt(),
        "epistemic_std": numbers.epistemic.sqrt(),
    }


def write_part(
    path: Path,
    mark: Mark,
    figures: Sequence[Mapping[str, Tensor]],
    kept: Mapping[str, Sequence[Sequence[Any]]],
) -> None:
    """Write one file, which appears whole or not at all.

    Args:
        path: The file.
        mark: What it says of itself.
        figures: Columns of consecutive chunks; of no row where the shard is empty.
        kept: Columns that are passed through, by their names in the file, chunk after chunk.
    """
    import pyarrow as pa  # noqa: PLC0415 - optional
    import pyarrow.parquet as pq  # noqa: PLC0415 - optional

    rows = torch.arange(mark.first_row, mark.first_row + mark.rows).numpy()
    names, arrays = [pa.field(ROW, pa.int64())], [pa.array(rows)]
    for name, chunks in kept.items():
        array = _kept(chunks)
        names.append(pa.field(name, array.type))
        arrays.append(array)
    for name in figures[0] if figures else ():
        values = torch.cat([chunk[name] for chunk in figures])
        array = _figure(values)
        shape = {} if values.ndim == 1 else {"shape": json.dumps(list(values.shape[1:]))}
        names.append(pa.field(name, array.type, metadata=shape))
        arrays.append(array)
    metadata = {_KEY: json.dumps(asdict(mark)).encode(), _CHECKSUM: _NO_DIGEST}
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(arrays, schema=pa.schema(names, metadata=metadata)), temporary)
        _sign(temporary)


def read_mark(path: Path) -> Mark:
    """What a file says of itself.

    Raises:
        CheckpointError: It is damaged, or none of these files.
    """
    with _opened(path) as file:
        mark = Mark(**json.loads(file.schema_arrow.metadata[_KEY]))
        rows = file.metadata.num_rows
    if rows != mark.rows:
        raise CheckpointError(f"{path} has {rows} rows, but says {mark.rows}; delete it, and it is made anew")
    return mark


def read_table(path: Path) -> Any:
    """A file's rows as a ``pyarrow.Table``, without what it says of itself.

    Raises:
        CheckpointError: It is damaged.
    """
    require_whole(path)
    with _opened(path) as file:
        return file.read().replace_schema_metadata(None)


def require_whole(path: Path) -> None:
    """Compare a file, byte for byte, with what was written, as far as it says so: those of earlier versions do not.

    Raises:
        CheckpointError: It is damaged.
    """
    with _opened(path) as file:
        said = file.metadata.metadata.get(_CHECKSUM)
    if said is not None and said != _digest(path.read_bytes(), said):
        raise CheckpointError(f"{path} is damaged: its checksum does not match; delete it, and it is made anew")


def written(folder: Path, shard: int, name: str, run: str, identity: str) -> Written:
    """How much of a shard is there.

    Raises:
        CheckpointError: A file is damaged, of another run, or of a shard that has changed since.
    """
    found = Written()
    while (path := part_path(folder, shard, found.parts)).exists():
        mark = read_mark(path)
        if (mark.run, mark.shard) != (run, name):
            raise CheckpointError(f"{path} was written by a run with other settings; predict into another folder")
        if mark.identity != identity:
            raise CheckpointError(
                f"the shard {name!r} has changed since {path} was written from it; predict into another folder, or delete "
                f"that shard's files"
            )
        require_whole(path)
        found = Written(found.parts + 1, found.rows + mark.rows, mark.last)
        if mark.last:
            break
    return found


def remove_parts(folder: Path, shard: int) -> None:
    """Delete a shard's files."""
    with storing(folder):
        for path in folder.glob(f"shard-{shard:06d}-*.parquet"):
            path.unlink()


def remove_leftovers(folder: Path, shard: int) -> None:
    """Delete the half-written files that a killed run left of a shard."""
    with storing(folder):
        for path in folder.glob(f".shard-{shard:06d}-*.tmp"):
            path.unlink(missing_ok=True)


def _sign(path: Path) -> None:
    """Put a file's checksum into it: the SHA-256 of its bytes with 64 zeros in the checksum's place."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        # The last place, for what the file says of itself follows its rows.
        file.seek(data.rindex(_NO_DIGEST))
        file.write(_digest(data, _NO_DIGEST))


def _digest(data: bytes, said: bytes) -> bytes:
    before, _, after = data.rpartition(said)
    return _PREFIX + hashlib.sha256(before + _NO_DIGEST + after).hexdigest().encode()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import pyarrow as pa  # noqa: PLC0415 - optional
    import pyarrow.parquet as pq  # noqa: PLC0415 - optional

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged, or was not written by bulk prediction ({error}); delete it, and it is made anew"
        ) from error


def _figure(values: Tensor) -> Any:
    """Numbers as an Arrow array: (N,) plainly, (N, …) as flat lists of a fixed size."""
    import pyarrow as pa  # noqa: PLC0415 - optional

    if values.ndim == 1:
        return pa.array(values.contiguous().numpy())
    size = values[0].numel() if len(values) else int(torch.tensor(values.shape[1:]).prod())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.contiguous().reshape(-1).numpy()), size)


def _kept(chunks: Sequence[Sequence[Any]]) -> Any:
    import pyarrow as pa  # noqa: PLC0415 - optional

    try:
        if chunks and all(isinstance(chunk, pa.Array) for chunk in chunks):
            return pa.concat_arrays(list(chunks))
        return pa.array([value for chunk in chunks for value in chunk])
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"values to keep are of no one type that parquet has: {error}") from error
