"""The one rule by which batches are read and models are called."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stfbnn.batches import (
    as_inputs,
    batch_size,
    call_model,
    concatenate,
    join_rows,
    join_targets,
    output_tensor,
    rechunk,
    require_finite,
    rows,
    split_batch,
    training_batch,
)
from stfbnn.errors import InputError
from stfbnn.progress import progress_bar

X, Y = torch.arange(12.0).view(4, 3), torch.arange(4)


def test_a_pair() -> None:
    for batch in ((X, Y), [X, Y]):
        inputs, target = split_batch(batch)
        assert inputs is X
        assert target is Y
    inputs, _ = split_batch([[X, X], Y])
    assert isinstance(inputs, tuple)


def test_a_mapping_loses_its_target() -> None:
    inputs, target = split_batch({"x": X, "labels": Y})
    assert isinstance(inputs, dict)
    assert set(inputs) == {"x"}
    assert target is Y
    assert split_batch({"x": X, "y": Y}, target_key="y")[1] is Y
    assert split_batch({"x": X, "labels": Y}, has_targets=False) == ({"x": X}, None)


def test_without_targets_a_tuple_is_inputs() -> None:
    inputs, target = split_batch((X, Y), has_targets=False)
    assert inputs == (X, Y)
    assert target is None


def test_weights_stand_beside_the_target() -> None:
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    for form in ((X, Y, weight), [X, Y, weight], {"x": X, "labels": Y, "sample_weight": weight}):
        batch = training_batch(form)
        assert batch.target is Y
        assert batch.weight is weight
        assert len(batch) == 4
        assert batch.total_weight == 3.5
        inputs, target = split_batch(form)
        assert target is Y
        assert inputs is X or (isinstance(inputs, dict) and set(inputs) == {"x"})
    named = training_batch({"x": X, "y": Y, "a": weight, "sample_weight": X}, target_key="y", weight_key="a")
    assert named.weight is weight
    assert isinstance(named.inputs, dict)
    assert set(named.inputs) == {"x", "sample_weight"}
    part = named.rows(1, 3)
    assert part.weight is not None
    assert part.weight.tolist() == [0.0, 2.0]
    assert part.target.tolist() == [1, 2]
    assert part.weighted(torch.tensor([3.0, 4.0])).tolist() == [0.0, 8.0]
    # Where there are none, all count 1.
    for form in ((X, Y), {"x": X, "labels": Y}):
        assert training_batch(form).weight is None
        assert training_batch(form).total_weight == 4
    values = torch.rand(4)
    assert training_batch((X, Y)).weighted(values) is values
    # A mapping without targets loses its weights all the same; inputs that are a tuple are not taken for weights.
    assert split_batch({"x": X, "sample_weight": weight}, has_targets=False) == ({"x": X}, None)
    assert split_batch((X, X, weight), has_targets=False)[0] == (X, X, weight)
    assert training_batch(((X, X), Y)).inputs == (X, X)


def test_joined_targets_and_weights() -> None:
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    target, none = join_targets([training_batch((X, Y)), training_batch((X, Y))])
    assert none is None
    assert target.tolist() == [*range(4), *range(4)]
    _, some = join_targets([training_batch((X, Y)), training_batch((X, Y, weight))])
    assert some is not None
    assert some.tolist() == [1.0, 1.0, 1.0, 1.0, *weight.tolist()]
    with pytest.raises(InputError, match="pad all examples to one length"):
        join_rows([torch.zeros(2, 3), torch.zeros(2, 4)], "targets")
    with pytest.raises(InputError, match="pad all examples to one length"):
        concatenate([{"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 4)}])


@pytest.mark.parametrize("bad", [(X,), (X, Y, Y), X, 3, {"x": X}, (X, [0, 1]), ("text", Y), ({}, Y)])
def test_other_batches_are_refused(bad: object) -> None:
    with pytest.raises(InputError):
        split_batch(bad)


def test_models_are_called_by_the_form_of_the_inputs() -> None:
    def model(*args: object, **kwargs: object) -> tuple[int, list[str]]:
        return len(args), sorted(kwargs)

    assert call_model(model, X) == (1, [])
    assert call_model(model, (X, X)) == (2, [])
    assert call_model(model, {"a": X, "b": X}) == (0, ["a", "b"])


def test_outputs() -> None:
    assert output_tensor(X) is X
    assert output_tensor({"logits": X}) is X
    assert output_tensor(SimpleNamespace(logits=X)) is X
    assert output_tensor((X, Y), lambda raw: raw[1]) is Y
    for bad in ((X, Y), {"scores": X}, None):
        with pytest.raises(InputError, match="output="):
            output_tensor(bad)


def test_sizes() -> None:
    assert batch_size({"a": X, "b": Y, "flag": True}) == 4
    for bad in ((X, Y[:3]), torch.tensor(1.0), X[:0]):
        with pytest.raises(InputError, match="first dimension"):
            batch_size(bad)


def test_rows_and_their_joining() -> None:
    inputs = {"a": X, "b": Y, "flag": True}
    joined = concatenate([rows(inputs, 0, 1), rows(inputs, 1, 4)])
    assert isinstance(joined, dict)
    assert torch.equal(joined["a"], X)
    assert torch.equal(joined["b"], Y)
    assert joined["flag"] is True
    pair = concatenate([rows((X, Y), 0, 2), rows((X, Y), 2, 4)])
    assert isinstance(pair, tuple)
    assert torch.equal(pair[0], X)


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8), chunk=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_rechunking_keeps_rows_and_order(sizes: list[int], chunk: int) -> None:
    whole = torch.arange(float(sum(sizes)))
    chunks = list(rechunk(whole.split(sizes), chunk))
    assert all(len(part) == chunk for part in chunks[:-1])  # type: ignore[arg-type]
    assert 1 <= len(chunks[-1]) <= chunk + 1  # type: ignore[arg-type]
    if len(whole) > 1 and chunk > 1:
        assert len(chunks[-1]) > 1  # type: ignore[arg-type]
    assert torch.equal(concatenate(chunks), whole)  # type: ignore[arg-type]


def test_rows_of_other_shapes_are_not_joined() -> None:
    chunks = list(rechunk([torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(1, 4)], 8))
    assert [tuple(chunk.shape) for chunk in chunks] == [(2, 3), (3, 4)]  # type: ignore[union-attr]


def test_finite() -> None:
    require_finite((X, Y), "the inputs")
    with pytest.raises(InputError, match="the inputs hold 2 NaN or infinite"):
        require_finite({"a": torch.tensor([1.0, float("nan"), float("inf")])}, "the inputs")


def test_lists_become_tuples_and_others_are_refused() -> None:
    assert as_inputs([X, X]) == (X, X)
    with pytest.raises(InputError, match="no tensor"):
        as_inputs(())
    with pytest.raises(InputError, match="ndarray"):
        as_inputs(X.numpy())


def test_a_progress_bar_shows_what_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("work", 3, show=True) as bar:
        bar.advance(1, free_energy=0.5)
        bar.describe("more work")
        bar.advance(2)
    shown = capsys.readouterr()
    assert "more work" in shown.err
    assert "3/3" in shown.err
    assert "free energy 0.5" in shown.err
    assert not shown.out
    with progress_bar("work", 3, show=False) as bar:
        bar.advance()
    assert not capsys.readouterr().err


def test_constants_of_one_batch_never_stand_for_those_of_another() -> None:
    batches: list[Any] = [
        {"x": X, "scale": 1.0},
        {"x": X, "scale": 1.0},
        {"x": X, "scale": -3.0},
        {"x": X, "mask": None},
    ]
    chunks: list[Any] = list(rechunk(batches, 64))
    assert [(len(chunk["x"]), chunk.get("scale")) for chunk in chunks] == [(8, 1.0), (4, -3.0), (4, None)]


@pytest.mark.parametrize("value", [{"x": X, "more": {"z": X}}, (X, [X, None]), ([X, X],), {"states": ((X, X),)}])
def test_tensors_within_further_containers_which_could_not_be_cut_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="that holds tensors: the tensors of a batch must stand in one"):
        as_inputs(value)
    with pytest.raises(InputError, match="that holds tensors"):
        training_batch((value, Y))
