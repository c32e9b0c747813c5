"""Shadow models: the balance of the design, what it lets an attacker count, and studies that are killed and go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from core_models import classification, mlp, trained
from stfbnn.baselines import Predictor
from stfbnn.errors import CheckpointError, InputError
from stfbnn.privacy.releases import Ensemble, Network, Release, ReleaseData
from stfbnn.privacy.shadows import Design, Observe, Pool, Shadows, weights_path

RELEASES: dict[str, Release] = {"network": Network(), "pair": Ensemble(members=2)}


class Trainer:
    """A short stage one that counts its calls, and is killed at one of them."""

    def __init__(self, pool: Pool, killed_at: int | None = None) -> None:
        self.pool, self.killed_at = pool, killed_at
        self.calls: list[tuple[list[int], int]] = []

    def __call__(self, members: Tensor, seed: int) -> nn.Module:
        if len(self.calls) == self.killed_at:
            raise KeyboardInterrupt
        self.calls.append((members.tolist(), seed))
        net = mlp(seed=seed % 2**31)
        return trained(net, self.pool.inputs[members], self.pool.labels[members], steps=3)


def pool(count: int = 20) -> Pool:
    x, y = classification(count)
    return Pool(x, y, *classification(12, seed=5))


def observe(data: Pool) -> Observe:
    return lambda predictor: {"log_probs": predictor.outputs(data.inputs).at().log_probs}


def shadows(data: Pool, trainer: Trainer, folder: Path | None = None, **changed: object) -> Shadows:
    design = Design.balanced(len(data.labels), 4, seed=1)
    chosen = {"train_model": trainer, "make_model": mlp, "seed": 3, "folder": folder, **changed}
    return Shadows(data, design, **chosen)  # type: ignore[arg-type]


def run(study: Shadows, releases: dict[str, Release] | None = None) -> dict[str, Tensor]:
    found = study.run(releases or RELEASES, observe(study.pool), {"form": 1}, progress=False)
    return {name: one["log_probs"] for name, one in found.items()}


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 5))
def test_every_example_is_in_half_of_the_models_and_every_model_on_half_of_the_examples(
    examples: int, half: int, seed: int
) -> None:
    design = Design.balanced(examples, 2 * half, seed)
    assert (design.membership.sum(dim=0) == half).all()
    sizes = design.membership.sum(dim=1)
    assert (sizes >= examples // 2).all()
    assert (sizes <= (examples + 1) // 2).all()
    assert torch.equal(design.membership, Design.balanced(examples, 2 * half, seed).membership)
    assert design.members(0).tolist() == [n for n in range(examples) if design.membership[0, n]]


def test_a_design_is_random_and_follows_from_its_seed() -> None:
    one, other = (Design.balanced(2000, 8, seed).membership for seed in (0, 1))
    # Two independent fair coins agree half of the time; 4 standard errors of 16,000 of them.
    assert abs((one == other).double().mean() - 0.5) < 4 * 0.5 / 16000**0.5
    pairs = [(one[a] & one[b]).double().mean() for a in range(8) for b in range(a)]
    # Of two models chosen among eight, four of which have an example: 4·3 / (8·7).
    assert max(abs(float(pair) - 12 / 56) for pair in pairs) < 0.05


@pytest.mark.parametrize("models", [3, 0, -2, True, 2.0])
def test_an_odd_number_of_models_is_refused(models: object) -> None:
    with pytest.raises(InputError, match="even number"):
        Design.balanced(10, models)  # type: ignore[arg-type]


def test_matched_models_are_as_many_with_an_example_as_without_it() -> None:
    design = Design.balanced(50, 8, seed=2)
    others = [1, 2, 3, 4, 5, 6, 7]
    assert design.fewest(others) == 3
    found = design.matched(others, 3)
    assert found.shape == (6, 50)
    for example in range(50):
        chosen = found[:, example].tolist()
        assert len(set(chosen)) == 6
        assert 0 not in chosen
        assert [bool(design.membership[model, example]) for model in chosen] == [True] * 3 + [False] * 3
    with pytest.raises(InputError, match="each must be from 1 to 3"):
        design.matched(others, 4)


def test_matched_models_do_not_depend_on_the_attacked_ones_members() -> None:
    design = Design.balanced(50, 8, seed=2)
    flipped = design.membership.clone()
    flipped[0] = ~flipped[0]
    others = list(range(1, 8))
    assert torch.equal(design.matched(others, 3), Design(flipped).matched(others, 3))


def test_all_models_train_on_their_halves_with_seeds_of_their_own() -> None:
    data = pool()
    trainer = Trainer(data)
    study = shadows(data, trainer)
    found = run(study)
    # Two networks a model: stage one, shared by both releases, and the ensemble's second.
    assert [members for members, _ in trainer.calls] == [
        study.design.members(model).tolist() for model in range(4) for _ in range(2)
    ]
    assert len({seed for _, seed in trainer.calls}) == 8
    first = trained(mlp(seed=trainer.calls[0][1] % 2**31), *members_of(study, 0), steps=3)
    with torch.no_grad():
        expected = first(data.inputs).log_softmax(dim=1)
    assert torch.allclose(found["network"][0].float(), expected, atol=1e-6)


def members_of(study: Shadows, model: int) -> tuple[Tensor, Tensor]:
    members = study.design.members(model)
    return study.pool.inputs[members], study.pool.labels[members]


@pytest.mark.parametrize("killed_at", [0, 1, 6])
def test_a_killed_study_goes_on_to_the_same_numbers(tmp_path: Path, killed_at: int) -> None:
    data = pool()
    undisturbed = run(shadows(data, Trainer(data)))
    first = Trainer(data, killed_at)
    with pytest.raises(KeyboardInterrupt):
        run(shadows(data, first, tmp_path))
    second = Trainer(data)
    torch.manual_seed(killed_at)
    found = run(shadows(data, second, tmp_path))
    for name, expected in undisturbed.items():
        assert torch.equal(found[name], expected)
    # What was trained before is not trained again.
    assert len(first.calls) + len(second.calls) == 8
    third = Trainer(data)
    again = run(shadows(data, third, tmp_path))
    assert not third.calls
    assert all(torch.equal(again[name], undisturbed[name]) for name in undisturbed)


def test_a_release_that_fails_loses_nothing_but_itself(tmp_path: Path) -> None:
    data = pool()
    calls = []

    def fragile(stage_one: nn.Module, given: ReleaseData, seed: int) -> Predictor:
        calls.append(seed)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return Network()(stage_one, given, seed)

    trainer = Trainer(data)
    with pytest.raises(RuntimeError, match="killed"):
        run(shadows(data, trainer, tmp_path), {"fragile": fragile})
    found = run(shadows(data, trainer, tmp_path), {"fragile": fragile})
    assert len(trainer.calls) == 4
    assert len(calls) == 5
    assert calls[2] == calls[3]
    assert torch.equal(found["fragile"], run(shadows(data, Trainer(data)), {"network": Network()})["network"])


def test_a_release_can_be_added_without_training_anew(tmp_path: Path) -> None:
    data = pool()
    run(shadows(data, Trainer(data), tmp_path), {"network": Network()})
    trainer = Trainer(data)
    assert set(run(shadows(data, trainer, tmp_path))) == {"network", "pair"}
    assert len(trainer.calls) == 4


def test_no_release_sees_what_another_does_to_stage_one() -> None:
    data = pool()

    def vandal(stage_one: nn.Module, given: ReleaseData, seed: int) -> Predictor:
        torch.rand(seed % 100)
        with torch.no_grad():
            for parameter in stage_one.parameters():
                parameter.zero_()
        return Network()(stage_one, given, seed)

    alone = run(shadows(data, Trainer(data)), {"network": Network()})
    beside = run(shadows(data, Trainer(data)), {"vandal": vandal, "network": Network()})
    assert torch.equal(alone["network"], beside["network"])


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    data = pool()
    run(shadows(data, Trainer(data), tmp_path, settings={"epochs": 1}), {"network": Network()})
    for changed in ({"settings": {"epochs": 2}}, {"settings": {"epochs": 1}, "seed": 4}):
        with pytest.raises(CheckpointError, match="other settings"):
            shadows(data, Trainer(data), tmp_path, **changed).check()
    other = Pool(data.inputs + 1, data.labels, data.held_inputs, data.held_labels)
    with pytest.raises(CheckpointError, match="data"):
        shadows(other, Trainer(other), tmp_path, settings={"epochs": 1}).check()
    with pytest.raises(CheckpointError, match="Ensemble"):
        run(shadows(data, Trainer(data), tmp_path, settings={"epochs": 1}), {"network": Ensemble()})


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    data = pool()
    run(shadows(data, Trainer(data), tmp_path), {"network": Network()})
    path = weights_path(tmp_path, 0, 0)
    assert path is not None
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="damaged"):
        run(shadows(data, Trainer(data), tmp_path))


def test_what_cannot_work_is_refused_before_any_training() -> None:
    data = pool()
    trainer = Trainer(data)
    with pytest.raises(InputError, match="the network has 2 outputs"):
        run(shadows(data, trainer, make_model=lambda: mlp(outputs=2)))
    with pytest.raises(InputError, match="class scores"):
        run(shadows(data, trainer, make_model=lambda: nn.Sequential(mlp(), nn.Unflatten(1, (3, 1)))))
    with pytest.raises(InputError, match="the design is for 20 examples"):
        run(Shadows(pool(22), shadows(data, trainer).design, trainer, mlp))
    with pytest.raises(InputError, match="a str"):
        run(shadows(data, trainer, make_model=lambda: "net"))
    assert not trainer.calls
    with pytest.raises(InputError, match="one architecture"):
        run(shadows(data, trainer, make_model=lambda: mlp(hidden=5)))
    with pytest.raises(InputError, match=r"train_model must give a torch\.nn\.Module"):
        run(shadows(data, trainer, train_model=lambda members, seed: None))
    with pytest.raises(InputError, match="'odd' must give a predictor"):
        run(shadows(data, trainer), {"odd": lambda *_: 3})  # type: ignore[dict-item,return-value]


def test_unusable_examples_are_refused() -> None:
    x, y = classification(10)
    held = classification(4)
    bad = x.clone()
    bad[3, 2] = float("nan")
    with pytest.raises(InputError, match="1 NaN"):
        Pool(bad, y, *held)
    with pytest.raises(InputError, match="float32"):
        Pool(x.double(), y, *held)
    with pytest.raises(InputError, match="int64"):
        Pool(x, y[:-1], *held)
    with pytest.raises(InputError, match="one shape"):
        Pool(x, y, held[0][:, :3], held[1])


def test_what_is_observed_must_be_alike_for_all_models() -> None:
    data = pool()
    sizes = iter(range(1, 5))
    with pytest.raises(InputError, match="for model 1"):
        shadows(data, Trainer(data)).run(
            {"network": Network()}, lambda _: {"x": torch.zeros(next(sizes))}, {}, progress=False
        )
