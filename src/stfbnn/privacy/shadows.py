"""Shadow models: networks of which each saw a random half of a pool, so that every example has been in and out often.

Stage one of a shadow model is trained once and shared by all releases. What is kept of a release on a shadow model is what an
observer measures of it; every piece is kept as soon as it is there, and a study that was killed goes on to the same numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from stfbnn.baselines.predictor import Predictor, call_network, evaluating
from stfbnn.batches import module_device, require_finite
from stfbnn.checkpoint import load_checkpoint, prepare_checkpoint, save_checkpoint
from stfbnn.errors import CheckpointError, InputError
from stfbnn.privacy.releases import Release, ReleaseData, describe
from stfbnn.progress import Reporter, progress_bar
from stfbnn.randomness import derive_seed, generator, seeded
from stfbnn.weights_file import save_weights

TrainModel: TypeAlias = Callable[[Tensor, int], nn.Module]
"""From the members' numbers in the pool, (n,), and a seed to a trained network."""

Observe: TypeAlias = Callable[[Predictor], Mapping[str, Tensor]]
"""From a release to what is kept of it: tensors by name, of the same names and shapes for every shadow model."""


@dataclass(frozen=True, eq=False)
class Design:
    """Which shadow model trains on which example.

    Attributes:
        membership: (M, N), True where model m trains on example n.
    """

    membership: Tensor

    @classmethod
    def balanced(cls, examples: int, models: int, seed: int = 0) -> Design:
        """Each example in exactly half of the models, and each model on half of the examples (Carlini et al., 2022).

        Examples are paired at random: one of a pair goes to a random half of the models, the other to the rest. So models do
        not differ in size, the last example of an odd number apart.

        Args:
            examples: N, at least 2.
            models: M, even, at least 2.
            seed: Of the halves.

        Raises:
            InputError: M is odd or too small, or N is.
        """
        if isinstance(models, bool) or not isinstance(models, int) or models < 2 or models % 2:
            raise InputError(
                f"each example is to be in exactly half of the models, so models must be an even number of at least 2, "
                f"but it is {models!r}"
            )
        if isinstance(examples, bool) or not isinstance(examples, int) or examples < 2:
            raise InputError(f"a design needs at least 2 examples, but there are {examples!r}")
        random = generator(seed, "shadow design")
        order = torch.randperm(examples, generator=random)
        halves = torch.rand(models, (examples + 1) // 2, generator=random).argsort(dim=0).argsort(dim=0) < models // 2
        membership = torch.empty(models, examples, dtype=torch.bool)
        membership[:, order[0::2]] = halves
        membership[:, order[1::2]] = ~halves[:, : examples // 2]
        return cls(membership)

    def __len__(self) -> int:
        """M."""
        return len(self.membership)

    def members(self, model: int) -> Tensor:
        """Numbers of a model's examples, ascending."""
        return self.membership[model].nonzero().squeeze(1)

    def fewest(self, models: Sequence[int]) -> int:
        """The most c such that every example has c of ``models`` that had it, and c that had not."""
        had = self.membership[list(models)].sum(dim=0)
        return int(torch.minimum(had, len(models) - had).min())

    def matched(self, models: Sequence[int], each: int, seed: int = 0) -> Tensor:
        """For every example as many models that had it as models that had not, chosen at random.

        In a balanced design an attacked model's members were in one other model fewer than its non-members, so that whoever
        counts knows. An attack on equal numbers cannot.

        Args:
            models: To choose from.
            each: c, at most `fewest`.
            seed: Of the choice, which depends on these models alone.

        Returns:
            Numbers of models, (2 c, N): c that had the example, then c that had not.

        Raises:
            InputError: c is below 1 or more than there are.
        """
        most = self.fewest(models)
        if not 1 <= each <= most:
            raise InputError(
                f"each must be from 1 to {most}, the fewest models with and without an example, not {each}"
            )
        had = self.membership[list(models)]
        keys = torch.rand(had.shape, generator=generator(seed, "matched", *models))
        chosen = [torch.where(kind, keys, 2.0).argsort(dim=0)[:each] for kind in (had, ~had)]
        return torch.tensor(list(models))[torch.cat(chosen)]


@dataclass(frozen=True, eq=False)
class Pool:
    """The examples of a study.

    Attributes:
        inputs: (N, …), float32, as the networks take them: candidates for training.
        labels: (N,), int64.
        held_inputs: (h, …), that no shadow model trains on.
        held_labels: (h,).

    Raises:
        InputError: The tensors are not of these forms, or inputs are not finite.
    """

    inputs: Tensor
    labels: Tensor
    held_inputs: Tensor
    held_labels: Tensor

    def __post_init__(self) -> None:
        _require_examples(self.inputs, self.labels, "the pool's")
        _require_examples(self.held_inputs, self.held_labels, "the held-out")
        if self.inputs.shape[1:] != self.held_inputs.shape[1:]:
            raise InputError(
                f"pool and held-out examples must be of one shape, but they are {tuple(self.inputs.shape[1:])} and "
                f"{tuple(self.held_inputs.shape[1:])}"
            )

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that identify all examples, their labels and their order."""
        found = hashlib.blake2b(digest_size=16)
        for tensor in (self.inputs, self.labels, self.held_inputs, self.held_labels):
            found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def require_labels(self, classes: int) -> None:
        """Refuse labels that a network of so many classes has not.

        Raises:
            InputError: There are some.
        """
        for what, labels in (("pool", self.labels), ("held-out", self.held_labels)):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= classes:
                raise InputError(
                    f"labels must be in 0 … {classes - 1}, for the network has {classes} outputs, but those of the {what} "
                    f"examples span {low} … {high}"
                )


@dataclass(frozen=True, eq=False)
class Shadows:
    """All that is needed to train shadow models and to observe releases on them.

    Attributes:
        pool: The examples.
        design: Who trains on what.
        train_model: Stage one.
        make_model: An untrained network of the same architecture, into which kept weights are loaded.
        seed: Of everything random; ``train_model`` gets one derived from it.
        folder: Where stage one and what was observed are kept; None keeps nothing.
        settings: What else identifies ``train_model`` (architecture, epochs …), JSON values: a study with others is refused.
        batch_size: Of the releases' loaders.
    """

    pool: Pool
    design: Design
    train_model: TrainModel
    make_model: Callable[[], nn.Module]
    seed: int = 0
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 128

    def check(self) -> int:
        """Find out before any training whether it can work.

        Returns:
            The number of classes.

        Raises:
            InputError: The design is for another pool, the network does not run on it, gives no class scores, or labels are out
                of its range; or ``settings`` are not JSON.
            CheckpointError: The folder holds another study, or cannot be written to.
        """
        derive_seed(self.seed)
        if self.design.membership.shape[1] != len(self.pool.labels):
            raise InputError(
                f"the design is for {self.design.membership.shape[1]} examples, but the pool has {len(self.pool.labels)}"
            )
        model = self.fresh()
        if not isinstance(model, nn.Module):
            raise InputError(f"make_model must give a torch.nn.Module, but it gave a {type(model).__name__}")
        with torch.no_grad(), evaluating(model):
            outputs = call_network(model, self.pool.inputs[:2].to(module_device(model)))
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise InputError(f"the network must give class scores (B, K), but its outputs are {tuple(outputs.shape)}")
        self.pool.require_labels(outputs.shape[1])
        if self.folder is not None:
            path = self.folder / "design.ckpt"
            prepare_checkpoint(path, self._signature())
            if load_checkpoint(path, self._signature()) is None:
                save_checkpoint(path, {"membership": self.design.membership}, self._signature())
        return int(outputs.shape[1])

    def run(
        self,
        releases: Mapping[str, Release],
        observe: Observe,
        observed: Mapping[str, Any],
        progress: bool | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Train all shadow models, and observe every release on each of them.

        Args:
            releases: By name.
            observe: What is kept of each.
            observed: What identifies ``observe``, JSON values.
            progress: Show a progress bar; None shows it on a terminal.

        Returns:
            For each release the tensors that were observed, by name, stacked over the models: (M, …).

        Raises:
            InputError: As of `check`, networks do not fit ``make_model``, or what is observed differs between models.
            CheckpointError: A kept file is damaged, or of other settings.
        """
        self.check()
        kept = {
            (model, name): None
            if self.folder is None
            else load_checkpoint(self._path(model, name), self._identity(model, name, release, observed))
            for model in range(len(self.design))
            for name, release in releases.items()
        }
        missing = [one for one, state in kept.items() if state is None]
        paths = {model: weights_path(self.folder, model, 0) for model, _ in missing}
        untrained = sum(path is None or not path.exists() for path in paths.values())
        found: dict[str, list[dict[str, Tensor]]] = {name: [] for name in releases}
        with progress_bar("shadow models", len(missing) + untrained, progress) as bar:
            stage_one = StageOne(self, 0, bar)
            for (model, name), state in kept.items():
                if stage_one.model != model:
                    stage_one = StageOne(self, model, bar)
                if state is not None:
                    found[name].append(state)
                    continue
                bar.describe(f"shadow {model + 1} of {len(self.design)}: {name}")
                fresh = self._observe(stage_one, name, releases[name], observe)
                if self.folder is not None:
                    identity = self._identity(model, name, releases[name], observed)
                    save_checkpoint(self._path(model, name), fresh, identity)
                found[name].append(fresh)
                bar.advance()
        return {name: _stacked(name, states) for name, states in found.items()}

    def fresh(self) -> nn.Module:
        """An untrained network; the global generators are left as they were."""
        with seeded(self.seed, "architecture"):
            return self.make_model()

    def _observe(self, stage_one: StageOne, name: str, release: Release, observe: Observe) -> dict[str, Tensor]:
        members, pool = self.design.members(stage_one.model), self.pool
        data = ReleaseData(
            inputs=pool.inputs[members],
            labels=pool.labels[members],
            held_inputs=pool.held_inputs,
            held_labels=pool.held_labels,
            batch_size=self.batch_size,
            another=stage_one,
        )
        with seeded(self.seed, "release", name, stage_one.model):
            predictor = release(stage_one(0), data, derive_seed(self.seed, "release", name, stage_one.model))
            if not isinstance(predictor, Predictor):
                raise InputError(
                    f"the release {name!r} must give a predictor as those of stfbnn.baselines are, but it gave a "
                    f"{type(predictor).__name__}"
                )
            return {key: value.detach().cpu().contiguous() for key, value in observe(predictor).items()}

    def _identity(self, model: int, name: str, release: Release, observed: Mapping[str, Any]) -> dict[str, Any]:
        own = {"release": name, "as": describe(release), "model": model, "batch_size": self.batch_size}
        return {**self._signature(), **own, "observed": dict(observed)}

    def _signature(self) -> dict[str, Any]:
        membership = self.design.membership.contiguous().numpy().tobytes()
        return {
            "data": self.pool.digest,
            "models": len(self.design),
            "design": hashlib.blake2b(membership, digest_size=16).hexdigest(),
            "seed": self.seed,
            "settings": dict(self.settings),
        }

    def _path(self, model: int, name: str) -> Path:
        assert self.folder is not None  # noqa: S101 - asked only where there is one
        # Any name is allowed, and no two names are one file.
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        mark = hashlib.blake2b(name.encode(), digest_size=3).hexdigest()
        return self.folder / "releases" / f"{plain}-{mark}" / f"{model}.ckpt"


class StageOne:
    """The trained networks of one shadow model: number 0 is shared by all releases, others are trained where one asks for them.

    Args:
        shadows: The study.
        model: Number of the shadow model.
        bar: Advanced once where number 0 is trained.
    """

    def __init__(self, shadows: Shadows, model: int, bar: Reporter) -> None:
        self.model = model
        self._shadows, self._bar = shadows, bar
        self._states: dict[int, dict[str, Tensor]] = {}

    def __call__(self, number: int) -> nn.Module:
        """A network of its own, in evaluation mode, so that no release sees what another does to it.

        Raises:
            InputError: ``train_model`` gives no network, or another one than ``make_model``.
            CheckpointError: Kept weights are damaged.
        """
        if number not in self._states:
            self._states[number] = self._read(number) or self._train(number)
        model = self._shadows.fresh()
        try:
            model.load_state_dict(self._states[number])
        except RuntimeError as error:
            raise InputError(f"train_model and make_model must give networks of one architecture: {error}") from error
        return model.eval()

    def _read(self, number: int) -> dict[str, Tensor] | None:
        path = weights_path(self._shadows.folder, self.model, number)
        if path is None or not path.exists():
            return None
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it, and it is trained again") from error

    def _train(self, number: int) -> dict[str, Tensor]:
        shadows = self._shadows
        self._bar.describe(f"shadow {self.model + 1} of {len(shadows.design)}: training")
        place = ("stage one", self.model, number)
        with seeded(shadows.seed, *place):
            trained = shadows.train_model(shadows.design.members(self.model), derive_seed(shadows.seed, *place))
        if not isinstance(trained, nn.Module):
            raise InputError(f"train_model must give a torch.nn.Module, but it gave a {type(trained).__name__}")
        path = weights_path(shadows.folder, self.model, number)
        if path is not None:
            save_weights(trained, path)
        if number == 0:
            self._bar.advance()
        return {name: value.detach().cpu().clone() for name, value in trained.state_dict().items()}


def weights_path(folder: Path | None, model: int, number: int) -> Path | None:
    """Where the weights of a shadow model's network are kept."""
    return None if folder is None else folder / "stage-one" / f"{model}-{number}.safetensors"


def _require_examples(inputs: Tensor, labels: Tensor, what: str) -> None:
    if not isinstance(inputs, Tensor) or inputs.dtype != torch.float32 or inputs.ndim < 2 or not len(inputs):
        raise InputError(f"{what} inputs must be one float32 tensor (N, …), N at least 1, as the network takes them")
    require_finite(inputs, f"{what} inputs")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        raise InputError(f"{what} labels must be one int64 class an input, of shape ({len(inputs)},)")


def _stacked(name: str, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    forms = [{key: tuple(value.shape) for key, value in state.items()} for state in states]
    odd = next((number for number, form in enumerate(forms) if form != forms[0]), None)
    if odd is not None:
        raise InputError(
            f"what is observed of {name!r} must be alike for all shadow models, but it is {forms[0]} for model 0 and "
            f"{forms[odd]} for model {odd}"
        )
    return {key: torch.stack([state[key] for state in states]) for key in states[0]}
