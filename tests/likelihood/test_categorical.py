"""Dense classes, labels to leave out and weights of classes, against PyTorch's own cross entropy."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stfbnn.errors import InputError
from stfbnn.likelihood import Bernoulli, Categorical, build_likelihood

WEIGHTS = [0.3, 1.0, 2.5, 4.0]


def dense(seed: int, *shape: int, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits (B, 4, …) in float64 and labels (B, …), a third of them ignored."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], 4, *shape[1:], generator=random, dtype=torch.float64)
    labels = torch.randint(0, 4, shape, generator=random)
    if ignored is not None:
        labels[torch.rand(shape, generator=random) < 1 / 3] = ignored
    return logits, labels


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(5,), (3, 4), (2, 3, 5), (1, 2, 2, 3)]),
    ignored=st.sampled_from([None, -100, 255, 2]),
    weights=st.sampled_from([None, WEIGHTS]),
    last=st.booleans(),
    probabilities=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_density_is_the_cross_entropy_of_torch(
    seed: int, shape: tuple[int, ...], ignored: int | None, weights: list[float] | None, last: bool, probabilities: bool
) -> None:
    logits, labels = dense(seed, *shape, ignored=ignored)
    expected = -F.cross_entropy(
        logits,
        labels,
        weight=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        ignore_index=-1 if ignored is None else ignored,
        reduction="none",
    )
    likelihood = Categorical(
        "probabilities" if probabilities else "logits",
        ignore_index=ignored,
        class_weights=weights,
        class_dim=-1 if last else 1,
    )
    outputs = logits.softmax(1) if probabilities else logits
    outputs = outputs.movedim(1, -1) if last else outputs
    likelihood.check(outputs, labels)
    summed = expected.flatten(1).sum(1) if labels.ndim > 1 else expected
    torch.testing.assert_close(likelihood.log_prob(outputs, labels), summed)
    # The single labels' log-probabilities are not weighted, and what is left out is 0.
    plain = -F.cross_entropy(logits / 2, labels, ignore_index=-1 if ignored is None else ignored, reduction="none")
    torch.testing.assert_close(likelihood.label_log_probs(outputs, labels, 2.0), plain)
    torch.testing.assert_close(likelihood.log_probs(outputs), logits.log_softmax(1))
    assert likelihood.sample(outputs, torch.Generator().manual_seed(0)).shape == labels.shape
    again = build_likelihood("categorical", likelihood.config())
    torch.testing.assert_close(again.log_prob(outputs, labels), likelihood.log_prob(outputs, labels), rtol=0, atol=0)


def test_an_example_without_labels_has_log_probability_zero_and_no_gradient() -> None:
    logits, labels = dense(0, 3, 5)
    labels[1] = -100
    logits.requires_grad_()
    values = Categorical(ignore_index=-100).log_prob(logits, labels)
    assert float(values[1].detach()) == 0
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).all()
    nothing = torch.full_like(labels, -100)
    Categorical(ignore_index=-100).check(logits, nothing)
    assert (Categorical(ignore_index=-100).log_prob(logits, nothing) == 0).all()


def test_what_is_drawn_counts_as_the_observed_label_in_its_place_does() -> None:
    # The class that marks labels to leave out may be drawn, and then counts.
    likelihood = Categorical(ignore_index=0, class_weights=WEIGHTS)
    logits, labels = torch.zeros(2, 4, 3), torch.tensor([[0, 2, 3], [0, 0, 0]])
    logits[:, 0] = 30.0
    logits.requires_grad_()
    values = likelihood.curvature_log_prob(logits, labels, torch.Generator().manual_seed(0))
    drawn = likelihood.sample(logits, torch.Generator().manual_seed(0))
    assert (drawn == 0).all()
    expected = torch.tensor([0.0, 2.5, 4.0]).sqrt() * -F.cross_entropy(logits[:1], drawn[:1], reduction="none")
    torch.testing.assert_close(values, torch.stack([expected.sum(), torch.tensor(0.0)]))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert (gradient[1] == 0).all()
    assert (gradient[0, :, 0] == 0).all()


def test_half_precision_is_summed_in_full() -> None:
    logits, labels = dense(0, 2, 4000, ignored=-100)
    likelihood = Categorical(ignore_index=-100, class_weights=WEIGHTS)
    coarse = logits.bfloat16()
    assert likelihood.log_prob(coarse, labels).dtype == torch.float32
    torch.testing.assert_close(
        likelihood.log_prob(coarse, labels).double(), likelihood.log_prob(coarse.double(), labels), rtol=1e-5, atol=0
    )


def test_settings_by_default_are_not_written() -> None:
    assert Categorical().config() == {"outputs": "logits"}
    assert Bernoulli().config() == {"outputs": "logits"}
    everything = Categorical("probabilities", ignore_index=255, class_weights=(1, 2), class_dim=-1)
    expected = {"outputs": "probabilities", "ignore_index": 255, "class_weights": [1.0, 2.0], "class_dim": -1}
    assert everything.config() == expected
    assert everything.rebuilt(everything.config()).config() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_index": 1.5}, "ignore_index"),
        ({"ignore_index": True}, "ignore_index"),
        ({"class_weights": [1.0, 0.0]}, "class_weights"),
        ({"class_weights": [1.0, float("nan")]}, "class_weights"),
        ({"class_weights": [1.0, float("inf")]}, "class_weights"),
        ({"class_weights": 2.0}, "class_weights"),
        ({"class_weights": []}, "class_weights"),
        ({"class_dim": 2}, "class_dim"),
        ({"class_dim": None}, "class_dim"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Categorical(**options)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "labels", "message"),
    [
        (Categorical(), torch.zeros(2, 5, 3), torch.zeros(2, 5).long(), r"class_dim=-1"),
        (Categorical(class_dim=-1), torch.zeros(2, 3, 5), torch.zeros(2, 5).long(), r"class_dim=1"),
        (Categorical(), torch.zeros(2, 3, 5), torch.zeros(2, 5, 1).long(), "squeeze"),
        (Categorical(), torch.zeros(2, 3, 5), torch.zeros(2, 3, 5).long(), "argmax"),
        (Categorical(), torch.zeros(2, 3, 5), torch.full((2, 5), -100), r"ignore_index=…"),
        (Categorical(ignore_index=-100), torch.zeros(2, 3, 5), torch.full((2, 5), 3), "0 … 2"),
        (Categorical(class_weights=WEIGHTS), torch.zeros(2, 3, 5), torch.zeros(2, 5).long(), "class_weights has 4"),
        (Categorical(class_dim=-1), torch.zeros(2, 3, 1), torch.zeros(2, 3).long(), "at least 2 classes"),
    ],
)
def test_outputs_and_targets_that_do_not_fit_are_refused(
    likelihood: Categorical, outputs: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        likelihood.check(outputs, labels)


@pytest.mark.parametrize(
    ("shape", "weights"), [((6,), 3.0), ((6, 1), [3.0]), ((6, 2), [0.5, 3.0]), ((6, 2, 4), [0.5, 3.0])]
)
def test_weights_of_labels_that_are_there(shape: tuple[int, ...], weights: Any) -> None:
    random = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(shape, generator=random), torch.randint(0, 2, shape, generator=random)
    likelihood = Bernoulli(positive_weights=weights)
    likelihood.check(logits, labels)
    factors = torch.tensor(weights)
    factors = factors.reshape(-1, *[1] * (len(shape) - 2)) if factors.numel() > 1 else factors
    expected = -F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=factors, reduction="none")
    torch.testing.assert_close(likelihood.log_prob(logits, labels), expected.reshape(6, -1).sum(1))
    plain = -F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    torch.testing.assert_close(likelihood.label_log_probs(logits, labels), plain)
    assert build_likelihood("bernoulli", likelihood.config()).config() == likelihood.config()
    if shape == (6, 1):
        # A column of logits meets a vector of labels, also where labels are drawn.
        torch.testing.assert_close(likelihood.log_prob(logits, labels[:, 0]), likelihood.log_prob(logits, labels))
        found = likelihood.curvature_log_prob(logits, labels[:, 0], torch.Generator().manual_seed(1))
        drawn = likelihood.sample(logits, torch.Generator().manual_seed(1))
        factor = torch.where(labels == 1, 3.0, 1.0).sqrt()
        own = -F.binary_cross_entropy_with_logits(logits, drawn, reduction="none")
        torch.testing.assert_close(found, (factor * own)[:, 0])


@pytest.mark.parametrize("bad", [0.0, -1.0, [1.0, float("nan")], [], "one"])
def test_bad_weights_of_labels_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="positive_weights"):
        Bernoulli(positive_weights=bad)


def test_weights_of_labels_must_fit_the_outputs() -> None:
    with pytest.raises(InputError, match="positive_weights has 3"):
        Bernoulli(positive_weights=[1.0, 2.0, 3.0]).check(torch.zeros(6, 2), torch.zeros(6, 2))
