"""Benchmarks that study task after task and seed after seed, each kept in the cache when it is done."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from common import RESULTS, environment
from stfbnn.files import write_json, write_text
from tasks import cache


def run_by_seed(
    about: str | None,
    name: str,
    tasks: Mapping[str, Any],
    study: Callable[[str, int], Mapping[str, Any]],
    tell: Callable[[Mapping[str, Any]], Any],
    default: list[str],
    **further: Any,
) -> None:
    """Run what is missing, and write one file of results a task.

    Args:
        about: What ``--help`` says.
        name: Of the benchmark: of its folder in the cache, and the beginning of the files' names.
        tasks: Budgets, by task.
        study: From a task and a seed to a result.
        tell: What is printed of a result.
        default: Tasks where none are named.
        **further: What else the files say of all runs.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=default, choices=tasks)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen = parser.parse_args()
    folder = cache() / name
    for task in chosen.tasks:
        for seed in chosen.seeds:
            kept = folder / f"{task}-{seed}.json"
            if not kept.exists():
                write_json(kept, json.loads(json.dumps(study(task, seed))))
            print(task, seed, tell(json.loads(kept.read_text(encoding="utf-8"))), flush=True)
        done = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{task}-[0-9]*.json"))]
        content = {"environment": environment(), "budget": vars(tasks[task]), **further, "runs": rounded(done)}
        write_text(RESULTS / f"{name}_{task}.json", json.dumps(content, separators=(",", ":")) + "\n")


def rounded(value: Any) -> Any:
    """All numbers to six digits: paths, planes and curves are hundreds of them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value
