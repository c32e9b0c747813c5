"""Stage two as a callback of the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stfbnn.errors import InputError
from stfbnn.inference.history import FitRun
from stfbnn.integrations.stage_two import StageTwoOptions, ToBatch, in_one_process
from stfbnn.network import BayesianNetwork

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise InputError('the callback for transformers needs it: pip install "stfbnn[transformers]"') from error


class StageTwo(TrainerCallback):
    """Makes the network Bayesian when ``Trainer.train`` has ended, from the trainer's own data.

        stage_two = StageTwo(bayesianize={"layer": "bert.embeddings.position_embeddings"}, epochs=4)
        Trainer(model, arguments, train_dataset=…, eval_dataset=…, callbacks=[stage_two]).train()
        stfbnn.predict(stage_two.bnn, test_loader)

    The trainer's evaluation data are what is held out, for choosing T, where it evaluates while it trains (``eval_strategy``):
    no stage may have trained on them. A training in several processes is left as it is, with a warning.

    Args:
        network: Dotted name of the network within the model; "" for the model itself.
        to_batch: Brings the loaders' batches into another form; None where they are mappings with "labels".
        val_loader: What is held out; None takes the trainer's evaluation data, where it evaluates.
        bayesianize: Keyword arguments of `stfbnn.bayesianize`, such as the ``layer``.
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
        self._options = StageTwoOptions(network, to_batch, bayesianize or {}, fit, val_loader)
        self.bnn: BayesianNetwork | None = None
        self.run: FitRun | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a name that is not there before training, not after it."""
        del args, state, control
        self._options.network_of(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Infer."""
        del state, control
        if not in_one_process(args.world_size):
            return
        train, held_out = kwargs.get("train_dataloader"), kwargs.get("eval_dataloader")
        self.bnn, self.run = self._options.run(kwargs["model"], train, held_out)
