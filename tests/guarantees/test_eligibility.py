"""What each stage saw is recorded, and a certificate knows of it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stfbnn
from core_models import classification, loader, mlp, trained
from stfbnn.errors import CertificateError, InputError
from stfbnn.guarantees.eligibility import INFERENCE, PRIOR, STAGE_ONE, TAU, check_eligibility, hashes_of, require_fresh
from stfbnn.inference.stepwise import Inference
from stfbnn.inference.suggest_prior import suggest_prior
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.prior import Normal, ScaleChoice
from stfbnn.provenance import NOTHING, StagesSeen, attach, overlap, provenance_of

# The fits here are too short to be good ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:on the held-out data:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* held-out examples are few:UserWarning"),
]
QUICK: dict[str, Any] = {"epochs": 1, "progress": False}


def parts(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    """Disjoint parts of one sample."""
    x, y = classification(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def stage_one(x: Tensor, y: Tensor) -> nn.Module:
    """A network that was trained on these examples, and says so."""
    net = trained(mlp(), x, y, steps=5)
    attach(net, provenance_of([(x, y)]))
    return net


def seen_by(x: Tensor, prior: Any = "pretrained", **settings: Any) -> BayesianNetwork:
    """A network whose stage one saw x, as if fitted elsewhere."""
    y = torch.zeros(len(x), dtype=torch.long)
    bnn = stfbnn.bayesianize(stage_one(x, y), x[:4], prior=prior)
    bnn.likelihood, bnn.seen = Categorical(), StagesSeen(inference=NOTHING, **settings)
    return bnn


def test_fit_records_the_training_data_and_the_held_out_data() -> None:
    first, second, third = parts(60, 40, 30)
    bnn = stfbnn.bayesianize(stage_one(*first), first[0][:4])
    assert bnn.seen.inference is None
    stfbnn.fit(bnn, loader(*second), val_loader=loader(*third), temperatures=(1.0, 0.1), **QUICK)
    both = provenance_of([second, third])
    assert bnn.seen.inference is not None
    assert bnn.seen.inference.digest() == both.digest()
    # A prior of fixed scale and τ = 1 saw nothing.
    assert (bnn.seen.prior, bnn.seen.predictive_temperature) == (NOTHING, NOTHING)
    assert bnn.provenance is not None
    assert bnn.provenance.digest() == provenance_of([first]).digest()


def test_an_interrupted_fit_records_nothing() -> None:
    first, second = parts(60, 40)
    bnn = stfbnn.bayesianize(stage_one(*first), first[0][:4])

    class Broken(list[Any]):
        reads = 0

        def __iter__(self) -> Any:
            self.reads += 1
            if self.reads > 3:
                raise RuntimeError("the disk is gone")
            return super().__iter__()

    with pytest.raises(RuntimeError, match="disk"):
        stfbnn.fit(bnn, Broken([second]), temperature=1.0, epochs=9, progress=False)
    assert bnn.seen == StagesSeen()


def test_a_learned_prior_and_a_chosen_tau_saw_what_inference_saw() -> None:
    first, second, third = parts(60, 40, 30)
    bnn = stfbnn.bayesianize(stage_one(*first), first[0][:4], prior="empirical-bayes")
    stfbnn.fit(
        bnn, loader(*second), val_loader=loader(*third), temperature=1.0, predictive_temperature="held-out", **QUICK
    )
    both = provenance_of([second, third]).digest()
    for seen in (bnn.seen.prior, bnn.seen.predictive_temperature):
        assert seen is not None
        assert seen.digest() == both
    # Fitted anew with τ = 1, τ has seen nothing any more.
    stfbnn.fit(bnn, loader(*second), temperature=1.0, **QUICK)
    assert bnn.seen.predictive_temperature is NOTHING
    assert bnn.seen.prior is not None
    assert bnn.seen.prior.digest() == provenance_of([second]).digest()


def test_mixtures_and_inference_by_steps_record_it_too() -> None:
    first, second, third = parts(60, 40, 30)
    mixture = stfbnn.bayesianize(
        stage_one(*first), first[0][:4], posterior=stfbnn.Mixture(components=2, retrain_epochs=1, weighting="equal")
    )
    stfbnn.fit(
        mixture,
        loader(*second),
        val_loader=loader(*third),
        temperature=1.0,
        predictive_temperature="held-out",
        **QUICK,
    )
    both = provenance_of([second, third]).digest()
    for seen in (mixture.seen.inference, mixture.seen.predictive_temperature):
        assert seen is not None
        assert seen.digest() == both
    stepwise = stfbnn.bayesianize(stage_one(*first), first[0][:4])
    data = loader(*second)
    inference = Inference(stepwise, data, steps=1, temperature=1.0)
    inference.step(next(iter(data)))
    inference.finish()
    assert stepwise.seen.inference is not None
    assert stepwise.seen.inference.digest() == provenance_of([second]).digest()


def test_a_resumed_fit_still_knows(tmp_path: Path) -> None:
    first, second = parts(60, 40)
    for _ in range(2):
        bnn = stfbnn.bayesianize(stage_one(*first), first[0][:4])
        stfbnn.fit(bnn, [second], temperature=1.0, checkpoint=tmp_path / "run", epochs=2, progress=False)
        assert bnn.seen.inference is not None
        assert bnn.seen.inference.digest() == provenance_of([second]).digest()


def test_a_suggested_prior_remembers_by_what_it_was_suggested() -> None:
    first, second, third = parts(60, 40, 30)
    net = stage_one(*first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = suggest_prior(
            net,
            first[0][:4],
            [second],
            [third],
            scales=(0.1, 0.3, 1.0),
            epochs=1,
            val_samples=4,
            fit_options={"temperature": 1.0},
            progress=False,
        )
    assert found.prior.choice is not None
    assert found.prior.choice.candidates == 3
    bnn = stfbnn.bayesianize(net, first[0][:4], prior=found.prior)
    assert bnn.seen.prior is not None
    assert bnn.seen.prior.digest() == provenance_of([second, third]).digest()
    # It stays out of files and of comparisons.
    assert set(found.prior.config()) == {"std", "center", "learned"}
    assert found.prior == Normal(**found.prior.config())
    assert found.as_dict()["prior"] == found.prior.config()
    with pytest.raises(InputError, match="choice"):
        Normal(choice={"seen": 1})  # type: ignore[arg-type]


def test_fresh_data_are_eligible_and_the_split_is_told() -> None:
    first, second = parts(60, 40)
    bnn = stfbnn.bayesianize(stage_one(*first), first[0][:4], prior="pretrained")
    stfbnn.fit(bnn, loader(*second), temperature=1.0, **QUICK)
    found = check_eligibility(bnn, [second])
    assert (found.examples, found.reasons, found.tau_reasons) == (40, (), ())
    found.require(tau_matters=True)
    assert (found.stage(STAGE_ONE).examples, found.stage(STAGE_ONE).shared) == (60, 0)
    # Inference may see it.
    assert (found.stage(INFERENCE).examples, found.stage(INFERENCE).shared) == (40, 40)
    assert "independent draws" in found.assumptions[0]


def test_a_trunk_that_saw_some_of_the_set_is_named_with_their_number() -> None:
    first, second = parts(60, 40)
    x = torch.cat([second[0], first[0][:7]])
    bnn = seen_by(first[0])
    found = check_eligibility(bnn, [(x, torch.zeros(47, dtype=torch.long))])
    with pytest.raises(CertificateError, match=r"stage one saw 7 of the 47 examples.*allow_invalid"):
        found.require(tau_matters=False)
    assert found.stage(STAGE_ONE).shared == 7


def test_chance_duplicates_have_to_be_granted() -> None:
    first, second = parts(60, 99)
    data = [(torch.cat([second[0], first[0][:1]]), torch.zeros(100, dtype=torch.long))]
    bnn = seen_by(first[0])
    assert check_eligibility(bnn, data).reasons
    found = check_eligibility(bnn, data, max_seen_share=0.01)
    assert not found.reasons
    assert any("equal by chance" in one for one in found.assumptions)
    assert check_eligibility(bnn, data, max_seen_share=0.009).reasons


def test_a_network_of_unknown_training_is_refused_until_it_is_declared() -> None:
    first, second = parts(60, 40)
    net = trained(mlp(), *first, steps=1)
    bnn = stfbnn.bayesianize(net, first[0][:4])
    bnn.likelihood = Categorical()
    with pytest.raises(CertificateError, match=r"not known which examples.*provenance\.attach"):
        check_eligibility(bnn, [second]).require(tau_matters=False)
    bnn.provenance = provenance_of([first])
    assert not check_eligibility(bnn, [second]).reasons
    bnn.provenance = NOTHING
    found = check_eligibility(bnn, [second])
    assert not found.reasons
    assert any("declared by an empty provenance" in one for one in found.assumptions)


def test_a_prior_learned_on_the_set_is_refused_and_one_learned_elsewhere_is_not() -> None:
    first, second, third = parts(60, 40, 30)
    bnn = stfbnn.bayesianize(stage_one(*first), first[0][:4], prior="empirical-bayes")
    stfbnn.fit(bnn, [second], temperature=1.0, **QUICK)
    (reason,) = check_eligibility(bnn, [second]).reasons
    assert "the prior saw 40 of the 40 examples" in reason
    assert "empirical Bayes" in reason
    assert not check_eligibility(bnn, [third]).reasons


def test_a_prior_picked_on_the_set_costs_a_union_bound() -> None:
    first, second = parts(60, 40)
    recipe = Normal(std=0.1, choice=ScaleChoice(provenance_of([second]), 5))
    bnn = stfbnn.bayesianize(stage_one(*first), first[0][:4], prior=recipe)
    (reason,) = check_eligibility(bnn, [second], priors_considered=4).reasons
    assert "priors_considered=5" in reason
    found = check_eligibility(bnn, [second], priors_considered=5)
    assert not found.reasons
    assert any("5 scales" in one for one in found.assumptions)


def test_tau_matters_only_for_losses_that_it_shapes() -> None:
    first, second = parts(60, 40)
    bnn = seen_by(first[0], predictive_temperature=provenance_of([second]))
    bnn.predictive_temperature = 1.7
    found = check_eligibility(bnn, [second])
    assert not found.reasons
    found.require(tau_matters=False)
    with pytest.raises(CertificateError, match="predictive temperature saw 40 of the 40"):
        found.require(tau_matters=True)
    given = check_eligibility(bnn, [second], predictive_temperature=1.2)
    given.require(tau_matters=True)
    assert any("τ = 1.2" in one for one in given.assumptions)


def test_what_a_file_does_not_say_is_not_taken_for_granted(tmp_path: Path) -> None:
    first, second = parts(60, 40)
    net = stage_one(*first)
    bnn = stfbnn.bayesianize(net, first[0][:4], prior="empirical-bayes")
    stfbnn.fit(bnn, [second], temperature=1.0, predictive_temperature=1.3, **QUICK)
    stfbnn.save(bnn, tmp_path / "posterior")
    loaded = stfbnn.load(tmp_path / "posterior", net)
    found = check_eligibility(loaded, [second])
    assert "learned on data that the file does not name" in found.reasons[0]
    assert "τ = 1.3" in found.tau_reasons[0]
    assert (found.stage(PRIOR).shared, found.stage(TAU).shared, found.stage(INFERENCE).shared) == (None, None, None)
    # Its model still says what it was trained on.
    assert found.stage(STAGE_ONE).examples == 60

    fixed = stfbnn.bayesianize(net, first[0][:4], prior=0.3)
    stfbnn.fit(fixed, [second], temperature=1.0, **QUICK)
    stfbnn.save(fixed, tmp_path / "fixed")
    found = check_eligibility(stfbnn.load(tmp_path / "fixed", net), [second])
    assert not found.reasons
    assert not found.tau_reasons
    assert any("loaded" in one for one in found.assumptions)


def test_repeated_examples_are_warned_of_and_few_are_refused() -> None:
    first, second = parts(60, 40)
    bnn = seen_by(first[0])
    twice = (torch.cat([second[0], second[0][:3]]), torch.zeros(43, dtype=torch.long))
    with pytest.warns(UserWarning, match="3 of the 43 examples"):
        found = check_eligibility(bnn, [twice])
    assert (found.examples, found.provenance.count) == (43, 40)
    with pytest.raises(InputError, match="at least 8"):
        check_eligibility(bnn, [(second[0][:7], second[1][:7])])
    with pytest.raises(InputError, match="at least 8"):
        check_eligibility(bnn, [])
    with pytest.raises(InputError, match="max_seen_share"):
        check_eligibility(bnn, [second], max_seen_share=1.0)


def test_a_further_set_must_be_new_to_all_stages_and_to_the_certificate() -> None:
    first, second, third = parts(60, 40, 30)
    bnn = stfbnn.bayesianize(stage_one(*first), first[0][:4])
    stfbnn.fit(bnn, [second], temperature=1.0, **QUICK)
    certified = provenance_of([second])
    assert require_fresh(bnn, certified, hashes_of([third])) == []
    for batch, names in ((first, ["stage one"]), (second, ["inference", "the certificate"])):
        found = require_fresh(bnn, certified, hashes_of([batch]))
        assert [one.split(" saw ")[0] for one in found] == names


def test_hashes_keep_repetitions_and_order() -> None:
    (x, y), *_ = parts(10)
    found = hashes_of([(x, y), (x[:2], y[:2])])
    assert len(found) == 12
    np.testing.assert_array_equal(found[:2], found[10:])
    assert overlap(provenance_of([(x, y)]), provenance_of([(x[:2], y[:2])])) == 2
