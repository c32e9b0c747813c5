"""What a fit to a bound tells: its course epoch by epoch, and what was kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from stfbnn.files import plain


@dataclass(frozen=True)
class BoundRecord:
    """The posterior after one epoch; epoch 0 is the start. All are estimates on the data that it is fitted to.

    Attributes:
        epoch: Epochs done.
        bound: The objective: the bound on the risk of the bounded cross-entropy.
        risk: r̂ of the bounded cross-entropy, in [0, 1].
        error: r̂ of the 0-1 loss, of the sampled classifier.
        error_bound: The same form of bound on the 0-1 risk.
        kl: KL(q‖p), nats.
        weight: T, by which KL/n counts beside r̂ in the epoch that follows.
        lam: λ for the λ-form; None for the others.
        mean_std: The mean of the posterior's standard deviations.
        seconds: Wall time of the epoch, the estimate included.
    """

    epoch: int
    bound: float
    risk: float
    error: float
    error_bound: float
    kl: float
    weight: float
    lam: float | None
    mean_std: float
    seconds: float


@dataclass(frozen=True)
class BoundRun:
    """The result of `fit_bound`.

    Attributes:
        objective: The form of the bound.
        history: The start and every epoch.
        kept: The epoch whose posterior was kept.
        num_examples: n.
        delta: δ.
        priors: k.
        p_min: Of the bounded cross-entropy.
        temperature: The T of `fit` that goes with the posterior: see `fit_bound`.
        seen_before: How many of the n examples stage one is known to have seen: if any, no bound holds for these n.
        engine: The engine's name.
        seconds: Wall time.
    """

    objective: str
    history: tuple[BoundRecord, ...]
    kept: int
    num_examples: int
    delta: float
    priors: int
    p_min: float
    temperature: float
    seen_before: int
    engine: str
    seconds: float

    @property
    def start(self) -> BoundRecord:
        """Before the first epoch."""
        return self.history[0]

    @property
    def best(self) -> BoundRecord:
        """The posterior that was kept."""
        return self.history[self.kept]

    def verdict(self) -> str:
        """What the fit came to, in words."""
        first, kept = self.start, self.best
        said = (
            f"The bound on the 0-1 risk went from {first.error_bound:.4f} at the start to {kept.error_bound:.4f} "
            f"(sampled classifier's error {first.error:.4f} to {kept.error:.4f}, KL {first.kl:.1f} to {kept.kl:.1f} nats) on "
            f"n = {self.num_examples} examples. These are estimates: the certificate charges for its draws"
        )
        if self.seen_before:
            said += f", and stage one saw {self.seen_before} of these examples, so certify on the others"
        return said + "."

    def table(self) -> Table:
        """Every epoch, for a terminal."""
        table = Table(
            title=f"Fit to the {self.objective} bound",
            title_justify="left",
            caption=self.verdict(),
            caption_justify="left",
        )
        for heading in ("epoch", "bound", "risk", "0-1 bound", "0-1 error", "KL", "T", "mean σ", "seconds"):
            table.add_column(heading, justify="right")
        for one in self.history:
            table.add_row(
                str(one.epoch),
                f"{one.bound:.4f}",
                f"{one.risk:.4f}",
                f"{one.error_bound:.4f}",
                f"{one.error:.4f}",
                f"{one.kl:.1f}",
                f"{one.weight:.3g}",
                f"{one.mean_std:.4f}",
                f"{one.seconds:.1f}",
                style="bold" if one.epoch == self.kept else None,
            )
        return table

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        found: dict[str, Any] = plain(asdict(self))
        return found
