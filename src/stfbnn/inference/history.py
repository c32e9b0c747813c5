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
        kl: KL(q‖p), nats, summed over the first layer's parameters; for a point mass, which has none, −log p(w).
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
class StageStart:
    """q before the first step at one temperature, with the width that the engine gave it.

    Attributes:
        temperature: T of the stage.
        kl: KL(q‖p), nats.
        mean_std: The mean of the posterior's standard deviations.
        nll: E_q[−log p(y | x, w)] of the first minibatch before the first step, nats per example.
    """

    temperature: float
    kl: float
    mean_std: float
    nll: float


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
class ComponentRecord:
    """One component of a mixture.

    Attributes:
        number: From 0, which started from the trained weights.
        start: "trained", "reinitialize" or "perturb".
        history: Every epoch of its inference, or of its retraining where it is a point mass.
        retraining: Every epoch of its retraining before that.
        nll: E_q[−log p(y | x, w)] on the training data over its last epoch, nats per example.
        held_out_nll: Of its own averaged predictive, nats per example; None without held-out data.
        distance: ‖μ − μ₀‖ / ‖μ₀‖, between its mean and that of component 0.
        disagreement: On held-out data, for classes the share of predictions that differ from those of component 0, for numbers
            the root mean square difference of the means over that of component 0's standard deviations; None without.
        weight: π in the mixture; 0 if it was dropped.
        reason: Why it was dropped; empty if it was kept.
        retraining_seconds: Wall time of finding and retraining it.
        inference_seconds: Wall time of inferring it, the look at the data included.
    """

    number: int
    start: str
    history: tuple[FitRecord, ...]
    retraining: tuple[FitRecord, ...]
    nll: float
    held_out_nll: float | None
    distance: float
    disagreement: float | None
    weight: float
    reason: str
    retraining_seconds: float
    inference_seconds: float

    @property
    def kept(self) -> bool:
        """Whether it is part of the mixture."""
        return not self.reason


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
        held_out_nll: Of the posterior that was kept, nats per example; None without held-out data.
        components: What became of each component of a mixture; empty for other posteriors. ``history`` and ``trials`` are
            those of component 0.
        starts: Where each temperature started.
        engine: The engine's name.
        ranks: Processes that took part.
        bytes_per_step: What each of them put into the sums of a step, the gradients of the first layer; 0 for one process, and
            where a checkpoint left no step to do.
    """

    history: tuple[FitRecord, ...]
    trials: tuple[TemperatureTrial, ...]
    network_held_out_nll: float | None
    temperature: float
    predictive_temperature: float
    num_examples: int
    seconds: float
    held_out_nll: float | None = None
    components: tuple[ComponentRecord, ...] = ()
    starts: tuple[StageStart, ...] = ()
    engine: str = ""
    ranks: int = 1
    bytes_per_step: int = 0

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

    def component_table(self) -> Table:
        """A mixture's components, for a terminal; the seconds are those of retraining and of inference."""
        lines = [f"Component {one.number} {one.reason}." for one in self.components if not one.kept]
        if self.held_out_nll is not None:
            lines.append(f"The mixture's held-out NLL is {self.held_out_nll:.4f}.")
        if self.network_held_out_nll is not None:
            lines.append(f"The trained network's own held-out NLL is {self.network_held_out_nll:.4f}.")
        table = Table(
            title="Components", title_justify="left", caption="\n".join(lines) or None, caption_justify="left"
        )
        for heading in ("", "start", "NLL", "held-out", "dist.", "differs", "weight", "seconds"):
            table.add_column(heading, justify="left" if heading == "start" else "right", no_wrap=True)
        for one in self.components:
            table.add_row(
                str(one.number),
                one.start,
                f"{one.nll:.4f}",
                "" if one.held_out_nll is None else f"{one.held_out_nll:.4f}",
                f"{one.distance:.2f}",
                "" if one.disagreement is None else f"{one.disagreement:.1%}",
                f"{one.weight:.3f}" if one.kept else "dropped",
                f"{one.retraining_seconds:.1f}+{one.inference_seconds:.1f}",
                style="bold" if one.kept else "dim",
            )
        return table

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self)
