"""Bulk prediction: from a source of any size to sharded parquet files, each row exactly once whatever kills the run."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from stfbnn.batches import Inputs, batch_size, concatenate, rechunk
from stfbnn.bulk.manifest import Manifest, library_version, manifest_of
from stfbnn.bulk.output import (
    RESERVED,
    Mark,
    Written,
    figures_of,
    part_path,
    remove_leftovers,
    remove_parts,
    write_part,
    written,
)
from stfbnn.bulk.ranks import which_rank
from stfbnn.bulk.reading import Cursor, ShardReader, UnreadableShardError
from stfbnn.bulk.recognise import as_source
from stfbnn.bulk.result import PredictedShards, Skipped
from stfbnn.bulk.source import Source
from stfbnn.data.parquet import require_pyarrow
from stfbnn.description import stand_in
from stfbnn.draws import Draws, chunk_rows
from stfbnn.errors import DataError, InputError
from stfbnn.network import BayesianNetwork
from stfbnn.progress import progress_bar
from stfbnn.trunk.sharding import is_sharded

# Batches of one shard that may wait for the network.
QUEUED_BATCHES = 4


def predict_shards(
    bnn: BayesianNetwork,
    source: Any,
    folder: str | os.PathLike[str],
    *,
    samples: int = 32,
    seed: int = 0,
    rows_per_shard: int = 10_000,
    batch_size: int = 256,
    keep: Sequence[str] | Mapping[str, str] = (),
    workers: int = 1,
    rank: int | None = None,
    world_size: int | None = None,
    predictive_temperature: float | None = None,
    has_targets: bool = True,
    on_error: Literal["raise", "skip"] = "raise",
    resume: bool = True,
    progress: bool | None = None,
) -> PredictedShards:
    """Predict every row of a source into a folder of parquet files, in the source's order.

    The rows' figures are those of `stfbnn.predict` with the same seed. A run that was killed is called again, with any number
    of processes: what is finished stays, what is missing is done, and every row is there exactly once. Memory is bounded by
    ``rows_per_shard`` rows of figures and a few batches of inputs.

    Shard number i belongs to process i mod ``world_size``; processes need no connection, only the common folder. Beside the
    columns to keep, each file has ``row`` (number within the source's shard), and for classes and labels ``label``, ``probs``,
    ``confidence``, ``entropy``, ``aleatoric`` and ``epistemic`` (in nats), for numbers and counts ``mean``, ``std``,
    ``aleatoric_std`` and ``epistemic_std`` (in the target's unit); a likelihood of one's own has ``mean`` alone. Its metadata
    name the settings.

    Args:
        bnn: The network, after `fit`.
        source: A folder or files of parquet or of WebDataset tar; a tensor; a torch data set; a data set of Hugging Face's
            ``datasets``; an iterable of batches that gives the same rows at every pass; or a `Source`, by which columns,
            image sizes and transforms are chosen.
        folder: Where the files go; it is made.
        samples: S, posterior draws to average.
        seed: Which draws.
        rows_per_shard: Rows of a file, at most; also of the shards into which a source without files is cut.
        batch_size: Rows that are read at once; it changes no answer.
        keep: Columns of the source to pass through, such as identifiers; a mapping also says what to call them.
        workers: Shards that are read at once, each in a thread and at most 4 batches ahead of the network.
        rank: This process's number; None reads torchrun's ``RANK``, or is 0.
        world_size: How many processes there are; None reads ``WORLD_SIZE``, or is 1.
        predictive_temperature: τ, by which every draw's logits are divided; None takes what `fit` stored.
        has_targets: False for batches and examples that are tuples of inputs without a target.
        on_error: "skip" leaves a damaged shard out whole and lists it in the result; "raise" stops at it.
        resume: False predicts this process's shards anew though they are there.
        progress: Show a progress bar; None shows it on a terminal.

    Returns:
        A summary; ``.table()`` reads the predictions of all processes.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        CheckpointError: The folder holds predictions of another posterior, seed or source, or a damaged file.
        StorageError: A file cannot be written, such as on a full disk; those that are finished stay.
        DataError: A shard is missing, damaged, or holds NaN; the message names it, and the row.
        InputError: An argument is wrong, the source is empty, or the trunk is sharded.
    """
    started = time.perf_counter()
    bnn.require_fitted()
    if is_sharded(bnn.network):
        raise InputError(
            "the trunk is sharded among processes that compute only together, but each predicts shards of its own here: save "
            "the posterior, and load it onto the whole model (map_weights and offload keep that out of memory)"
        )
    for name, value in (("rows_per_shard", rows_per_shard), ("batch_size", batch_size), ("workers", workers)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a positive integer, but it is {value!r}")
    if on_error not in ("raise", "skip"):
        raise InputError(f'on_error must be "raise" or "skip", but it is {on_error!r}')
    temperature = bnn.predictive_temperature if predictive_temperature is None else predictive_temperature
    if not 0 < temperature < float("inf"):
        raise InputError(f"predictive_temperature must be positive and finite, but it is {temperature}")
    number, count = which_rank(rank, world_size)
    names = _names(keep)
    require_pyarrow()
    bnn.check_unchanged()
    found = as_source(source, rows_per_shard, has_targets)
    shards = tuple(found.shards())
    if not shards or len(set(shards)) < len(shards):
        raise InputError("the source has no rows" if not shards else "two shards of the source have the same name")
    target = Path(folder)
    with bnn.computing_in(None), progress_bar("predict shards", len(shards[number::count]), progress) as bar:
        draws = Draws(bnn, samples, seed)
        manifest = manifest_of(
            bnn,
            shards,
            found.settings(),
            samples=samples,
            seed=seed,
            predictive_temperature=temperature,
            rows_per_shard=rows_per_shard,
            keep=names,
        )
        manifest.claim(target)
        job = _Job(bnn, draws, temperature, found, target, manifest, names, rows_per_shard, batch_size, resume)
        done: list[str] = []
        skipped: list[Skipped] = []
        rows = before = 0
        with closing(_reading(job, range(number, len(shards), count), workers)) as reading:
            for opened in reading:
                try:
                    rows += job.write(opened)
                except UnreadableShardError as error:
                    if on_error == "raise":
                        raise
                    remove_parts(target, opened.index)
                    skipped.append(Skipped(opened.name, str(error)))
                else:
                    before += opened.found.rows
                    done.append(opened.name)
                finally:
                    opened.close()
                bar.advance()
    seconds = time.perf_counter() - started
    return PredictedShards(target, rows, before, tuple(done), tuple(skipped), seconds, number, count)


@dataclass(frozen=True)
class _Opened:
    """A shard that is being read; without a reader it is finished, or ``error`` says why it cannot be."""

    index: int
    name: str
    identity: str
    found: Written
    reader: ShardReader | None
    error: UnreadableShardError | None = None

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


@dataclass(frozen=True)
class _Job:
    bnn: BayesianNetwork
    draws: Draws
    temperature: float
    source: Source
    folder: Path
    manifest: Manifest
    keep: Mapping[str, str]
    rows_per_shard: int
    batch_size: int
    resume: bool

    def open(self, index: int) -> _Opened:
        """Look what there is of a shard, and begin to read the rest."""
        name = self.manifest.shards[index]
        remove_leftovers(self.folder, index)
        try:
            identity = self.source.identity(name)
        except DataError as error:
            return _Opened(index, name, "", Written(), None, UnreadableShardError(f"shard {name!r}: {error}"))
        found = Written()
        if self.resume:
            found = written(self.folder, index, name, self.manifest.digest, identity)
        if found.finished:
            return _Opened(index, name, identity, found, None)
        reader = ShardReader(self.source, name, list(self.keep), self.batch_size, found.rows, QUEUED_BATCHES)
        return _Opened(index, name, identity, found, reader)

    def write(self, opened: _Opened) -> int:
        """Predict the rest of a shard, file by file; returns its rows."""
        if opened.error is not None:
            raise opened.error
        if opened.reader is None:
            return 0
        cursor = Cursor(iter(opened.reader))
        part, first, last = opened.found.parts, opened.found.rows, False
        if not part:
            # Files beyond a gap, or of a run that is made anew, would stand beside the new ones.
            remove_parts(self.folder, opened.index)
        while not last:
            figures, kept = self._predict(cursor)
            size = sum(len(next(iter(chunk.values()))) for chunk in figures)
            last = cursor.peek() is None
            mark = Mark(
                run=self.manifest.digest,
                shard=opened.name,
                identity=opened.identity,
                first_row=first,
                rows=size,
                last=last,
                settings={**self.manifest.settings, "library_version": library_version()},
            )
            write_part(part_path(self.folder, opened.index, part), mark, figures or self._no_rows(), kept)
            part, first = part + 1, first + size
        return first - opened.found.rows

    def _predict(self, cursor: Cursor) -> tuple[list[dict[str, Tensor]], dict[str, list[Sequence[Any]]]]:
        """The figures of the next rows, chunk by chunk, and their columns to keep, batch by batch."""
        kept: dict[str, list[Sequence[Any]]] = {name: [] for name in self.keep.values()}
        first = cursor.peek()
        if first is None:
            return [], kept

        def inputs() -> Iterator[Inputs]:
            for batch in cursor.take(self.rows_per_shard):
                for name, called in self.keep.items():
                    kept[called].append(batch.columns[name])
                yield batch.inputs

        # The size follows from the inputs' shape, as in `predict`.
        size = chunk_rows(first.inputs, self.bnn.device)
        return [self._figures(chunk) for chunk in rechunk(inputs(), size)], kept

    def _figures(self, chunk: Inputs) -> dict[str, Tensor]:
        rows = batch_size(chunk)
        # A file may end with a single row, which models that squeeze their outputs take for no batch at all.
        whole = concatenate([chunk, chunk]) if rows == 1 else chunk
        prediction = self.draws.predict(whole, self.bnn.require_fitted(), self.temperature)
        return {name: values[:rows] for name, values in figures_of(prediction).items()}

    def _no_rows(self) -> list[dict[str, Tensor]]:
        """The columns of an empty shard, as far as they can be known without a row."""
        with suppress(KeyError, ValueError, TypeError, AttributeError, RuntimeError):
            example = stand_in(self.bnn.input_description or {}, self.bnn.device)
            return [{name: values[:0] for name, values in self._figures(example).items()}]
        return []


def _reading(job: _Job, indices: Sequence[int], workers: int) -> Generator[_Opened, None, None]:
    """The shards in order, the next ``workers`` − 1 already being read."""
    ahead: deque[_Opened] = deque()
    try:
        for index in indices:
            ahead.append(job.open(index))
            if len(ahead) >= workers:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        for opened in ahead:
            opened.close()


def _names(keep: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(keep, str):
        raise InputError(f"keep must be a list of columns or a mapping to new names, but it is the text {keep!r}")
    names = dict(keep) if isinstance(keep, Mapping) else {name: name for name in keep}
    taken = [called for called in names.values() if called in RESERVED]
    if taken:
        raise InputError(
            f"keep names {taken}, which are columns of the predictions themselves; give a mapping to other names, such as "
            f"keep={{{taken[0]!r}: 'true_{taken[0]}'}}"
        )
    if len(set(names.values())) < len(names):
        raise InputError(f"keep gives two columns one name: {names}")
    return names
