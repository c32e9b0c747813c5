"""What a folder of predictions was made with: written before the first file, compared at every later call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stfbnn.errors import CheckpointError, StorageError
from stfbnn.files import plain, write_json
from stfbnn.network import BayesianNetwork
from stfbnn.trunk import fingerprint

MANIFEST = "predictions.json"
_FORMAT, _VERSION = "stfbnn-predictions", 1


@dataclass(frozen=True)
class Manifest:
    """The settings and the shards of a folder of predictions.

    Attributes:
        settings: All that a row's prediction, or its place, depends on, as JSON has it.
        shards: The source's shards, in order.
    """

    settings: Mapping[str, Any]
    shards: tuple[str, ...]

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that differ where the settings or the shards do."""
        text = json.dumps([self.settings, self.shards], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def claim(self, folder: Path) -> None:
        """Write it into the folder, or compare it with what is there.

        Raises:
            CheckpointError: The folder's predictions were made with other settings, or from another source.
        """
        path = folder / MANIFEST
        if not path.exists():
            entries = {"format": _FORMAT, "version": _VERSION, "library_version": library_version()}
            try:
                write_json(path, {**entries, "settings": self.settings, "shards": self.shards})
            except StorageError:
                # Another process has written it meanwhile, and cleared up below.
                if not path.exists():
                    raise
        for leftover in folder.glob(f".{MANIFEST}.*.tmp"):
            # Of a run that was killed while it wrote this.
            leftover.unlink(missing_ok=True)
        # Read back also where it was just written: another process may have been as fast, with other settings.
        found = Manifest.read(folder)
        if found.shards != self.shards:
            raise CheckpointError(
                f"{folder} holds predictions from another source: {_difference(found.shards, self.shards)}; predict into "
                f"another folder"
            )
        names = sorted({*found.settings, *self.settings})
        differ = [name for name in names if found.settings.get(name) != self.settings.get(name)]
        if differ:
            told = ", ".join(
                f"{name} ({found.settings.get(name)} there, {self.settings.get(name)} now)" for name in differ
            )
            raise CheckpointError(
                f"{folder} holds predictions made with other settings: {told}; predict into another folder, or use the "
                f"settings of {path.name}"
            )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        path = folder / MANIFEST
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; without it nothing says what is missing") from error
        if not isinstance(entries, dict) or (entries.get("format"), entries.get("version")) != (_FORMAT, _VERSION):
            raise CheckpointError(f"{path} is no record of predictions, or one of a newer version of stfbnn")
        try:
            return cls(dict(entries["settings"]), tuple(entries["shards"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def manifest_of(
    bnn: BayesianNetwork,
    shards: Sequence[str],
    source: Mapping[str, Any],
    *,
    samples: int,
    seed: int,
    predictive_temperature: float,
    rows_per_shard: int,
    keep: Mapping[str, str],
) -> Manifest:
    """The manifest of a run; two networks with the same predictions for every seed have the same one.

    Args:
        bnn: The fitted network.
        shards: The source's shards.
        source: How the source reads them.
        samples: Posterior draws.
        seed: Which draws.
        predictive_temperature: τ.
        rows_per_shard: Rows of an output file.
        keep: Columns that are passed through, and what they are called.
    """
    settings = {
        "model": bnn.model_fingerprint,
        "layer": bnn.layer_name,
        "posterior": posterior_digest(bnn),
        "samples": samples,
        "seed": seed,
        "predictive_temperature": predictive_temperature,
        "rows_per_shard": rows_per_shard,
        "keep": dict(keep),
        "source": plain(source),
    }
    return Manifest(settings, tuple(shards))


def posterior_digest(bnn: BayesianNetwork) -> str:
    """64 hexadecimal digits: SHA-256 of the posterior's family and values and of the likelihood."""
    likelihood = bnn.require_fitted()
    parts = [
        bnn.posterior.family,
        plain(bnn.posterior.config()),
        fingerprint(bnn.posterior),
        likelihood.name,
        plain(likelihood.config()),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def library_version() -> str:
    """The installed version of this library."""
    try:
        return version("stfbnn")
    except PackageNotFoundError:
        # Run from a source tree that was never installed.
        return "unknown"


def _difference(found: Sequence[str], now: Sequence[str]) -> str:
    gone = next((name for name in found if name not in set(now)), None)
    new = next((name for name in now if name not in set(found)), None)
    if gone is None and new is None:
        return "its shards have another order"
    told = [f"it had the shard {gone!r}"] if gone is not None else []
    if new is not None:
        told.append(f"{new!r} is new")
    return f"{len(found)} shards there, {len(now)} now; {', '.join(told)}"
