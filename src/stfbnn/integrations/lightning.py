"""Stage two as a callback of Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stfbnn.errors import InputError
from stfbnn.inference.history import FitRun
from stfbnn.integrations.stage_two import StageTwoOptions, ToBatch, in_one_process
from stfbnn.network import BayesianNetwork

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise InputError('the callback for Lightning needs Lightning: pip install "stfbnn[lightning]"') from error


class StageTwo(Callback):
    """Makes the network Bayesian when ``Trainer.fit`` has ended, from the trainer's own data.

        stage_two = StageTwo(network="model", bayesianize={"prior": "rms"}, epochs=8)
        Trainer(callbacks=[stage_two]).fit(module, train_loader, val_loader)
        stfbnn.predict(stage_two.bnn, test_loader)

    The trainer's first validation loader is what is held out, for choosing T: no stage may have trained on it. A training in
    several processes is left as it is, with a warning.

    Args:
        network: Dotted name of the network within the LightningModule, such as "model"; "" for the module itself, whose
            forward then has to return logits or means.
        to_batch: Brings the loaders' batches into the form (inputs, target), or a mapping with "labels"; None where they
            have it.
        val_loader: What is held out; None takes the trainer's, where it has one.
        bayesianize: Keyword arguments of `stfbnn.bayesianize`, such as ``{"posterior": "full"}``.
        **fit: Keyword arguments of `stfbnn.fit`.

    Attributes:
        bnn: The Bayesian network; None until training has ended.
        run: How inference went.

    Raises:
        InputError: An argument is unknown.
    """

    def __init__(
        self,
        *,
        network: str = "",
        to_batch: ToBatch | None = None,
        val_loader: Iterable[Any] | None = None,
        bayesianize: Mapping[str, Any] | None = None,
        **fit: Any,
    ) -> None:
        super().__init__()
        self._options = StageTwoOptions(network, to_batch, bayesianize or {}, fit, val_loader)
        self.bnn: BayesianNetwork | None = None
        self.run: FitRun | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a name that is not there before training, not after it."""
        del trainer
        self._options.network_of(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Infer."""
        if not in_one_process(trainer.world_size):
            return
        held_out = trainer.val_dataloaders
        if isinstance(held_out, list | tuple):
            held_out = held_out[0] if held_out else None
        self.bnn, self.run = self._options.run(pl_module, trainer.train_dataloader, held_out)
