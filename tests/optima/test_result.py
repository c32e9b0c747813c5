"""What is said of optima follows from the figures by rule."""

from __future__ import annotations

import pytest
import torch

from stfbnn.optima.pairs import Pair
from stfbnn.optima.paths import Path
from stfbnn.optima.result import BARRIER, SAME, Landscape, LayerLandscape
from stfbnn.optima.retraining import Optimum


def optimum(loss: float = 0.3, converged: bool = True) -> Optimum:
    return Optimum(0, "reinitialize", torch.zeros(2), 5, converged, loss - 0.1, loss, 0.9, 0.8, (loss,))


def path(barrier: float) -> Path:
    return Path((0.0, 0.5, 1.0), (0.2, 0.2 + barrier, 0.2), None, barrier)


def pair(first: int, second: int, barrier: float, variation: float | None = 0.5, curve: float | None = None) -> Pair:
    labels = None if variation is None else variation / 2
    bend = None if curve is None else path(curve)
    return Pair(first, second, 1.2, 0.9, labels, variation, path(barrier), bend)


def layer(pairs: list[Pair], place: str = "first", optima: int = 3, converged: bool = True) -> LayerLandscape:
    found = tuple(optimum(0.3 + 0.01 * number, converged) for number in range(optima))
    places = tuple((float(number), 0.0) for number in range(optima))
    return LayerLandscape("fc", "Linear", place, 12, found, tuple(pairs), places, 1.0, None, (), 1.0, "loop")


def test_a_line_without_a_barrier_joins_and_joins_what_is_joined() -> None:
    low, high = BARRIER / 2, BARRIER * 2
    chain = layer([pair(0, 1, low), pair(1, 2, low), pair(0, 2, high)])
    assert chain.basins == [[0, 1, 2]]
    apart = layer([pair(0, 1, high), pair(1, 2, low), pair(0, 2, high)])
    assert apart.basins == [[1, 2], [0]]
    assert apart.functions == [[0], [1], [2]]
    assert apart.are_disparate


def test_different_weights_of_one_function_are_no_disparate_optima() -> None:
    one = layer([pair(*two, 1.0, SAME / 2) for two in ((0, 1), (1, 2), (0, 2))])
    assert len(one.basins) == 3
    assert one.functions == [[0, 1, 2]]
    assert not one.are_disparate
    assert "3 basins and one function;" in one.verdict()
    # Where nothing says how alike predictions are, the basins decide.
    unknown = layer([pair(*two, 1.0, None) for two in ((0, 1), (1, 2), (0, 2))])
    assert unknown.are_disparate
    assert "labels" not in unknown.verdict()


def test_the_verdict_names_the_numbers() -> None:
    text = layer([pair(0, 1, 0.5, 0.4, 0.001), pair(1, 2, 0.25, 0.2, 0.3), pair(0, 2, 0.5, 0.4, 0.4)]).verdict()
    assert "first layer fc (Linear, 12 weights): 2 retrained optima beside the trained weights" in text
    assert "3 basins and 3 functions: several disparate optima" in text
    assert "straight lines 0.250 to 0.500 nats, on fitted curves 0.001 to 0.400 (which leave 2 of 3 apart)" in text
    assert "10.0% to 20.0% of the labels differ" in text
    assert "held-out losses are 0.310 to 0.320, the trained weights' 0.300 (0 are no worse)." in text
    joined = layer([pair(*two, 0.5, 0.4, 0.0) for two in ((0, 1), (1, 2), (0, 2))])
    assert "(which join all of them)" in joined.verdict()
    assert "3 had not" not in joined.verdict()
    assert "2 had not converged" in layer(list(joined.pairs), converged=False).verdict()


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (True, False, "As the paper says"),
        (True, True, "so has the last"),
        (False, False, "neither has the last"),
        (False, True, "but the last one"),
    ],
)
def test_the_first_layer_is_held_against_the_last(first: bool, last: bool, words: str) -> None:
    def of(disparate: bool, place: str) -> LayerLandscape:
        barrier = 1.0 if disparate else 0.0
        return layer([pair(*two, barrier) for two in ((0, 1), (1, 2), (0, 2))], place)

    found = Landscape((of(first, "first"), of(last, "last")), {})
    assert words in found.verdict().splitlines()[-1]
    named = Landscape((of(first, ""),), {})
    assert words not in named.verdict()


def test_the_table_averages_over_the_pairs_of_an_optimum() -> None:
    rows = list(layer([pair(0, 1, 0.5, 0.4), pair(1, 2, 0.25, 0.2), pair(0, 2, 0.1, 0.0)]).rows())
    assert rows[0] == ("trained", "0.2000", "0.3000", "0.8000", "1.2000", "0.3000", "", "0.1000")
    assert rows[1][5:] == ("0.3750", "", "0.1500")
    assert len(Landscape((layer([pair(0, 1, 0.0)], optima=2),), {}).tables()) == 1
