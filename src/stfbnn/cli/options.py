"""The options that several commands share, and the texts that explain them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stfbnn.cli.record import DataChoice
from stfbnn.errors import InputError

DATA, MODEL, INFERENCE, RUN = "Data", "Model", "Inference", "Run"

Source = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="File or folder with the data, also relative to $STFBNN_DATA, or 'digits' (in scikit-learn, no download). "
        "idx, npz, csv, parquet, image folders and UCI splits are recognised.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        help="idx, npz, csv, parquet, image-folder or uci, where it is not recognised.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(help="Column of the target (csv, parquet).", rich_help_panel=DATA, show_default=False),
]
Task = Annotated[
    str | None,
    typer.Option(help="classification or regression, where the targets mislead.", rich_help_panel=DATA),
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="Resize images to 32 or 32x48 (height x width).", rich_help_panel=DATA, show_default=False),
]
SplitNumber = Annotated[
    int, typer.Option("--split", help="Number of the train/test split (uci).", rich_help_panel=DATA)
]
Limit = Annotated[
    int | None,
    typer.Option(help="Use only so many examples of each part.", rich_help_panel=DATA, show_default=False),
]
BatchSize = Annotated[int, typer.Option(help="Examples a batch.", rich_help_panel=DATA)]
Mean = Annotated[
    str | None,
    typer.Option(
        help="What to subtract from the inputs: a number, or one a channel or column (0.49,0.48,0.45). "
        "Default: the training part's own. '--mean 0 --std 1' leaves inputs alone (images in 0 … 1).",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
Std = Annotated[str | None, typer.Option(help="What to divide by, likewise.", rich_help_panel=DATA, show_default=False)]
Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="'package.module:factory', a function or class that returns the network; modules in the current folder are "
        "found. If it takes input_shape or num_classes, it is given them.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
FactoryArguments = Annotated[
    str,
    typer.Option("--model-args", help="Its keyword arguments, as JSON: '{\"hidden\": 256}'.", rich_help_panel=MODEL),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="The trained weights: a state dict (.pt, .pth, .safetensors), or a checkpoint of `stfbnn train`.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(help="Posterior draws to average.", rich_help_panel=INFERENCE)]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.", rich_help_panel=RUN)]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto for the best there is.", rich_help_panel=RUN)
]
Devices = Annotated[
    str,
    typer.Option(
        help="Processes on each machine, each with a device of --device's kind; auto is what torchrun started, or 1.",
        rich_help_panel=RUN,
    ),
]
NumNodes = Annotated[int, typer.Option(help="Machines; under torchrun what it started.", rich_help_panel=RUN)]
Strategy = Annotated[
    str,
    typer.Option(help="Of several processes: auto, ddp or ddp_find_unused_parameters_true.", rich_help_panel=RUN),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="Go on from the checkpoint of a run that was stopped.", rich_help_panel=RUN
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=RUN)]


def help_text(text: str) -> str:
    """A command's help as the terminal's width asks for it: paragraphs flow, what is indented stays as it is."""
    paragraphs = [part.strip("\n").splitlines() for part in text.split("\n\n")]
    verbatim = [any(line.startswith(" ") for line in lines) for lines in paragraphs]
    return "\n\n".join(("\n" if kept else " ").join(lines) for lines, kept in zip(paragraphs, verbatim, strict=True))


def data_choice(
    source: str | None,
    kind: str | None,
    target: str | None,
    task: str | None,
    image_size: str | None,
    split: int,
    limit: int | None,
) -> DataChoice | None:
    """The options of one command about its data; None where no data are named.

    Raises:
        InputError: Other options of the kind are given all the same, or the image size is none.
    """
    if source is None:
        given = {
            "--kind": kind,
            "--target": target,
            "--task": task,
            "--image-size": image_size,
            "--split": split or None,
        }
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise InputError(f"{', '.join(extra)} say how to read --data, which is missing")
        return None
    return DataChoice(source, kind, target, task, parse_image_size(image_size), split, limit)


def parse_image_size(text: str | None) -> tuple[int, int] | None:
    """``"32"`` or ``"32x48"`` as (height, width).

    Raises:
        InputError: It is neither.
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise InputError(f"--image-size must be a number of pixels or HEIGHTxWIDTH, such as 32x48, but it is {text!r}")
    return int(sides[0]), int(sides[-1])


def parse_numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers parted by commas.

    Raises:
        InputError: They are no numbers; ``name`` says of which option.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{name} must be a number or numbers parted by commas, but it is {text!r}") from error


def parse_object(name: str, text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: It is none; ``name`` says of which option.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name} must be a JSON object such as '{{\"hidden\": 256}}', but {text!r} is none: {error}"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{name} must be a JSON object such as '{{\"hidden\": 256}}', but it is {text!r}")
    return value


def parse_share(name: str, text: str) -> float | int:
    """A share such as 0.1, or a count such as 500; 0 for nothing.

    Raises:
        InputError: It is neither.
    """
    try:
        value: float | int = int(text) if text.strip().isdecimal() else float(text)
    except ValueError as error:
        raise InputError(f"{name} must be a share such as 0.1 or a number of examples, but it is {text!r}") from error
    if isinstance(value, float) and value == 0:
        return 0
    if isinstance(value, float) and not 0 < value < 1:
        raise InputError(f"{name} must be a share in (0, 1) or a number of examples, but it is {text!r}")
    return value


def parse_number_or_word(name: str, text: str | None, words: tuple[str, ...]) -> float | str | None:
    """A number, or one of some words.

    Raises:
        InputError: It is neither.
    """
    if text is None or text in words:
        return text
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{name} must be a number or one of {', '.join(words)}, but it is {text!r}") from error


def parse_prior(text: str | None) -> float | str | dict[str, Any] | None:
    """A prior's name or standard deviation, or a JSON object with one for each of the layer's parameters.

    Raises:
        InputError: It is none of these.
    """
    if text is not None and text.lstrip().startswith("{"):
        return parse_object("--prior", text)
    return parse_number_or_word("--prior", text, ("rms", "rms-per-parameter", "pretrained", "empirical-bayes"))


def parse_devices(text: str) -> int | None:
    """``--devices``: a number, or None for ``"auto"``.

    Raises:
        InputError: It is neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--devices must be auto or a number of processes, but it is {text!r}")
    return int(text)


def pick_device(name: str) -> Any:
    """The torch device that ``--device`` names.

    Raises:
        InputError: There is no such device here.
    """
    import torch  # noqa: PLC0415 - slow

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
