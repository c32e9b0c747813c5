"""Splits, holding out, and batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stfbnn.data import Split, SplitDataset, hold_out, loader, normalise
from stfbnn.errors import InputError


def numbered(targets: torch.Tensor | None, count: int | None = None) -> Split:
    """A split whose inputs say which example they are."""
    total = len(targets) if targets is not None else count
    assert total is not None
    return Split(torch.arange(total, dtype=torch.float32)[:, None], targets)


def rows_of(split: Split) -> list[int]:
    return split.inputs[:, 0].long().tolist()


def test_split_keeps_bytes_and_gives_floats():
    stored = torch.arange(256, dtype=torch.uint8).reshape(16, 1, 4, 4)
    split = Split(stored)
    assert split.stored.dtype == torch.uint8
    assert split.inputs.dtype == torch.float32
    assert torch.equal(split.inputs.flatten(), torch.arange(256).float() / 255)
    assert len(split) == 16


@pytest.mark.parametrize(
    ("stored", "targets", "said"),
    [
        (torch.zeros(3, 2, dtype=torch.float64), None, "uint8 or float32"),
        (torch.zeros(0, 2), None, "at least one example"),
        (torch.zeros(3), None, "at least one example"),
        (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32), "int64"),
        (torch.zeros(3, 2), torch.zeros(2), "one target per example"),
    ],
)
def test_split_refuses(stored, targets, said):
    with pytest.raises(InputError, match=said):
        Split(stored, targets)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_hold_out_is_a_division_in_proportion(labels, data):
    count = data.draw(st.integers(1, len(labels) - 1))
    seed = data.draw(st.integers(0, 5))
    targets = torch.tensor(labels)
    rest, held = hold_out(numbered(targets), count, seed)
    assert sorted(rows_of(rest) + rows_of(held)) == list(range(len(labels)))
    assert len(held) == count
    assert rows_of(held) == sorted(rows_of(held))
    for part in (rest, held):
        assert part.targets is not None
        assert torch.equal(part.targets, targets[rows_of(part)])
    for label in set(labels):
        exact = labels.count(label) * count / len(labels)
        assert abs(int((held.targets == label).sum()) - exact) < 1


def test_hold_out_gives_each_example_the_same_chance():
    targets = torch.tensor([0] * 7 + [1] * 2 + [2])
    times = torch.zeros(10)
    for seed in range(1500):
        times[rows_of(hold_out(numbered(targets), 3, seed)[1])] += 1
    # Binomial(1500, .3): standard deviation 17.7; five of them.
    assert (times - 450).abs().max() < 89


def test_hold_out_is_deterministic_and_depends_on_the_seed():
    split = numbered(None, 50)
    first, again, other = (rows_of(hold_out(split, 0.2, seed)[1]) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(first) == 10


@pytest.mark.parametrize("wrong", [0.0, 1.0, 1.5, -0.1, 0, 10, -1, True, "half", 0.01])
def test_hold_out_refuses(wrong):
    with pytest.raises(InputError):
        hold_out(numbered(None, 10), wrong, 0)


def image_split(count: int = 10) -> Split:
    pixels = torch.randint(0, 256, (count, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Split(pixels, torch.arange(count) % 2)


def test_loader_normalises_per_channel():
    split, mean, std = image_split(), [0.1, 0.2, 0.3], torch.tensor([0.5, 1.0, 2.0])
    batches = list(loader(split, 4, mean=mean, std=std))
    assert [len(batch[0]) for batch in batches] == [4, 4, 2]
    for index, (channel_mean, channel_std) in enumerate(zip(mean, std.tolist(), strict=True)):
        expected = (split.stored[:, index].float() / 255 - channel_mean) / channel_std
        found = torch.cat([batch[0][:, index] for batch in batches])
        torch.testing.assert_close(found, expected)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), split.targets)
    torch.testing.assert_close(normalise(split.inputs, mean, std), torch.cat([batch[0] for batch in batches]))


def test_loader_without_targets_gives_bare_inputs():
    batches = list(loader(numbered(None, 5), 2, mean=1.0, std=2.0, drop_last=True))
    assert [batch.tolist() for batch in batches] == [[[-0.5], [0.0]], [[0.5], [1.0]]]


def test_loader_shuffles_by_its_seed_and_differently_each_pass():
    split = numbered(torch.arange(20))

    def passes(seed: int | None) -> list[list[int]]:
        batches = loader(split, 6, shuffle=True, seed=seed)
        return [torch.cat([target for _, target in batches]).tolist() for _ in range(2)]

    first, second = passes(3)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))
    assert passes(3) == [first, second]
    assert passes(4) != [first, second]
    # Without a seed the order follows torch's global generator, from which a resumed run starts an epoch anew.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        once = passes(None)
        torch.manual_seed(0)
        assert passes(None) == once


@pytest.mark.parametrize("targets", [True, False])
def test_dataset_agrees_with_loader_under_the_default_collate(targets):
    split = image_split() if targets else Split(image_split().stored)
    ours = list(loader(split, 4, mean=0.5, std=0.5))
    plain = list(DataLoader(SplitDataset(split, 0.5, 0.5), batch_size=4))
    assert len(ours) == len(plain)
    for mine, theirs in itertools.zip_longest(ours, plain):
        pairs = zip(mine, theirs, strict=True) if targets else [(mine, theirs)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_dataset_items():
    split = image_split()
    data = SplitDataset(split)
    assert len(data) == 10
    assert torch.equal(data[3][0], split.inputs[3])
    assert torch.equal(data[-1][0], split.inputs[9])
    assert data[3][1] == 1
    with pytest.raises(IndexError):
        data[10]


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ([0.5] * 3, None, "both"),
        (None, 1.0, "both"),
        ([0.5] * 2, [1.0] * 3, "one number or 3"),
        ([0.5] * 3, [1.0, 0.0, 1.0], "positive"),
        (float("nan"), 1.0, "finite"),
    ],
)
def test_loader_refuses_statistics(mean, std, said):
    with pytest.raises(InputError, match=said):
        loader(image_split(), 4, mean=mean, std=std)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_loader_refuses_batch_size(size):
    with pytest.raises(InputError, match="batch_size"):
        loader(image_split(), size)
