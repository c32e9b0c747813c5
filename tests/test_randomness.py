"""Seeds: everything follows from one, and nothing of the user's is disturbed."""

import random

import numpy as np
import pytest
import torch

from stfbnn.errors import InputError
from stfbnn.randomness import derive_seed, generator, seeded


def test_places_have_seeds_of_their_own() -> None:
    seeds = {derive_seed(seed, *path) for seed in range(20) for path in ((), ("a",), ("a", 1), ("a", 2), ("b", 1))}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, "epoch", 7) == derive_seed(3, "epoch", 7)
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")


def test_a_known_value_so_that_old_runs_stay_reproducible() -> None:
    assert derive_seed(0, "draw", 0) == 5045317517019951982


def test_generators() -> None:
    first = torch.randn(3, generator=generator(1, "x"))
    assert torch.equal(first, torch.randn(3, generator=generator(1, "x")))
    assert not torch.equal(first, torch.randn(3, generator=generator(1, "y")))


def test_a_seeded_block_is_reproducible_and_leaves_no_trace() -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded(5, "here"):
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_state_comes_back_after_an_error() -> None:
    state = torch.get_rng_state()

    def fail() -> None:
        with seeded(0):
            torch.rand(3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [-1, 1.5, "0", None, True])
def test_bad_seeds(bad: object) -> None:
    with pytest.raises(InputError, match="non-negative integer"):
        derive_seed(bad)  # type: ignore[arg-type]
