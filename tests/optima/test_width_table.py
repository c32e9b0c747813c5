"""What is said of layers that were compared: rank, words, tables and JSON, on made results."""

import json
import math
from typing import Any

import pytest
import torch
from shown_tables import shown

from stfbnn.optima.width_table import Difference, LayerComparison, LayerWidth, NetworkFigures


def made(
    *scores: tuple[str, int, float], network: float = 1.0, error: float = 0.01, first: str = "a", **changes: Any
) -> LayerComparison:
    """A result in which layers (name, weights, held-out NLL) have paired differences of one standard error."""
    by_name = {name: nll for name, _, nll in scores}
    layers = tuple(
        LayerWidth(
            layer=name,
            kind="Linear",
            parameters=size,
            share=0.1,
            temperature=0.1,
            relative_std=1 / (place + 1),
            kl_per_parameter=0.5,
            held_out_nll=nll,
            metrics={"accuracy": 0.9, "ece": 0.02},
            epistemic={"test": 0.1, "far": 0.4},
            auroc={"far": {"entropy": 0.8, "epistemic": 0.9}},
            seconds=1.0,
            artifact_bytes=8 * size,
            over_network=Difference(nll - network, error),
            over_first=Difference(nll - by_name[first], error) if first in by_name and name != first else None,
        )
        for place, (name, size, nll) in enumerate(scores)
    )
    arguments: dict[str, Any] = {"failed": {}, "skipped": (), "tested_on": "test", "num_held_out": 1000} | changes
    figures = NetworkFigures(network, {"accuracy": 0.9, "ece": 0.05}, {"far": 0.7})
    return LayerComparison(figures, layers, first, **arguments)


def test_layers_are_ranked_by_held_out_score_and_ties_by_size() -> None:
    found = made(("a", 900, 0.5), ("b", 50, 0.5009), ("c", 10, 0.5012), ("d", 5, 0.9), ("e", 70, 0.5004))
    assert [one.layer for one in found.ranked()] == ["b", "e", "a", "c", "d"]
    assert found.recommended == "b"
    assert [one.layer for one in found.layers] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        (
            made(("a", 9, 0.5), ("b", 9, 0.6)),
            [
                "Yes, the first layer 'a' is the right one: held-out NLL 0.5000",
                "'b' (0.6000), worse by 0.1000 ± 0.0100",
            ],
        ),
        (
            made(("a", 9, 0.5), ("b", 9, 0.51)),
            ["Yes, the first layer 'a'", "cannot tell 'b' (0.5100) from it, a difference of 0.0100 ± 0.0100"],
        ),
        (
            made(("a", 9, 0.5), ("b", 20, 0.4995)),
            ["Yes, the first layer 'a'", "'b' (0.4995) is as good to within 0.001"],
        ),
        (
            made(("a", 9, 0.6), ("b", 9, 0.5)),
            ["No, 'b' (0.5000) has a lower held-out NLL than the first layer 'a' (0.6000), by 0.1000 ± 0.0100"],
        ),
        (
            made(("a", 9, 0.51), ("b", 9, 0.5)),
            ["The held-out examples cannot tell: 'b' (0.5000)", "a difference of 0.0100 ± 0.0100"],
        ),
        (
            made(("a", 900, 0.5), ("b", 9, 0.5005), error=1e-5),
            ["Not quite: 'b' (0.5005) is as good as the first layer 'a' (0.5000)", "9 weights instead of 900"],
        ),
        (made(("b", 9, 0.5), ("c", 9, 0.4)), ["The first layer 'a' was not compared; best is 'c' (0.4000)."]),
        (made(("b", 9, 0.5), failed={"a": "it is quantised"}), ["'a' cannot be taken: it is quantised. Best is 'b'"]),
        (made(("a", 9, 0.5)), ["The first layer 'a' is the only one compared (held-out NLL 0.5000)."]),
        (
            made(("a", 9, 1.2), ("b", 9, 1.1)),
            ["No layer beats the trained network itself (1.0000, the layers at best 1.1000)"],
        ),
        (made(("a", 9, 0.99)), ["no difference beyond the noise, 0.0100 ± 0.0100"]),
        (made(("a", 9, 0.9)), ["beats the trained network itself (1.0000), by 0.1000 ± 0.0100"]),
        (
            made(("a", 9, 1.0004), ("b", 90, 0.9998), error=1e-5),
            ["with 'a' random is worse than the trained network itself (1.0000), by 0.0004"],
        ),
        (
            made(("a", 9, 0.5), ("b", 9, 0.6)),
            ["widest posterior is that of 'a', with a mean σ of 1.000", "of 'b', with 0.500"],
        ),
    ],
)
def test_the_verdict_says_what_was_found_with_its_numbers(found: LayerComparison, sentences: list[str]) -> None:
    for sentence in sentences:
        assert sentence in found.verdict()


def test_tables_fit_a_terminal_and_hold_every_layer_in_order_of_rank() -> None:
    long = "distilbert.transformer.layer.11.attention.out_lin[0]"
    found = made(("a", 9, 0.6123), (long, 23_440_896, 0.5456), tested_on="held-out", failed={"x[y]": "it is [odd]"})
    text = shown(found.table())
    assert text.index("0.5456") < text.index("0.6123") < text.index("1.0000")
    assert "23,440,896" in text
    assert "-0.0667±0.0100" in text
    assert "x[y] failed: it is [odd]" in " ".join(text.split())
    assert "No test set was given" in text
    # The name is folded, not cut.
    column = "".join(line[:20].split(" ")[0] for line in text.splitlines()[2:8])
    assert long[:20] in column
    strange = shown(found.uncertainty_table())
    assert all(figure in strange for figure in ("far", "0.4000", "0.8000", "0.9000", "0.7000"))


def test_the_result_is_json_even_where_a_figure_is_infinite() -> None:
    found = made(("a", 9, math.inf), ("b", 3, 0.5))
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["recommended"] == "b"
    assert written["ranked"] == ["b", "a"]
    assert written["layers"][0]["held_out_nll"] is None
    assert written["layers"][1]["over_network"] == {"mean": -0.5, "standard_error": 0.01}
    assert written["verdict"] == found.verdict()


def test_the_standard_error_is_that_of_the_paired_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(500, generator=generator)
    one, other = common + 0.1 * torch.randn(500, generator=generator), common
    gap = Difference.of(one, other)
    assert gap.mean == pytest.approx(float((other - one).double().mean()))
    assert gap.standard_error == pytest.approx(float((other - one).std()) / math.sqrt(500), rel=1e-4)
    assert gap.standard_error < 0.2 * float(one.std()) / math.sqrt(500)
    # Equal weights are none.
    same = Difference.of(one, other, torch.full((500,), 3.0))
    assert (same.mean, same.standard_error) == pytest.approx((gap.mean, gap.standard_error))
    assert Difference(0.02, 0.01).within_noise
    assert not Difference(-0.021, 0.01).within_noise
