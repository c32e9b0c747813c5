"""The tables of docs/distributed.md on large trunks and on faults, from the raw results of their benchmarks."""

from __future__ import annotations

import json
import statistics
from typing import Any

from common import RESULTS

KINDS = ("ordinary training", "stage two", "stage two, offloaded")


def large_trunk_table() -> str:
    """Which kind works under which limit, what each takes without one, and what a step costs."""
    content = json.loads((RESULTS / "large_trunk.json").read_text(encoding="utf-8"))
    lines = ["| | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    peaks = [f"{content['without_limit'][kind]['peak_mib']:,.0f}" for kind in KINDS]
    lines.append(f"| peak, MiB | {' | '.join(peaks)} |")
    for row in content["limits"]:
        lines.append(f"| limit of {row['limit_mib']} MiB | {' | '.join(_outcome(row[kind]) for kind in KINDS)} |")
    if group := content.get("control_group"):
        cells = [_outcome(group[kind]) if kind in group else "" for kind in KINDS]
        lines.append(f"| all pages, those of files too: {group['limit_mib']} MiB | {' | '.join(cells)} |")
    seconds = content["steps"]["seconds"]
    cells = ["1", *(_ratio([one[kind] / one["ordinary training"] for one in seconds]) for kind in KINDS[1:])]
    lines.append(f"| seconds of a step, one draw | {' | '.join(cells)} |")
    where = content["environment"]
    lines += [
        "",
        f"{content['parameters']:,} parameters, {content['random_parameters']:,} of them random; memory beside that of the "
        f"libraries. `python benchmarks/large_trunk.py` on {where['processor']}, torch {where['torch']}. Raw: "
        f"`benchmarks/results/large_trunk.json`.",
    ]
    return "\n".join(lines)


def faults_table() -> str:
    """What was killed, at what moments, and what came of it."""
    content = json.loads((RESULTS / "faults.json").read_text(encoding="utf-8"))
    moments, stages = content["by_moment"], content["by_stage"]
    kills = [kill for run in content["runs"] for kill in run["kills"]]
    lines = ["| killed | " + " | ".join(moments) + " |", "|---" * (len(moments) + 1) + "|"]
    for stage in stages:
        counts = [sum(k["stage"] == stage and k["moment"] == moment for k in kills) for moment in moments]
        lines.append(f"| {stage} | {' | '.join(map(str, counts))} |")
    where = content["environment"]
    lines += [
        "",
        f"{content['kills']} kills in {len(content['runs'])} runs of {content['settings']['ranks']} ranks; "
        f"{content['runs_equal_to_the_undisturbed']} of the runs equal the undisturbed one bit for bit. "
        f"`{where['command']}` on {where['processor']}. Raw: `benchmarks/results/faults.json`.",
    ]
    return "\n".join(lines)


def _outcome(found: dict[str, Any]) -> str:
    return "works" if found["works"] else "fails"


def _ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
