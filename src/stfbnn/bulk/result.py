"""What bulk prediction has done, and the folder that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stfbnn.bulk.manifest import Manifest
from stfbnn.bulk.output import part_path, read_mark, read_table
from stfbnn.errors import CheckpointError


@dataclass(frozen=True)
class Skipped:
    """A shard that was left out, and why."""

    shard: str
    reason: str


@dataclass(frozen=True)
class PredictedShards:
    """What one process of a bulk prediction has done.

    Attributes:
        folder: Where the files are.
        rows: Rows that this call predicted.
        rows_before: Rows that were there already, of this process's shards.
        shards: This process's shards that are finished, in order.
        skipped: Those that were left out because they are damaged.
        seconds: Time that the call took.
        rank: Which process this was.
        world_size: Of how many.
    """

    folder: Path
    rows: int
    rows_before: int
    shards: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    seconds: float
    rank: int
    world_size: int

    def files(self) -> list[Path]:
        """All files of the folder, of every process, in the order of the rows; those of unfinished shards too."""
        return [path for paths in self._by_shard().values() for path in paths]

    def missing(self) -> list[str]:
        """Shards of the source, of every process, that are not finished yet."""
        found = self._by_shard()
        return [shard for shard, paths in found.items() if not paths or not read_mark(paths[-1]).last]

    def table(self) -> Any:
        """All rows of the folder as one ``pyarrow.Table``, in the source's order.

        Raises:
            CheckpointError: A file is damaged or of another run, or there is none.
        """
        import pyarrow as pa  # noqa: PLC0415 - optional

        run = Manifest.read(self.folder).digest
        paths = self.files()
        if not paths:
            raise CheckpointError(f"{self.folder} holds no predictions yet")
        other = next((path for path in paths if read_mark(path).run != run), None)
        if other is not None:
            raise CheckpointError(f"{other} was written by a run with other settings than the folder's")
        # Columns of an empty shard may have no type, and are given that of the others.
        tables = [read_table(path) for path in paths]
        return pa.concat_tables(tables, promote_options="default")

    def _by_shard(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for index, shard in enumerate(Manifest.read(self.folder).shards):
            found[shard] = []
            while (path := part_path(self.folder, index, len(found[shard]))).exists():
                found[shard].append(path)
        return found
