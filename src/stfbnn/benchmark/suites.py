"""Which tasks a suite has, and how much work it does on each.

Stage two's epochs and all sizes were set with an eye on held-out examples and on the clock, never on test examples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stfbnn.benchmark.tasks import Task
from stfbnn.errors import InputError

_ADAM = {"optimizer": "adam", "lr": 1e-3, "schedule": "constant"}
_SGD = {"optimizer": "sgd", "lr": 0.1, "schedule": "cosine"}
_SEEDS = (0, 1, 2)
# A network whose training takes many minutes is made fully Bayesian by one engine alone.
_SLOW = ("bnn-scratch-natural", "bnn-pretrained-natural")
# The folder of each table, and after how many epochs of stage one its held-out density no longer rose.
_UCI = {
    "boston": ("bostonHousing", 200),
    "concrete": ("concrete", 200),
    "energy": ("energy", 200),
    "power": ("power-plant", 40),
    "wine": ("wine-quality-red", 20),
    "yacht": ("yacht", 300),
}


@dataclass(frozen=True)
class Suite:
    """Tasks, and how many settings of each method's hyper-parameters are tried on them.

    Attributes:
        name: Of the suite.
        about: For a person.
        budget: Settings.
        tasks: In the order in which they are run.
    """

    name: str
    about: str
    budget: int
    tasks: tuple[Task, ...]


def _table(name: str, seeds: tuple[int, ...]) -> Task:
    """A regression of the Bayesian deep-learning literature: one hidden layer of 50 units, fixed splits as seeds."""
    folder, epochs = _UCI[name]
    return Task(
        name=f"uci-{name}",
        source=f"uci-gal-splits/{folder}",
        network="table-mlp",
        seeds=seeds,
        epochs=epochs,
        options={**_ADAM, "lr": 1e-2, "schedule": "cosine"},
        fit_epochs=max(10, epochs // 4),
        held_out=0.15,
        batch=32,
        shifted=100_000,
        budget=2,
    )


_DIGITS = Task(
    name="digits-mlp",
    source="digits",
    network="mlp",
    seeds=_SEEDS,
    epochs=25,
    options=_ADAM,
    fit_epochs=8,
    held_out=0.25,
    batch=64,
    outside=("inverted", "photo patches"),
)
_DIABETES = Task(
    name="diabetes",
    source="diabetes",
    network="table-mlp",
    seeds=_SEEDS,
    epochs=10,
    options={**_ADAM, "lr": 1e-2, "schedule": "cosine"},
    fit_epochs=10,
    held_out=0.2,
    batch=32,
)
_FASHION_SMALL = Task(
    name="fashion-mlp-small",
    source="fashion-mnist",
    network="mlp",
    seeds=_SEEDS,
    epochs=20,
    options=_ADAM,
    fit_epochs=6,
    held_out=1_500,
    train=3_000,
    test=2_000,
    outside=("kmnist-test", "inverted"),
    shifted=300,
    samples=16,
)


def _large(task: Task, *left_out: str) -> Task:
    """A task whose one training takes many minutes: one setting of each method, and not every method."""
    return replace(task, budget=1, courses=False, left_out=left_out)


def _images(name: str, source: str, network: str, epochs: int, options: dict[str, object], fit_epochs: int) -> Task:
    other = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}.get(source)
    return Task(
        name=name,
        source=source,
        network=network,
        seeds=_SEEDS,
        epochs=epochs,
        options=options,
        fit_epochs=fit_epochs,
        held_out=10_000 if source != "cifar10-jpeg" else 5_000,
        choose=5_000,
        outside=("kmnist-test", other, "inverted") if other else ("inverted", "noise"),
        precision="bf16-mixed" if network == "resnet20" else "32-true",
        shifted=1_000,
    )


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "smoke",
            "two settings on small tables and digits that come with scikit-learn: does everything run?",
            1,
            (
                replace(_DIGITS, seeds=(0,), epochs=3, fit_epochs=1),
                replace(_DIABETES, seeds=(0,), epochs=3, fit_epochs=1),
            ),
        ),
        Suite(
            "quick",
            "small tasks, up to three settings each: under ten minutes on two cores",
            3,
            # The longest first, so that processes side by side end together.
            (_FASHION_SMALL, _table("yacht", _SEEDS), _DIGITS, _DIABETES),
        ),
        Suite(
            "full",
            "all tasks, up to three settings each: a night",
            3,
            (
                _images("mnist-mlp", "mnist", "mlp", 20, _ADAM, 8),
                _images("mnist-lenet", "mnist", "lenet", 12, _ADAM, 4),
                _large(_images("mnist-resnet20", "mnist", "resnet20", 3, _SGD, 1), *_SLOW),
                _images("fashion-mlp", "fashion-mnist", "mlp", 25, _ADAM, 8),
                _images("fashion-lenet", "fashion-mnist", "lenet", 15, _ADAM, 4),
                _large(_images("fashion-resnet20", "fashion-mnist", "resnet20", 4, _SGD, 1), *_SLOW),
                _large(_images("cifar-resnet20", "cifar10-jpeg", "resnet20", 10, _SGD, 2), *_SLOW),
                Task(
                    name="sst2-minilm",
                    source="sst2",
                    network="minilm",
                    seeds=_SEEDS,
                    epochs=3,
                    options={"optimizer": "adamw", "lr": 5e-5, "warmup": 0.1, "clip_norm": 1.0},
                    fit_epochs=1,
                    batch=32,
                    outside=("trec",),
                    samples=8,
                    precision="bf16-mixed",
                    budget=1,
                    courses=False,
                    left_out=(*_SLOW, "bnn-scratch", "stf-bnn-mixture"),
                ),
                *(_table(name, tuple(range(20))) for name in _UCI),
            ),
        ),
    )
}


def suite_named(name: str) -> Suite:
    """The suite of a name.

    Raises:
        InputError: There is none.
    """
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name]


def built_in_tasks() -> dict[str, Task]:
    """All tasks by name; of one that several suites have, the largest form."""
    return {task.name: task for suite in SUITES.values() for task in suite.tasks}
