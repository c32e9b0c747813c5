"""Small runs of stage two, started by the tests under torchrun as the ranks of one run.

Usage: data_parallel_script.py FOLDER, which leaves its results in FOLDER/result.RANK.pt.
"""

import os

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from stfbnn import bayesianize, fit
from stfbnn.likelihood import Gaussian
from stfbnn.posterior import Mixture, PointMass, components_of
from two_ranks import leave_results, refusal

NOISE, PRIOR_STD, COUNT, STEPS = 0.5, 0.8, 120, 40
# Of these rows the first rank takes so many where the parts are unequal; the others have larger inputs.
FIRST_PART = 90
# Low-rank factors start at random, so that what rank 0 says decides.
MIXTURE = Mixture(2, "low-rank", retrain_epochs=3, min_weight=0.0, max_excess=10.0)


def regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 4, generator=generator, dtype=torch.float64)
    x[FIRST_PART:] *= 3
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + 0.3
    return x, y + NOISE * torch.randn(COUNT, generator=generator, dtype=torch.float64)


class Repeated(Dataset):
    """All rows again and again, so that one pass is many steps with the same rows each."""

    def __init__(self):
        self.x, self.y = regression()

    def __len__(self):
        return COUNT * STEPS

    def __getitem__(self, index):
        return self.x[index % COUNT], self.y[index % COUNT]


class UnequalParts(DistributedSampler):
    """The first rows of every repetition for rank 0, the fewer others for rank 1."""

    def __iter__(self):
        own = range(FIRST_PART) if self.rank == 0 else range(FIRST_PART, COUNT)
        return iter([step * COUNT + row for step in range(STEPS) for row in own])

    def __len__(self):
        return STEPS * (FIRST_PART if self.rank == 0 else COUNT - FIRST_PART)


def conjugate(ranks, *, epochs=10, engine="natural-gradient", posterior="mean-field", unequal=False, **drawing):
    """Every step sees all rows, on however many ranks."""
    # The first estimate of the curvature, of few drawn labels, counts as one step.
    options = {"curvature_rate": 1e-4, "curvature_trust": 1, "learning_rate": 0.05}
    options = options if engine == "natural-gradient" else {}
    torch.manual_seed(2)
    bnn = bayesianize(nn.Linear(4, 1).double(), regression()[0][:2], prior=PRIOR_STD, posterior=posterior)
    data = Repeated()
    loader = DataLoader(data, COUNT // ranks)
    if unequal:
        sampler = UnequalParts(data)
        loader = DataLoader(data, len(sampler) // STEPS, sampler=sampler)
    run = fit(
        bnn,
        loader,
        epochs=epochs,
        num_examples=COUNT,
        engine=engine,
        engine_options=options,
        likelihood=Gaussian(noise_std=NOISE),
        temperature=1.0,
        **drawing,
    )
    return result(bnn, run)


class Rows(Dataset):
    """Rows of classes; one of the draws from them may end the run."""

    def __init__(self, count=31, stop_at=None, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 5, generator=generator)
        self.y = (self.x[:, 0] + 0.5 * torch.randn(count, generator=generator) > 0).long()
        self.stop_at, self.drawn = stop_at, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.drawn += 1
        if self.drawn == self.stop_at:
            interrupt()
        return self.x[index], self.y[index]


def interrupt():
    raise KeyboardInterrupt


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def classes(folder=None, data=None, **options):
    """31 rows in batches of 3 a rank: the last one is short, and one row is there twice among two ranks."""
    data = Rows() if data is None else data
    bnn = bayesianize(network(), data.x[:2], **options)
    held_out = Rows(seed=2)
    run = fit(
        bnn,
        DataLoader(data, 3, shuffle=True),
        epochs=3,
        val_loader=[(held_out.x, held_out.y)],
        temperatures=(1.0, 0.3),
        early_stop="nll",
        patience=2,
        val_samples=4,
        checkpoint=None if folder is None else folder / "run.ckpt",
        seed=3,
    )
    return result(bnn, run)


def interrupted_and_resumed(folder):
    try:
        # The first look draws 3 rows, the survey 16 a rank, and so does every epoch: this is in the third.
        classes(folder, Rows(stop_at=3 + 16 + 2 * 16 + 7))
    except KeyboardInterrupt:
        return classes(folder)
    raise AssertionError("the run was not interrupted")


def interrupted_mixture(folder):
    """Stopped in the midst of the last component's inference, with the training data that far drawn."""
    counting = Rows()
    classes(folder / "counted", counting, posterior=MIXTURE)
    try:
        classes(folder, Rows(stop_at=counting.drawn - 16 - 5), posterior=MIXTURE)
    except KeyboardInterrupt:
        return classes(folder, posterior=MIXTURE)
    raise AssertionError("the run was not interrupted")


def columns(ranks):
    """Two columns of targets whose noise is learned, of weighted examples."""
    x, y = regression()
    torch.manual_seed(4)
    bnn = bayesianize(nn.Linear(4, 2).double(), x[:2])
    target = torch.stack([y, 3 * y.flip(0)], 1)
    data = TensorDataset(x, target, torch.linspace(0.5, 1.5, COUNT, dtype=torch.float64))
    # Adam's way to the best weights depends little on the draws.
    run = fit(
        bnn,
        DataLoader(data, COUNT // ranks),
        epochs=40,
        engine="bayes-by-backprop",
        engine_options={"learning_rate": 0.05},
        temperature=1.0,
    )
    return result(bnn, run)


def result(bnn, run):
    bnn_state = bnn.posterior_state()
    figures = [
        (one.temperature, one.epoch, one.free_energy, one.nll, one.kl, one.held_out_nll or 0.0) for one in run.history
    ]
    parts = components_of(bnn.posterior)
    return {
        "means": torch.stack([part.mean_vector().detach() for part in parts]),
        "stds": torch.stack([part.std_vector().detach() for part in parts]),
        "components": [
            (one.number, one.nll, one.held_out_nll, one.distance, one.disagreement, one.weight, one.reason)
            for one in run.components
        ],
        "mean": bnn.posterior.mean_vector().detach().clone(),
        "std": bnn.posterior.std_vector().detach().clone(),
        "posterior": bnn_state["posterior"],
        "prior_std": bnn_state["prior_std"],
        "noise": bnn.likelihood.config().get("noise_std"),
        "history": figures,
        "chosen": [run.temperature, run.predictive_temperature, run.held_out_nll],
        "num_examples": run.num_examples,
        "seen": bnn.seen.inference.to_tensor(),
        "ranks": run.ranks,
        "bytes_per_step": run.bytes_per_step,
    }


def different_models():
    torch.manual_seed(int(os.environ["RANK"]))
    fit(bayesianize(nn.Linear(5, 2), Rows().x[:2]), DataLoader(Rows(), 3), temperature=1.0)


def all_ranks(folder):
    return {
        "conjugate": conjugate(2),
        "unequal": conjugate(2, unequal=True, epochs=6, estimator="antithetic", draws=8),
        "columns": columns(2),
        "straight": classes(),
        "again": classes(),
        "resumed": interrupted_and_resumed(folder),
        "finished": classes(folder),
        "learned prior": classes(prior="empirical-bayes"),
        "filterwise": classes(posterior="filterwise"),
        "point mass": conjugate(2, engine="auto", posterior=PointMass(), epochs=2),
        "mixture": classes(posterior=MIXTURE),
        "mixture resumed": interrupted_mixture(folder / "mixture"),
        "points": classes(posterior=Mixture(2, "point", retrain_epochs=3, min_weight=0.0, max_excess=10.0)),
        "exact mixture": conjugate(2, posterior=Mixture(2, min_weight=0.0, weighting="free-energy"), epochs=6),
        "list": refusal(lambda: fit(bayesianize(network(), Rows().x[:2]), [(Rows().x, Rows().y)], temperature=1.0)),
        "models": refusal(different_models),
    }


if __name__ == "__main__":
    leave_results(all_ranks)
