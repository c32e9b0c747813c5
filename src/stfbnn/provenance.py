"""Which examples a stage of training saw, so that later stages can refuse held-out data that is not held out.

Every example is kept as an 8-byte BLAKE2b hash of its inputs as the loader gives them. Inputs ALONE are hashed: a
held-out example whose input was seen under another label, or without one, is still a seen input, on which the network's
confidence says nothing about unseen data.

Limits. A hash knows equality of bytes and nothing else, so an overlap that is found is real (a chance one among a
million examples against a million has probability 5e-8), but these are missed: inputs changed at random by an
augmentation; text padded to the longest sentence of its batch; the same example under another normalisation, dtype,
shape or model preprocessing; near duplicates. Entries that are not tensors are not part of the hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stfbnn.batches import TARGET_KEY, WEIGHT_KEY, Inputs, batch_size, split_batch, tensors_of
from stfbnn.errors import InputError

Hashes = NDArray[np.uint64]

_HASH_BYTES = 8
_ATTRIBUTE = "_stfbnn_provenance"
# Batches are merged into the sorted set when this many hashes wait (8 MB), which keeps memory bounded.
_MERGE_AT = 1_000_000


@dataclass(frozen=True, eq=False)
class Provenance:
    """The examples that a stage saw.

    Attributes:
        hashes: Sorted, unique, read-only, one uint64 for each distinct example (see ``example_hashes``).

    Raises:
        InputError: ``hashes`` is not a sorted one-dimensional uint64 array without repetitions.
    """

    hashes: Hashes

    def __post_init__(self) -> None:
        hashes = self.hashes
        if hashes.dtype != np.uint64 or hashes.ndim != 1 or not bool((hashes[1:] > hashes[:-1]).all()):
            raise InputError(
                f"a provenance needs sorted, unique uint64 hashes in one dimension, but it was given {hashes.dtype} of "
                f"shape {hashes.shape}; collect them with a ProvenanceRecorder"
            )
        own = hashes.copy()
        own.flags.writeable = False
        object.__setattr__(self, "hashes", own)

    @property
    def count(self) -> int:
        """Number of distinct examples."""
        return int(self.hashes.size)

    def union(self, other: Provenance) -> Provenance:
        """The examples that either saw."""
        return Provenance(np.union1d(self.hashes, other.hashes))

    def digest(self) -> str:
        """16 hexadecimal digits that identify the whole set, whatever order its examples came in."""
        return hashlib.blake2b(self.hashes.astype("<u8").tobytes(), digest_size=_HASH_BYTES).hexdigest()

    def to_tensor(self) -> Tensor:
        """The hashes as int64 of the same bits, for checkpoints and files."""
        return torch.from_numpy(self.hashes.view(np.int64).copy())

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Provenance:
        """The inverse of ``to_tensor``.

        Raises:
            InputError: The tensor is not what ``to_tensor`` gives.
        """
        if tensor.dtype != torch.int64 or tensor.ndim != 1:
            raise InputError(
                f"a stored provenance must be one-dimensional int64, but it is {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
        return cls(tensor.cpu().contiguous().numpy().view(np.uint64))


NOTHING = Provenance(np.empty(0, np.uint64))
"""No example: what a stage saw that looked at no data."""


@dataclass(frozen=True)
class StagesSeen:
    """Which examples shaped what belongs to a Bayesian network beside its trunk; None where that is not known.

    What stage one saw is the network's own ``provenance``. These records do not go into files: a network that was loaded is
    fitted, and ``inference`` is None.

    Attributes:
        inference: What shaped the posterior: the data it was inferred on, and the held-out data by which its temperature was
            chosen.
        prior: What shaped the prior's scale: learned by empirical Bayes, or suggested by `suggest_prior`; nothing where it was
            given or comes from the trained weights.
        prior_candidates: Among how many priors, given without those examples, it was picked by them; 1 where it was learned.
        predictive_temperature: What shaped τ.
    """

    inference: Provenance | None = None
    prior: Provenance | None = NOTHING
    prior_candidates: int = 1
    predictive_temperature: Provenance | None = NOTHING

    def after_inference(
        self, inference: Provenance | None, *, learned_prior: bool = False, chosen_tau: bool = False
    ) -> StagesSeen:
        """The record once a posterior has been inferred anew.

        Args:
            inference: The examples that it was inferred on, with those by which its temperature was chosen.
            learned_prior: Whether the prior's scale was learned along with it.
            chosen_tau: Whether τ was chosen for it: then τ has seen, through the posterior, all that inference has seen.
        """
        return StagesSeen(
            inference=inference,
            prior=inference if learned_prior else self.prior,
            prior_candidates=1 if learned_prior else self.prior_candidates,
            predictive_temperature=inference if chosen_tau else NOTHING,
        )


class ProvenanceRecorder:
    """Collects the examples of a stage, batch by batch.

    Args:
        start: What was seen before, such as by the part of a run that was killed.
    """

    def __init__(self, start: Provenance | None = None) -> None:
        self._seen: Hashes = np.empty(0, np.uint64) if start is None else start.hashes
        self._waiting: list[Hashes] = []
        self._waiting_count = 0

    def add(self, inputs: Inputs) -> None:
        """Record the examples of a batch, as the loader gave it."""
        hashes = example_hashes(inputs)
        self._waiting.append(hashes)
        self._waiting_count += hashes.size
        if self._waiting_count >= _MERGE_AT:
            self._merge()

    def finish(self) -> Provenance:
        """What has been recorded so far; recording can go on."""
        self._merge()
        return Provenance(self._seen)

    def _merge(self) -> None:
        self._seen = np.unique(np.concatenate([self._seen, *self._waiting]))
        self._waiting, self._waiting_count = [], 0


def example_hashes(inputs: Inputs) -> Hashes:
    """Hash every example of a batch.

    Args:
        inputs: The batch; of a mapping, the tensors in the order of their names.

    Returns:
        One uint64 for each row, shape (B,): BLAKE2b of the dtypes and shapes of the row's tensors and then of their
        bytes, so that 1.0 in float32 and in float64 differ, and a row of 4 numbers is not a 2 by 2 image.

    Raises:
        InputError: The tensors of the batch do not share their first dimension.
    """
    count = batch_size(inputs)
    ordered = dict(sorted(inputs.items())) if isinstance(inputs, Mapping) else inputs
    tensors = [tensor.detach().cpu().contiguous() for tensor in tensors_of(ordered)]
    description = ";".join(f"{tensor.dtype}{tuple(tensor.shape[1:])}" for tensor in tensors)
    start = hashlib.blake2b(description.encode(), digest_size=_HASH_BYTES)
    columns = [_row_bytes(tensor, count) for tensor in tensors]
    digests = bytearray()
    for row in range(count):
        state = start.copy()
        for column in columns:
            state.update(column[row])
        digests += state.digest()
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def provenance_of(
    loader: Iterable[Any], target_key: str = TARGET_KEY, has_targets: bool = True, weight_key: str = WEIGHT_KEY
) -> Provenance:
    """The examples of one pass over a loader: to declare the training set of a network trained elsewhere.

    Args:
        loader: Gives batches by the rule of ``stfbnn.batches``; without augmentation, or nothing will match.
        target_key: The entry of a mapping that is the target, which is not hashed.
        has_targets: False for a loader of inputs alone.
        weight_key: The entry of the examples' weights, which is not hashed either.

    Raises:
        InputError: A batch has none of the known forms.
    """
    recorder = ProvenanceRecorder()
    for batch in loader:
        recorder.add(split_batch(batch, target_key, has_targets, weight_key)[0])
    return recorder.finish()


def overlap(first: Provenance, second: Provenance) -> int:
    """Number of distinct examples that both saw."""
    return int(np.intersect1d(first.hashes, second.hashes, assume_unique=True).size)


def attach(model: nn.Module, provenance: Provenance) -> None:
    """Note on a model which examples its training saw, beside what was noted before.

    It is a plain attribute: it goes along with ``copy.deepcopy`` and not into the state dict, so a network that is
    loaded from a file has none until it is declared (``attach(model, provenance_of(training_loader))``).
    """
    before = attached(model)
    setattr(model, _ATTRIBUTE, provenance if before is None else before.union(provenance))


def attached(model: nn.Module) -> Provenance | None:
    """The examples that the model's training saw, or None where nobody has said."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Provenance) else None


def _row_bytes(tensor: Tensor, count: int) -> NDArray[np.uint8]:
    """The bytes of every row, shape (count, bytes per row); by torch, for numpy has no bfloat16."""
    if tensor.numel() == 0:
        return np.empty((count, 0), np.uint8)
    flat = tensor.resolve_conj().resolve_neg().reshape(count, -1)
    return flat.view(torch.uint8).numpy()
