"""Every posterior family and engine against Hamiltonian Monte Carlo, on a first layer that is small enough to be sampled.

    python benchmarks/hmc_reference.py                 # 3 seeds, about 9 minutes on one core

The digits that come with scikit-learn, averaged down to 4x4, 400 of them for training; a network 16-8-10 with a tanh, whose
first layer has 136 parameters; T = 1. The reference is the average over all draws of four chains; the row below it, two chains
judged by the other two, says what its own noise would look like. What the columns hold:

    predictive TV       total variation distance of the predictive probabilities from the reference's, mean over test inputs
    mean error          root mean square of (mean − reference's mean) / reference's standard deviation, over the weights
    std ratio           geometric mean over the weights of the standard deviation over the reference's
    covariance error    Frobenius norm of the difference of the covariance matrices over that of the reference's
    free energy         on the training data at T = 1, nats per example; its NLL over 10,000 draws, from the same noise for all
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stfbnn
from common import write
from stfbnn.errors import InputError
from stfbnn.inference.hmc import sample_hmc
from stfbnn.posterior import Mixture, Posterior, PosteriorFamily, SampledPosterior

TRAIN, BATCH, HIDDEN, STAGE_ONE_EPOCHS = 400, 100, 8, 300
EPOCHS, CHAINS, WARMUP, SAMPLES = 500, 4, 200, 500
TEST_DRAWS, TRAIN_DRAWS, AT_ONCE = 2000, 10_000, 250

Contestant = tuple[str | PosteriorFamily, str, Mapping[str, Any]]
# Bayes by Backprop takes the rate at which the free energy ends lowest; at its default of 0.001 it would need more epochs.
CONTESTANTS: dict[str, Contestant] = {
    "mean-field, natural gradient": ("mean-field", "natural-gradient", {}),
    "mean-field, Bayes by Backprop": ("mean-field", "bayes-by-backprop", {"learning_rate": 0.01}),
    "mean-field, Laplace": ("mean-field", "laplace", {}),
    "low-rank, Bayes by Backprop": ("low-rank", "bayes-by-backprop", {"learning_rate": 0.01}),
    "filterwise, natural gradient": ("filterwise", "natural-gradient", {}),
    "filterwise, Bayes by Backprop": ("filterwise", "bayes-by-backprop", {"learning_rate": 0.003}),
    "filterwise, Laplace": ("filterwise", "laplace", {}),
    "full, natural gradient": ("full", "natural-gradient", {}),
    "full, Bayes by Backprop": ("full", "bayes-by-backprop", {"learning_rate": 0.003}),
    "full, Laplace": ("full", "laplace", {}),
    "mixture of 4 mean-field": (Mixture(4, weighting="equal"), "auto", {}),
    "ensemble of 4 points": (Mixture(4, family="point", weighting="equal"), "auto", {}),
}


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test data: 4x4 pixels, standardised by the training images' mean and standard deviation."""
    found = load_digits()
    x = nn.functional.avg_pool2d(torch.tensor(found.images).float().unsqueeze(1), 2).flatten(1)
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN], order[TRAIN:]
    x = (x - x[train].mean(0)) / x[train].std()
    return (x[train], y[train]), (x[test], y[test])


def loader(x: Tensor, y: Tensor, seed: int) -> torch.utils.data.DataLoader[tuple[Tensor, ...]]:
    """Shuffled minibatches."""
    data = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def log_probs(bnn: stfbnn.BayesianNetwork, vectors: Tensor, x: Tensor) -> Tensor:
    """Log-probabilities (draws, rows, classes) of weight vectors (draws, d), in double precision."""
    outputs = torch.vmap(lambda vector: bnn.outputs(vector, x))(vectors)
    return outputs.double().log_softmax(-1)


def predictive(bnn: stfbnn.BayesianNetwork, vectors: Tensor, x: Tensor) -> Tensor:
    """Probabilities averaged over weight vectors, (rows, classes)."""
    total = sum(log_probs(bnn, part, x).exp().sum(0) for part in vectors.split(AT_ONCE))
    assert isinstance(total, Tensor)
    return total / len(vectors)


@torch.no_grad()
def draws(posterior: Posterior, count: int) -> Tensor:
    """Weight vectors of a posterior; the same noise for all posteriors, as far as they take as many numbers."""
    return posterior.draw(torch.randn(count, posterior.noise_size, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def free_energy(bnn: stfbnn.BayesianNetwork, x: Tensor, y: Tensor) -> float:
    """E_q[NLL] + KL(q‖p) / N at T = 1, nats per example."""
    total = 0.0
    for part in draws(bnn.posterior, TRAIN_DRAWS).split(AT_ONCE):
        picked = log_probs(bnn, part, x).gather(2, y.expand(len(part), -1).unsqueeze(2))
        total -= float(picked.sum())
    return total / (TRAIN_DRAWS * len(y)) + float(bnn.posterior.kl(bnn.prior)) / len(y)


def nll(probs: Tensor, y: Tensor) -> float:
    """Mean −log p(y)."""
    return float(-probs.gather(1, y.unsqueeze(1)).log().mean())


@torch.no_grad()
def against(reference: SampledPosterior, posterior: Posterior) -> dict[str, float]:
    """How far the moments are from the reference's."""
    mean, std, covariance = reference.mean_vector(), reference.std_vector(), reference.covariance()
    return {
        "mean error": float(((posterior.mean_vector() - mean) / std).square().mean().sqrt()),
        "std ratio": float((posterior.std_vector() / std).log().mean().exp()),
        "covariance error": float((posterior.covariance() - covariance).norm() / covariance.norm()),
    }


def distance(probs: Tensor, reference: Tensor) -> float:
    """Total variation, averaged over inputs."""
    return float(0.5 * (probs - reference).abs().sum(1).mean())


def one_seed(seed: int) -> dict[str, Any]:
    """Stage one, the chains, and every contestant."""
    (x, y), (test_x, test_y) = digits(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10))
    stfbnn.train(
        model, loader(x, y, seed), epochs=STAGE_ONE_EPOCHS, seed=seed, optimizer="adam", lr=0.01, weight_decay=0.0
    )

    def fresh(family: str | PosteriorFamily = "mean-field") -> stfbnn.BayesianNetwork:
        return stfbnn.bayesianize(model, x[:2], posterior=family)

    bnn = fresh()
    run = sample_hmc(bnn, loader(x, y, seed), samples=SAMPLES, warmup=WARMUP, chains=CHAINS, seed=seed)
    reference = bnn.posterior
    assert isinstance(reference, SampledPosterior)
    probs = predictive(bnn, reference.samples, test_x)
    half = len(reference) // 2
    parts = [SampledPosterior(bnn.layout, part) for part in reference.samples.split(half)]
    halves = [predictive(bnn, part.samples, test_x) for part in parts]
    print(
        f"seed {seed}: largest R̂ {run.largest_rhat:.4f}, smallest ESS {run.smallest_ess:.0f}, {run.seconds:.0f} s",
        flush=True,
    )
    network = fresh()
    trained = log_probs(network, network.trained_vector().unsqueeze(0), test_x)[0].exp()
    methods: dict[str, dict[str, float]] = {
        "HMC": {
            "test NLL": nll(probs, test_y),
            "seconds": run.seconds,
            "largest R̂": run.largest_rhat,
            "ESS a second": run.smallest_ess / run.seconds,
        },
        "HMC, half of the chains against the other": {
            "predictive TV": distance(halves[0], halves[1]),
            **against(parts[1], parts[0]),
            "test NLL": nll(halves[0], test_y),
        },
        "network": {"predictive TV": distance(trained, probs), "test NLL": nll(trained, test_y)},
    }
    for name, (family, engine, options) in CONTESTANTS.items():
        began = time.perf_counter()
        try:
            bnn = fresh(family)
            stfbnn.fit(
                bnn,
                loader(x, y, seed),
                epochs=EPOCHS,
                engine=engine,
                engine_options=options,
                temperature=1.0,
                seed=seed,
            )
        except InputError as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        seconds = time.perf_counter() - began
        found = predictive(bnn, draws(bnn.posterior, TEST_DRAWS), test_x)
        methods[name] = {
            "predictive TV": distance(found, probs),
            **against(reference, bnn.posterior),
            "test NLL": nll(found, test_y),
            "seconds": seconds,
        }
        if "ensemble" not in name:
            methods[name]["free energy"] = free_energy(bnn, x, y)
        print(f"{name}: {methods[name]}", flush=True)
    return {"seed": seed, "methods": methods, "hmc": run.as_dict(), "prior_std": float(network.prior.std)}


def main() -> None:
    """Run the seeds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    torch.set_num_threads(1)
    settings = {
        "train": TRAIN,
        "batch": BATCH,
        "hidden": HIDDEN,
        "stage_one_epochs": STAGE_ONE_EPOCHS,
        "epochs": EPOCHS,
        "chains": CHAINS,
        "warmup": WARMUP,
        "samples": SAMPLES,
        "test_draws": TEST_DRAWS,
        "train_draws": TRAIN_DRAWS,
        "engine_options": {name: dict(options) for name, (_, _, options) in CONTESTANTS.items()},
    }
    runs = []
    for seed in parser.parse_args().seeds:
        runs.append(one_seed(seed))
        write("hmc_reference", runs, settings)


if __name__ == "__main__":
    main()
