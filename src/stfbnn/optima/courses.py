"""One run of a retraining: where its weights are, its Adam, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

# A held-out objective is better than another where it is lower by this share of it; those below the floor, nats per example,
# count as that, for a loss near 0 would otherwise go on improving by nothing.
_NOTABLE = 1e-3
_FLOOR = 1e-2
_LOWER = 0.1

Status = Literal["running", "converged", "failed"]


class Course:
    """The weights of one run on their way from a start to an optimum, independent of all other runs.

    Args:
        start: Weights (d,).
        learning_rate: Adam's.
        weight_decay: c, where (c/2)‖w‖² is added to the loss.
        patience: Epochs without a notable improvement before the rate is lowered, and then before the run stops.
        finish: Makes weights (d,) ready for use, given which of them ever had a gradient, (d,); None where nothing is to be
            done, and then gradients are not watched.

    Attributes:
        weights: Where the run is, (d,).
        best: The weights of the lowest held-out objective of all epochs, (d,); the start where there was no finite one. The
            objective is the loss and the decay's part: what Adam minimises, on examples that it does not see.
        best_loss: The held-out loss there; infinite before the first epoch.
        history: The held-out loss after every epoch in which it was finite.
        epochs: How many there were.
        status: "converged" once that objective has stopped to improve, "failed" once it was not finite.
    """

    def __init__(
        self,
        start: Tensor,
        learning_rate: float,
        weight_decay: float,
        patience: int,
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.weights, self.best = start.clone(), start.clone()
        self.best_loss = math.inf
        self.history: list[float] = []
        self.epochs = 0
        self.status: Status = "running"
        self._learning_rate, self._weight_decay, self._patience = learning_rate, weight_decay, patience
        self._finish = finish
        self._used = None if finish is None else torch.zeros_like(start, dtype=torch.bool)
        self._best_objective = self._reference = math.inf
        self._waited = 0
        self._lowered = False
        self._adam: torch.optim.Adam | None = self._optimizer()

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.status == "running"

    def step(self, gradient: Tensor) -> None:
        """One step of Adam against the gradient (d,) of the mean loss of a minibatch, to which the decay's is added."""
        assert self._adam is not None  # noqa: S101 - a run that has stopped is not moved
        if self._used is not None:
            self._used |= gradient != 0
        self.weights.grad = gradient
        self._adam.step()
        self.weights.grad = None

    def finished(self) -> Tensor:
        """The weights as they would be used now, a copy (d,)."""
        if self._finish is None or self._used is None:
            return self.weights.clone()
        return self._finish(self.weights, self._used)

    def record(self, weights: Tensor, loss: float) -> None:
        """End an epoch.

        Args:
            weights: What `finished` gave.
            loss: The held-out loss there.
        """
        self.epochs += 1
        objective = loss
        if self._weight_decay:
            objective += self._weight_decay / 2 * float(weights.square().sum(dtype=torch.float64))
        if not math.isfinite(objective):
            self._stop("failed")
            return
        self.history.append(loss)
        if objective < self._best_objective:
            self.best, self.best_loss, self._best_objective = weights, loss, objective
        # Compared with where the waiting began, so that many small improvements in a row are seen together.
        notable = _NOTABLE * max(abs(self._reference), _FLOOR)
        if self._reference == math.inf or objective < self._reference - notable:
            self._reference, self._waited = objective, 0
            return
        self._waited += 1
        if self._waited < self._patience:
            return
        if self._lowered:
            self._stop("converged")
            return
        self._lowered, self._waited, self._reference = True, 0, self._best_objective
        self.weights.copy_(self.best)
        # Its averages belong to where the run was, not to where it goes on.
        self._adam = self._optimizer()

    def state(self) -> dict[str, Any]:
        """All that the run needs to go on."""
        return {
            # What has stopped needs its best weights alone.
            "weights": self.weights if self.running else None,
            "adam": None if self._adam is None else self._adam.state_dict(),
            "used": self._used,
            "best": self.best,
            "best_loss": self.best_loss,
            "history": list(self.history),
            "epochs": self.epochs,
            "status": self.status,
            "best_objective": self._best_objective,
            "reference": self._reference,
            "waited": self._waited,
            "lowered": self._lowered,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.best = state["best"].to(self.weights)
        self.weights.copy_(self.best if state["weights"] is None else state["weights"])
        self.best_loss, self.history = state["best_loss"], list(state["history"])
        self.epochs, self.status = state["epochs"], state["status"]
        self._best_objective, self._reference = state["best_objective"], state["reference"]
        self._waited, self._lowered = state["waited"], state["lowered"]
        if self._used is not None:
            self._used.copy_(state["used"])
        if state["adam"] is None:
            self._adam = None
        else:
            self._adam = self._optimizer()
            self._adam.load_state_dict(state["adam"])

    def _optimizer(self) -> torch.optim.Adam:
        rate = self._learning_rate * (_LOWER if self._lowered else 1.0)
        return torch.optim.Adam([self.weights], lr=rate, weight_decay=self._weight_decay)

    def _stop(self, status: Status) -> None:
        self.status, self._adam = status, None
        self.weights = self.best
