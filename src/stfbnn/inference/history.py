"""What a run of stage two tells: its course epoch by epoch, and what was chosen on held-out data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class FitRecord:
    """One epoch.

    Attributes:
        temperature: T of the stage.
        epoch: Epochs done in this stage, from 1.
        free_energy: F = nll + (T/N) KL, nats per example; the NLL averaged over the epoch, the KL at its end.
        nll: E_q[−log p(y | x, w)] on the training data, nats per example.
        kl: KL(q‖p), nats, summed over the first layer's parameters.
        mean_std: The mean of the posterior's standard deviations.
        held_out_nll: Of the averaged predictive on the held-out data; None where it was not asked for.
        seconds: Wall time of the epoch.
    """

    temperature: float
    epoch: int
    free_energy: float
    nll: float
    kl: float
    mean_std: float
    held_out_nll: float | None
    seconds: float


@dataclass(frozen=True)
class TemperatureTrial:
    """One temperature that was tried.

    Attributes:
        temperature: T.
        held_out_nll: Of the averaged predictive at the end of its stage, nats per example.
        predictive_temperature: τ chosen with it; 1 where none was asked for.
    """

    temperature: float
    held_out_nll: float
    predictive_temperature: float


@dataclass(frozen=True)
class FitRun:
    """The result of `fit`.

    Attributes:
        history: Every epoch, in order.
        trials: The temperatures that were tried on held-out data; empty without.
        network_held_out_nll: The trained network's own held-out NLL, to compare the trials with; None without held-out data.
        temperature: T of the posterior that was kept.
        predictive_temperature: τ that was kept.
        num_examples: N.
        seconds: Wall time of stage two.
    """

    history: tuple[FitRecord, ...]
    trials: tuple[TemperatureTrial, ...]
    network_held_out_nll: float | None
    temperature: float
    predictive_temperature: float
    num_examples: int
    seconds: float

    def table(self) -> Table:
        """The last epoch of every stage, for a terminal."""
        own = self.network_held_out_nll
        caption = None if own is None else f"The trained network's own held-out NLL is {own:.4f}."
        table = Table(title="Stage two", title_justify="left", caption=caption, caption_justify="left")
        for heading in ("T", "epochs", "free energy", "NLL", "KL", "mean σ", "held-out NLL", "τ", "seconds"):
            table.add_column(heading, justify="right")
        trials = {trial.temperature: trial for trial in self.trials}
        for temperature in dict.fromkeys(record.temperature for record in self.history):
            records = [record for record in self.history if record.temperature == temperature]
            last, trial = records[-1], trials.get(temperature)
            table.add_row(
                f"{temperature:g}",
                str(last.epoch),
                f"{last.free_energy:.4f}",
                f"{last.nll:.4f}",
                f"{last.kl:.0f}",
                f"{last.mean_std:.4f}",
                f"{trial.held_out_nll:.4f}" if trial else "",
                f"{trial.predictive_temperature:.3f}" if trial else f"{self.predictive_temperature:.3f}",
                f"{sum(record.seconds for record in records):.1f}",
                style="bold" if temperature == self.temperature else None,
            )
        return table

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self)
