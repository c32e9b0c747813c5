"""Corrupted images, tables and texts: growth with severity, stated rates, the same in any batch, and what is refused."""

from __future__ import annotations

import itertools
import math
import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.shift import (
    CORRUPTIONS,
    SEVERITY_LEVELS,
    TABLE_CORRUPTIONS,
    TEXT_CORRUPTIONS,
    corrupt,
    corrupt_table,
    corrupt_text,
)

RANDOM = ("gaussian noise", "shot noise", "impulse noise", "rotation", "translation")
SEVERITIES = range(1, 6)
SENTENCES = [
    "It began to rain before the second act, and nobody in the open theatre thought of leaving their place.",
    "A careful measurement of every quantity is worth more than three opinions about what it ought to be.",
    "The old harbour was quiet; two boats came in late, without lights, and left again before the morning.",
    "What she had written on the last page was neither a promise nor a complaint, only a list of names.",
] * 5


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.tensor(load_digits().images[:200] / 16).float()[:, None]


# --- every corruption of images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_digits_move_away_with_every_severity(name: str, digits: Tensor) -> None:
    found = [(corrupt(digits, name, severity) - digits).flatten(1).norm(dim=1).mean() for severity in SEVERITIES]
    assert found[0] > 0
    assert all(after > 1.05 * before for before, after in itertools.pairwise(found)), found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(CORRUPTIONS),
    st.integers(1, 5),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_any_shape_and_precision_gives_images_of_the_same_kind(
    name: str, severity: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    before = images.detach().clone()
    found = corrupt(images, name, severity)
    assert (found.shape, found.dtype, found.requires_grad) == (images.shape, dtype, False)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert torch.equal(images.detach(), before)
    assert found.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_any_batch(name: str, digits: Tensor) -> None:
    images = digits[:30]
    whole = corrupt(images, name, 4, seed=3)
    single = torch.cat([corrupt(images[row : row + 1], name, 4, seed=3, first_row=row) for row in range(30)])
    chunks = torch.cat([corrupt(images[row : row + 7], name, 4, seed=3, first_row=row) for row in range(0, 30, 7)])
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(corrupt(images.mT.contiguous().mT, name, 4, seed=3), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides(name: str, digits: Tensor) -> None:
    same = digits[:1].expand(40, -1, -1, -1)
    state = torch.get_rng_state()
    first, second = corrupt(same, name, 3, seed=1), corrupt(same, name, 3, seed=1)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert (name not in RANDOM) == torch.equal(first, corrupt(same, name, 3, seed=2))
    # Copies of one image are corrupted apart, but for what is not random.
    assert (name not in RANDOM) == bool((first - first[:1]).abs().max() < 1e-6)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Tensor:
    return torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 10, 0.1, 5]) + 3


@pytest.mark.parametrize("name", TABLE_CORRUPTIONS)
def test_tables_move_away_with_every_severity(name: str, table: Tensor) -> None:
    mean, std = table.mean(0), table.std(0)
    found = [(corrupt_table(table, name, severity, mean, std) - table).norm() for severity in SEVERITIES]
    assert found[0] > 0
    assert all(after > 1.05 * before for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_feature_noise_is_in_units_of_each_features_deviation(severity: int, table: Tensor) -> None:
    std = torch.tensor([1.0, 2.0, 10.0, 0.1, 0.0])
    noise = (corrupt_table(table.double(), "feature noise", severity, torch.zeros(5), std) - table).double()
    level = SEVERITY_LEVELS["feature noise"][severity - 1]
    torch.testing.assert_close(noise.std(0), level * std.double(), rtol=4 / math.sqrt(2 * 2000), atol=1e-12)
    assert bool((noise.mean(0).abs() <= 4 * level * std / math.sqrt(2000)).all())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_missing_features_are_the_stated_share_and_take_the_mean(severity: int, table: Tensor) -> None:
    mean = torch.tensor([100.0, 200.0, 300.0, 400.0, 500.0])
    found = corrupt_table(table, "missing features", severity, mean, torch.ones(5))
    missing = found == mean
    assert torch.equal(found[~missing], table[~missing])
    share = SEVERITY_LEVELS["missing features"][severity - 1]
    error = math.sqrt(share * (1 - share) / 2000)
    assert missing.double().mean(0).tolist() == pytest.approx([share] * 5, abs=4 * error)


@pytest.mark.parametrize("name", TABLE_CORRUPTIONS)
def test_a_row_is_corrupted_alike_in_any_batch_and_precision(name: str, table: Tensor) -> None:
    rows, mean, std = table[:20], table.mean(0), table.std(0)
    whole = corrupt_table(rows, name, 3, mean, std, seed=5)
    parts = [corrupt_table(rows[i : i + 6], name, 3, mean, std, seed=5, first_row=i) for i in range(0, 20, 6)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(corrupt_table(rows, name, 3, mean, std, seed=6), whole)
    doubles = corrupt_table(rows.double(), name, 3, mean, std, seed=5)
    torch.testing.assert_close(doubles.float(), whole)
    assert (doubles.dtype, corrupt_table(rows.half(), name, 3, mean, std).dtype) == (torch.float64, torch.float16)


# --- texts ------------------------------------------------------------------------------------------------------------


def edits(first: str, second: str) -> int:
    """Levenshtein's distance."""
    before = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        row = [i]
        for j, b in enumerate(second, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
        before = row
    return before[-1]


@pytest.mark.parametrize("name", TEXT_CORRUPTIONS)
def test_texts_move_away_with_every_severity(name: str) -> None:
    found = [
        sum(edits(old, new) for old, new in zip(SENTENCES, corrupt_text(SENTENCES, name, severity), strict=True))
        for severity in SEVERITIES
    ]
    assert found[0] > 0
    assert all(after > 1.05 * before for before, after in itertools.pairwise(found)), found


@pytest.mark.parametrize("severity", SEVERITIES)
def test_typos_have_the_stated_rate_and_three_equal_kinds(severity: int) -> None:
    # Words of two letters: the second is left out, or doubled with twice the chance, as no letter follows it.
    rate, words = SEVERITY_LEVELS["typos"][severity - 1], 500
    typed = " ".join(corrupt_text([" ".join(["ab"] * words)] * 20, "typos", severity)).split()
    count = 20 * words
    assert len(typed) == count
    for word, share in (("a", rate / 3), ("abb", 2 * rate / 3)):
        error = math.sqrt(share * (1 - share) / count)
        assert typed.count(word) / count == pytest.approx(share, abs=4 * error)
    assert set(typed) == {"a", "ab", "abb"}


def test_typos_change_letters_within_words_and_nothing_else() -> None:
    text = "Über 1,000 naïve — 3.5% of “users”, x y z;\n\tmany_new lines!  end"
    found = set(corrupt_text([text] * 400, "typos", 5))
    assert len(found) > 300
    for typed in found:
        assert [c for c in typed if not c.isalpha()] == [c for c in text if not c.isalpha()]
        letters = str.maketrans(dict.fromkeys(string.punctuation + string.digits + "“”—", " "))
        for old, new in zip(text.translate(letters).split(), typed.translate(letters).split(), strict=True):
            assert new[0] == old[0]
            assert set(new) <= set(old)
    exchanged = corrupt_text(["abc"] * 400, "typos", 5)
    assert (
        {"acb", "abbc", "ac"}
        <= set(exchanged)
        <= {"abc", "acb", "abbc", "ac", "abcc", "ab", "abbcc", "abb", "acc", "a"}
    )


@pytest.mark.parametrize("severity", SEVERITIES)
def test_dropped_words_are_the_stated_share_and_the_rest_keeps_its_order(severity: int) -> None:
    share = SEVERITY_LEVELS["dropped words"][severity - 1]
    words = [str(number) for number in range(500)]
    left = [text.split() for text in corrupt_text([" ".join(words)] * 20, "dropped words", severity)]
    dropped = 1 - sum(map(len, left)) / (20 * 500)
    assert dropped == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / (20 * 500)))
    assert all(kept == sorted(kept, key=int) and set(kept) <= set(words) for kept in left)


def test_no_text_loses_its_last_word() -> None:
    assert corrupt_text(["only", "", "  \n"] * 100, "dropped words", 5) == ["only", "", "  \n"] * 100
    assert set(corrupt_text(["one two"] * 200, "dropped words", 5)) == {"one two", "one", "two"}


@pytest.mark.parametrize("name", TEXT_CORRUPTIONS)
def test_a_text_is_corrupted_alike_in_any_batch(name: str) -> None:
    whole = corrupt_text(SENTENCES, name, 4, seed=2)
    assert [corrupt_text([text], name, 4, 2, first_row=row)[0] for row, text in enumerate(SENTENCES)] == whole
    assert corrupt_text(tuple(SENTENCES), name, 4, seed=3) != whole


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 8, 8), r"must have the shape \(N, C, H, W\) and no empty dimension, but theirs is \(2, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), r"no empty dimension, but theirs is \(0, 1, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "found torch.uint8; divide 8-bit values by 255"),
        (np.zeros((1, 1, 8, 8)), "floating-point tensor, but found ndarray"),
        (torch.full((1, 1, 2, 2), 1.5), r"in \[0, 1\] to be corrupted, but reach from 1.5 to 1.5"),
        (torch.full((1, 1, 2, 2), -0.5), "before they are normalised"),
        (torch.full((1, 1, 2, 2), torch.nan), "4 values are NaN or infinite"),
    ],
)
def test_images_that_cannot_be_corrupted(images: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        corrupt(images, "contrast", 1)


@pytest.mark.parametrize("severity", [0, 6, -1, 2.0, True, "3", None])
def test_a_severity_is_1_to_5(severity: object) -> None:
    table = torch.zeros(2, 3)
    for call in (
        lambda: corrupt(torch.zeros(1, 1, 4, 4), "rotation", severity),
        lambda: corrupt_table(table, "feature noise", severity, table[0], table[0]),
        lambda: corrupt_text(["a text"], "typos", severity),
    ):
        with pytest.raises(InputError, match="whole number from 1 to 5"):
            call()


def test_names_are_those_of_the_kind_of_input() -> None:
    table = torch.zeros(2, 3)
    with pytest.raises(InputError, match="no corruption 'typos' of images; there are 'gaussian noise', 'shot noise'"):
        corrupt(torch.zeros(1, 1, 4, 4), "typos", 1)
    with pytest.raises(InputError, match="of tables; there are 'feature noise', 'missing features'"):
        corrupt_table(table, "rotation", 1, table[0], table[0])
    with pytest.raises(InputError, match="of texts; there are 'typos', 'dropped words'"):
        corrupt_text(["a text"], "fog", 1)


@pytest.mark.parametrize(
    ("seed", "first_row", "message"), [(-1, 0, "seed"), (0, -1, "first_row"), (0, 1.0, "first_row")]
)
def test_seeds_and_rows_count_from_0(seed: int, first_row: int, message: str) -> None:
    for name in ("contrast", "gaussian noise"):
        with pytest.raises(InputError, match=message):
            corrupt(torch.zeros(1, 1, 4, 4), name, 1, seed, first_row)


@pytest.mark.parametrize(
    ("rows", "mean", "std", "message"),
    [
        (torch.zeros(3), torch.zeros(3), torch.ones(3), r"rows must have the shape \(N, F\)"),
        (
            torch.zeros(2, 3),
            torch.zeros(2),
            torch.ones(3),
            "mean must be one number a feature, 3 of them, but there are 2",
        ),
        (torch.zeros(2, 3), torch.zeros(3), torch.ones(1, 3), r"std must have the shape \(F,\)"),
        (torch.zeros(2, 3), torch.zeros(3), -torch.ones(3), "std must not be negative, but its smallest value is -1"),
        (torch.zeros(2, 3).long(), torch.zeros(3), torch.ones(3), "rows must be a floating-point tensor"),
        (torch.zeros(2, 3), torch.full((3,), torch.inf), torch.ones(3), "mean must be finite, but 3 values"),
    ],
)
def test_tables_that_cannot_be_corrupted(rows: Tensor, mean: Tensor, std: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        corrupt_table(rows, "feature noise", 1, mean, std)


def test_texts_are_a_sequence_of_strings() -> None:
    with pytest.raises(InputError, match="sequence of strings, but it is one str; give a list"):
        corrupt_text("a text", "typos", 1)
    with pytest.raises(InputError, match="number 1 is a int"):
        corrupt_text(["a text", 3], "typos", 1)
