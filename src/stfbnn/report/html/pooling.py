"""Several seeds' curves and histograms made one: what the figures draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stfbnn.benchmark.records import Row
from stfbnn.report.html.charts import Bins
from stfbnn.report.html.content import Estimate, estimate

GRID = tuple(round(0.01 * step, 2) for step in range(1, 101))
"""The coverages at which curves of several seeds are averaged."""


def pooled_bins(rows: Sequence[Row]) -> Bins | None:
    """The bins of all seeds' examples together; None where there are none, or the seeds' bins differ."""
    found = [row.reliability for row in rows if row.reliability]
    if not found or not _same_edges([one["edges"] for one in found]):
        return None
    counts = np.array([one["counts"] for one in found], dtype=float)
    total = counts.sum(axis=0)

    def mean(name: str) -> list[float | None]:
        # An empty bin has no mean and no weight.
        values = np.array([[0.0 if value is None else value for value in one[name]] for one in found])
        sums = (values * counts).sum(axis=0)
        return [float(part / whole) if whole > 0 else None for part, whole in zip(sums, total, strict=True)]

    edges = [float(edge or 0.0) for edge in found[0]["edges"]]
    return Bins(edges, mean("confidences"), mean("accuracies"), total.tolist())


def pooled_entropies(rows: Sequence[Row]) -> tuple[list[float], dict[str, list[float]]] | None:
    """Edges of the bins and each set's shares of examples; None where there are none, or the seeds' bins differ."""
    found = [row.entropies for row in rows if row.entropies]
    if not found or not _same_edges([one["edges"] for one in found]):
        return None
    names = [name for name in found[0] if name != "edges" and all(name in one for one in found)]
    names.sort(key=lambda name: name != "test")
    shares = {}
    for name in names:
        counts = np.sum([one[name] for one in found], axis=0)
        shares[name] = (counts / max(counts.sum(), 1)).tolist()
    return list(found[0]["edges"]), shares


def mean_risks(rows: Sequence[Row]) -> tuple[list[float], list[float]] | None:
    """Coverages and the risk at each, averaged over seeds; None where there is no curve.

    Between the points of a seed's curve the risk is interpolated; below its first point it is that point's.
    """
    found = [row.risk_coverage for row in rows if row.risk_coverage]
    if not found:
        return None
    if len(found) == 1:
        return list(found[0]["coverage"]), list(found[0]["risk"])
    # No coverage at which one of the seeds has no threshold yet.
    low = max(one["coverage"][0] for one in found)
    grid = [coverage for coverage in GRID if coverage >= low] or [1.0]
    risks = np.mean([np.interp(grid, one["coverage"], one["risk"]) for one in found], axis=0)
    return list(grid), risks.tolist()


def shifted(rows: Sequence[Row], corruption: str | None, metric: str) -> list[Estimate] | None:
    """A metric at severities 0 to 5 over seeds; None where it is missing.

    Args:
        rows: One a seed.
        corruption: Its name; None for the mean over all of them.
        metric: Its name; severity 0 is the uncorrupted test data.
    """
    with_shift = [row for row in rows if row.shift]
    severities = [_at_severity(with_shift, corruption, metric, severity) for severity in range(6)]
    found = [one for one in severities if one is not None]
    return found if len(found) == 6 else None


def _at_severity(rows: Sequence[Row], corruption: str | None, metric: str, severity: int) -> Estimate | None:
    if severity == 0:
        return estimate(row.metrics.get(metric) for row in rows)
    values: list[float | None] = []
    for row in rows:
        chosen = row.shift if corruption is None else {corruption: row.shift.get(corruption, [])}
        values.append(_mean_over(chosen, metric, severity))
    return estimate(values)


def _mean_over(shift: Mapping[str, list[Mapping[str, float]]], metric: str, severity: int) -> float | None:
    found = [curve[severity - 1].get(metric) if len(curve) >= severity else None for curve in shift.values()]
    mean = estimate(found)
    return None if mean is None else mean.mean


def _same_edges(all_edges: Sequence[Sequence[float | None]]) -> bool:
    first = np.array(all_edges[0], dtype=float)
    return all(len(edges) == len(first) and np.allclose(np.array(edges, dtype=float), first) for edges in all_edges)
