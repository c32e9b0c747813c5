"""What becomes of a prediction when the inputs degrade? Corruptions of five severities for images, tables and texts.

The figures are the usual ones (:mod:`stfbnn.evaluation.calibration`) of predictions on corrupted inputs; here is what
corrupts them. Severity 1 is hardly noticed by a person, 5 is strong and leaves most examples recognisable.

The result follows from the seed and each example's index alone. Batches of one data set give what the whole would, to the
rounding of the arithmetic, if each is told its ``first_row``. All work is done on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from stfbnn.errors import InputError
from stfbnn.evaluation.corruptions import IMAGE_CORRUPTIONS, RowDraws
from stfbnn.randomness import derive_seed

_TABLES = {"feature noise": (0.1, 0.2, 0.4, 0.7, 1.0), "missing features": (0.05, 0.1, 0.2, 0.35, 0.5)}
_TEXTS = {"typos": (0.02, 0.04, 0.08, 0.12, 0.18), "dropped words": (0.05, 0.1, 0.2, 0.3, 0.45)}

CORRUPTIONS: tuple[str, ...] = tuple(IMAGE_CORRUPTIONS)
"""Names of the corruptions of images, in the order of a report."""

TABLE_CORRUPTIONS: tuple[str, ...] = tuple(_TABLES)
"""Names of the corruptions of tables."""

TEXT_CORRUPTIONS: tuple[str, ...] = tuple(_TEXTS)
"""Names of the corruptions of texts."""

SEVERITY_LEVELS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {**{name: levels for name, (_, levels) in IMAGE_CORRUPTIONS.items()}, **_TABLES, **_TEXTS}
)
"""What severities 1 to 5 of each corruption mean.

- gaussian noise: its standard deviation, white being 1;
- shot noise: the variance of a white pixel, which is one over the photons that it sends;
- impulse noise: the share of values that become 0 or 1;
- gaussian blur: the standard deviation, as a share of the shorter side;
- contrast: the share of every difference from the mean that is lost;
- brightness: what is added;
- rotation: degrees, to the left or to the right;
- translation: the distance, as a share of the sides;
- pixelate: the share of the pixels along each side that is lost;
- feature noise: its standard deviation, in standard deviations of the feature;
- missing features: the share of values that are missing;
- typos: the chance of each letter but the first of a word to be mistyped;
- dropped words: the share of words that are left out.
"""


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0, first_row: int = 0) -> Tensor:
    """Corrupt images as :mod:`stfbnn.evaluation.corruptions` defines it, and clip them to [0, 1].

    Args:
        images: (N, C, H, W), floating point in [0, 1], before any normalisation. They are left as they are.
        name: One of ``CORRUPTIONS``.
        severity: 1 to 5; ``SEVERITY_LEVELS`` says what it means.
        seed: What the random numbers follow from.
        first_row: Index of the first image in the whole data set, for batches of one.

    Returns:
        The corrupted images, of the same shape, dtype and device, without history.

    Raises:
        InputError: There is no such corruption or severity, or the images have the wrong shape, dtype or range.
    """
    _require_known(name, severity, CORRUPTIONS, "images")
    draws = _draws(name, seed, first_row)
    _require_floats(images, "images", "(N, C, H, W)", 4)
    plain = _workable(images)
    smallest, largest = float(plain.min()), float(plain.max())
    if smallest < 0 or largest > 1:
        raise InputError(
            f"images must be in [0, 1] to be corrupted, but reach from {smallest:.4g} to {largest:.4g}; corrupt them "
            f"before they are normalised, or divide by their largest value"
        )
    apply, levels = IMAGE_CORRUPTIONS[name]
    corrupted = apply(plain, levels[severity - 1], draws)
    return corrupted.clamp(0, 1).to(images)


def corrupt_table(
    rows: Tensor, name: str, severity: int, mean: Tensor, std: Tensor, seed: int = 0, first_row: int = 0
) -> Tensor:
    """Corrupt the rows of a table.

    "feature noise" adds normal noise in units of each feature's standard deviation. "missing features" replaces values,
    each with the same probability, by the feature's mean, as a table with missing values is often filled.

    Args:
        rows: (N, F), floating point and finite. They are left as they are.
        name: One of ``TABLE_CORRUPTIONS``.
        severity: 1 to 5; ``SEVERITY_LEVELS`` says what it means.
        mean: The features' means in the training set, (F,), in the units of ``rows``.
        std: The features' standard deviations there, (F,), not negative.
        seed: What the random numbers follow from.
        first_row: Index of the first row in the whole data set, for batches of one.

    Returns:
        The corrupted rows, of the same shape, dtype and device, without history.

    Raises:
        InputError: There is no such corruption or severity, or a tensor has the wrong shape, dtype or range.
    """
    _require_known(name, severity, TABLE_CORRUPTIONS, "tables")
    draws = _draws(name, seed, first_row)
    _require_floats(rows, "rows", "(N, F)", 2)
    for what, values in (("mean", mean), ("std", std)):
        _require_floats(values, what, "(F,)", 1)
        if len(values) != rows.shape[1]:
            raise InputError(
                f"{what} must be one number a feature, {rows.shape[1]} of them, but there are {len(values)}"
            )
    table = _workable(rows)
    centre, scale = (_workable(values).to(table.dtype) for values in (mean, std))
    if float(scale.min()) < 0:
        raise InputError(f"std must not be negative, but its smallest value is {float(scale.min()):.4g}")
    level = _TABLES[name][severity - 1]
    if name == "feature noise":
        corrupted = table + level * scale * draws.normal(*table.shape).to(table.dtype)
    else:
        corrupted = torch.where(draws.uniform(*table.shape) < level, centre, table)
    return corrupted.to(rows)


def corrupt_text(texts: Sequence[str], name: str, severity: int, seed: int = 0, first_row: int = 0) -> list[str]:
    """Corrupt texts of any language that writes words apart.

    "typos" mistypes letters, each with the same probability: it is left out, typed twice, or exchanged with the next one,
    which is spared then (typed twice if no letter follows). The first letter of a word stays, so that no word vanishes and
    most can be read (the edits of Pruthi et al., 2019, that need no keyboard's layout). "dropped words" leaves out words,
    each with the same probability, but never all of a text, and joins the others by single spaces.

    Args:
        texts: The texts, one an example.
        name: One of ``TEXT_CORRUPTIONS``.
        severity: 1 to 5; ``SEVERITY_LEVELS`` says what it means.
        seed: What the random numbers follow from.
        first_row: Index of the first text in the whole data set, for batches of one.

    Returns:
        The corrupted texts.

    Raises:
        InputError: There is no such corruption or severity, or ``texts`` is not a sequence of strings.
    """
    _require_known(name, severity, TEXT_CORRUPTIONS, "texts")
    draws = _draws(name, seed, first_row)
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"texts must be a sequence of strings, but it is one {type(texts).__name__}; give a list")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts must all be strings, but number {row} is a {type(text).__name__}")
    apply: Callable[[str, float, torch.Generator], str] = _mistyped if name == "typos" else _shortened
    level = _TEXTS[name][severity - 1]
    return [apply(text, level, draws.generator(row)) for row, text in enumerate(texts)]


def _mistyped(text: str, share: float, numbers: torch.Generator) -> str:
    typed: list[str] = []
    chances, kinds = torch.rand(2, len(text), generator=numbers).tolist()
    exchanged = False
    for place, letter in enumerate(text):
        if exchanged:
            # This letter was typed before the one that it follows.
            exchanged = False
            continue
        inner = letter.isalpha() and place > 0 and text[place - 1].isalpha()
        if not inner or chances[place] >= share:
            typed.append(letter)
        elif kinds[place] < 1 / 3:
            exchanged = text[place + 1 : place + 2].isalpha()
            typed.append(text[place + 1] + letter if exchanged else letter * 2)
        elif kinds[place] < 2 / 3:
            typed.append(letter * 2)
    return "".join(typed)


def _shortened(text: str, share: float, numbers: torch.Generator) -> str:
    words = text.split()
    if not words:
        return text
    chances = torch.rand(len(words), generator=numbers)
    kept = chances >= share
    kept[chances.argmax()] = True
    return " ".join(word for word, stays in zip(words, kept.tolist(), strict=True) if stays)


def _draws(name: str, seed: int, first_row: int) -> RowDraws:
    if isinstance(first_row, bool) or not isinstance(first_row, int) or first_row < 0:
        raise InputError(f"first_row must be an index from 0 on, but it is {first_row!r}")
    return RowDraws(derive_seed(seed, "corruption", name), first_row)


def _require_known(name: str, severity: int, names: Sequence[str], what: str) -> None:
    if name not in names:
        known = ", ".join(repr(one) for one in names)
        raise InputError(f"there is no corruption {name!r} of {what}; there are {known}")
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= 5:
        raise InputError(f"severity must be a whole number from 1 to 5, but it is {severity!r}")


def _require_floats(values: Tensor, what: str, form: str, dimensions: int) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        advice = "; divide 8-bit values by 255" if found == torch.uint8 else ""
        raise InputError(f"{what} must be a floating-point tensor, but found {found}{advice}")
    if values.ndim != dimensions or not values.numel():
        raise InputError(
            f"{what} must have the shape {form} and no empty dimension, but theirs is {tuple(values.shape)}"
        )
    strange = int((~values.isfinite()).sum())
    if strange:
        raise InputError(f"{what} must be finite, but {strange} values are NaN or infinite")


def _workable(values: Tensor) -> Tensor:
    """On the CPU, and in single precision at least: the operations used lack kernels for less."""
    plain = values.detach().cpu()
    return plain.to(torch.promote_types(plain.dtype, torch.float32))
