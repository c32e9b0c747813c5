"""The tables of docs/distributed.md, from the raw results of ``scaling.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from common import RESULTS

STAGES = ("ordinary training", "stage two")
PLAIN_LINKS = (("10 Mbit/s", 10e6), ("100 Mbit/s", 100e6), ("1 Gbit/s", 1e9), ("10 Gbit/s", 10e9))
# Parameters of the whole network and of the first layer's kernel and biases, which follow from the architectures.
KNOWN = {
    "ResNet-50, 224²": (25_557_032, 9_408),
    "ViT-B/16, 224²": (86_567_656, 590_592),
}


def scaling_tables() -> str:
    """Scaling on this machine, what a step sends, slower interfaces, and a calculation for others."""
    content = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
    runs = content["runs"]
    where = content["environment"]
    return "\n\n".join(
        [
            _scaling([run for run in runs if run["megabits"] is None]),
            _sent(runs),
            _slow(runs),
            _calculated(runs),
            f"Measured by `{where['command']}` on {where['processor']} ({where['threads']} threads, torch {where['torch']}); "
            f"medians and ranges of {content['rounds']} rounds. Raw: `benchmarks/results/scaling.json`.",
        ]
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _one(runs: Sequence[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any]:
    (found,) = [run for run in runs if all(run[name] == value for name, value in wanted.items())]
    return found


def _seconds(run: Mapping[str, Any], stage: str) -> float:
    return statistics.median(run["seconds_per_step"][stage])


def _scaling(runs: Sequence[Mapping[str, Any]]) -> str:
    """Images a second against one process, with the range over rounds."""
    rows = []
    for network in dict.fromkeys(run["network"] for run in runs):
        for weak in (False, True):
            alone = _one(runs, network=network, ranks=1, weak=weak)
            for ranks in (2, 4):
                run, cells = _one(runs, network=network, ranks=ranks, weak=weak), []
                for stage in STAGES:
                    before = alone["images_per_step"] / _seconds(alone, stage)
                    speeds = sorted(run["images_per_step"] / value / before for value in run["seconds_per_step"][stage])
                    cells.append(f"{statistics.median(speeds):.2f} ({speeds[0]:.2f}–{speeds[-1]:.2f})")
                rows.append([network, "weak" if weak else "strong", str(ranks), *cells])
    heads = ["network", "scaling", "processes", *(f"{stage}: speed-up" for stage in STAGES)]
    return _table(heads, rows)


def _sent(runs: Sequence[Mapping[str, Any]]) -> str:
    """What a rank puts into the sums of a step, and what was seen on the wire."""
    rows = []
    for network in dict.fromkeys(run["network"] for run in runs):
        run = _one(runs, network=network, ranks=2, weak=False, megabits=None)
        given, wire = run["gradient_bytes"], run["wire_bytes"]
        rows.append(
            [
                network,
                *(f"{given[stage]:,}" for stage in STAGES),
                f"{given['stage two'] / given['ordinary training']:.4f}",
                *("" if wire[stage] is None else f"{wire[stage]:,.0f}" for stage in STAGES),
            ]
        )
    heads = ["network", *(f"{stage}: bytes a step and rank" for stage in STAGES), "ratio"]
    return _table([*heads, *(f"{stage}: on the wire, two ranks" for stage in STAGES)], rows)


def _slow(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many times longer a step of two ranks takes on a slower interface."""
    rows = []
    for run in runs:
        if run["megabits"] is None:
            continue
        fast = _one(runs, network=run["network"], ranks=2, weak=False, megabits=None)
        cells = [f"{_seconds(run, stage) / _seconds(fast, stage):.2f}" for stage in STAGES]
        rows.append([run["network"], f"{run['megabits']} Mbit/s", *cells])
    return _table(["network", "interface", *(f"{stage}: step, in unlimited ones" for stage in STAGES)], rows)


def _calculated(runs: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds that a ring of many ranks spends on sending a step's sums, 2 B / rate, latency aside."""
    sizes = {
        network: tuple(_one(runs, network=network, ranks=2, weak=False, megabits=None)["gradient_bytes"].values())
        for network in dict.fromkeys(run["network"] for run in runs)
    }
    sizes |= {name: (4 * whole, 8 * first + 8) for name, (whole, first) in KNOWN.items()}
    rows = [
        [name, *(f"{_milliseconds(ordinary, rate)} / {_milliseconds(own, rate)}" for _, rate in PLAIN_LINKS)]
        for name, (ordinary, own) in sizes.items()
    ]
    return _table(["ms a step: ordinary training / stage two", *(name for name, _ in PLAIN_LINKS)], rows)


def _milliseconds(size: int, rate: float) -> str:
    return f"{1000 * 2 * size * 8 / rate:,.3g}"
