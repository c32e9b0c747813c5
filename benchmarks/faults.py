"""Fifty kills: processes of both stages and of bulk prediction killed by signal 9, and what the runs end with.

Each run is one ``torchrun --max-restarts`` of two ranks that trains a network, infers its posterior and predicts, three kills
in each part, at moments from a seeded generator: at a row, as a file is begun, half written, just before or after it is
renamed, or after a time that knows nothing of what the process is doing. It is compared with an undisturbed run: parameters,
posterior, history (without seconds) and every file of predictions, bit for bit.

Run: python benchmarks/faults.py [--kills 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stfbnn.environment import environment
from stfbnn.files import write_json

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "tests" / "faults" / "fault_script.py"
STAGES = ("train", "fit", "predict")
MOMENTS = ("row", "file begun", "half a file", "before rename", "after rename", "seconds")
# Of each stage the kills of one run, few enough that the stage is not over before the last one comes.
KILLS_A_STAGE = 3
# How far a start may come before its kill, as counts of each moment: in the two stages, and in prediction.
_FURTHEST = {
    "row": (100, 60),
    "file begun": (16, 6),
    "half a file": (8, 6),
    "before rename": (16, 6),
    "after rename": (16, 6),
}
_SECONDS = 0.4
_LIMIT = 900.0

Kill = dict[str, Any]


def plan(seed: int, stages: Sequence[str] = STAGES, kills_a_stage: int = KILLS_A_STAGE) -> list[Kill]:
    """Which rank is killed at which moment of which stage, one kill a start.

    Args:
        seed: Of the choice; the moments of consecutive seeds cover all of them.
        stages: Some of `STAGES`, in their order.
        kills_a_stage: Of each.
    """
    draw = random.Random(seed)  # noqa: S311 - nothing secret
    found: list[Kill] = []
    for stage in stages:
        # Every second run has the other half of the moments, in an order of its own.
        half = len(MOMENTS) // 2
        moments = list(MOMENTS[:half] if (seed + STAGES.index(stage)) % 2 else MOMENTS[half:])
        draw.shuffle(moments)
        for index in range(kills_a_stage):
            moment = moments[index % half]
            # Rank 0 alone writes checkpoints; predictions are written by all.
            writes = moment not in ("row", "seconds")
            rank = 0 if writes and stage != "predict" else draw.randrange(2)
            count: float
            if moment == "seconds":
                count = round(draw.uniform(0.01, _SECONDS), 3)
            else:
                count = draw.randint(1, _FURTHEST[moment][stage == "predict"])
            found.append({"stage": stage, "rank": rank, "moment": moment, "count": count})
    return found


def launch(folder: Path, kills: Sequence[Kill] = (), *arguments: str, ranks: int = 2) -> dict[str, Any]:
    """One run under torchrun, with the kills.

    Args:
        folder: Where it leaves all that it writes.
        kills: In the order of the starts.
        arguments: More for the script.
        ranks: Processes.

    Returns:
        ``code``, ``seconds``, ``kills`` (those that took place) and the ``output``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(list(kills)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "--max-restarts", str(len(kills)), str(SCRIPT), str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    began = time.perf_counter()
    done = subprocess.run(  # noqa: S603 - its own script
        command, env=environment, capture_output=True, text=True, timeout=_LIMIT, check=False
    )
    noted = folder / "kills.txt"
    happened = [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []
    seconds = time.perf_counter() - began
    return {"code": done.returncode, "seconds": seconds, "kills": happened, "output": done.stdout + done.stderr}


def differences(found: Path, expected: Path) -> list[str]:
    """In what the ends of two runs differ: results of either rank, and files of predictions; empty where in nothing."""
    said = []
    for rank in (0, 1):
        both = [torch.load(folder / f"result.{rank}.pt", weights_only=True) for folder in (found, expected)]
        said += [f"{name} of rank {rank}" for name in both[1] if not equal(both[0].get(name), both[1][name])]
    files = [
        {path.name: path.read_bytes() for path in (folder / "predictions").iterdir()} for folder in (found, expected)
    ]
    said += sorted(name for name in files[0].keys() | files[1].keys() if files[0].get(name) != files[1].get(name))
    return said + [path.name for path in found.rglob("*.tmp")]


def equal(one: Any, other: Any) -> bool:
    """Whether two results are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    return bool(one == other)


def main() -> None:
    """Kill as often as was asked for, and write what came of it."""
    parser = argparse.ArgumentParser(description="Kill runs at random moments and compare what they end with.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        undisturbed = launch(Path(root) / "undisturbed")
        assert undisturbed["code"] == 0, undisturbed["output"]
        while sum(len(run["kills"]) for run in runs) < options.kills:
            seed = options.seed + len(runs)
            folder = Path(root) / f"run-{seed}"
            run = launch(folder, plan(seed))
            output = run.pop("output")
            run["differences"] = (
                differences(folder, Path(root) / "undisturbed") if run["code"] == 0 else [output[-2000:]]
            )
            runs.append({"seed": seed, **run})
            print(
                f"run {seed}: {len(run['kills'])} kills, {run['seconds']:.0f} s, differs in {run['differences'] or 'nothing'}"
            )
    kills = [kill for run in runs for kill in run["kills"]]
    content = {
        "environment": environment(),
        "settings": {"ranks": 2, "seed": options.seed, "kills_a_stage": KILLS_A_STAGE},
        "undisturbed_seconds": undisturbed["seconds"],
        "kills": len(kills),
        "by_stage": dict(Counter(kill["stage"] for kill in kills)),
        "by_moment": dict(Counter(kill["moment"] for kill in kills)),
        "by_rank": dict(Counter(str(kill["rank"]) for kill in kills)),
        "runs_equal_to_the_undisturbed": sum(not run["differences"] for run in runs),
        "runs": runs,
    }
    write_json(HERE / "results" / "faults.json", json.loads(json.dumps(content, default=float)))
    print(json.dumps({name: value for name, value in content.items() if name not in ("runs", "environment")}, indent=2))


if __name__ == "__main__":
    main()
