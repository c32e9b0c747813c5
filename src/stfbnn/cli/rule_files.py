"""Rules of when to abstain, on disk: with what they were made, so that none is used on another network's predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stfbnn.decision import AbstentionRule
from stfbnn.errors import InputError
from stfbnn.files import write_json
from stfbnn.network import BayesianNetwork

_FORMAT = "stfbnn-abstention-rule-1"


@dataclass(frozen=True)
class RuleFile:
    """A rule and the predictions that it is for.

    Attributes:
        rule: The rule.
        seed: Of the posterior draws.
        posterior: `posterior_digest` of the network.
    """

    rule: AbstentionRule
    seed: int
    posterior: str

    def write(self, path: Path) -> None:
        """Write it, atomically."""
        write_json(
            path, {"format": _FORMAT, "posterior": self.posterior, "seed": self.seed, "rule": self.rule.as_dict()}
        )

    @classmethod
    def read(cls, path: Path, bnn: BayesianNetwork) -> RuleFile:
        """Read a rule that is for this network.

        Raises:
            InputError: The file is missing or damaged, or for another posterior.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as the rule that `stfbnn abstain` wrote: {error}") from error
        if (
            not isinstance(content, Mapping)
            or content.get("format") != _FORMAT
            or not isinstance(content.get("seed"), int)
        ):
            raise InputError(f"{path} is no rule that `stfbnn abstain` wrote, or of another version: make it again")
        found = cls(AbstentionRule.from_dict(content.get("rule", {})), content["seed"], str(content.get("posterior")))
        if found.posterior != posterior_digest(bnn):
            raise InputError(
                f"{path} was made with another posterior than that of the run: what it promises holds for its own network "
                f"alone; run `stfbnn abstain` for this one"
            )
        return found


def posterior_digest(bnn: BayesianNetwork) -> str:
    """16 hexadecimal digits that identify the posterior, τ and the trained weights that it belongs to."""
    state = hashlib.blake2b(f"{bnn.predictive_temperature!r}".encode(), digest_size=8)
    tensors: Any = {**bnn.posterior.tensors(), "trained": bnn.trained_vector()}
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()
