"""Methods compared across tasks, by ranks: Friedman's test, Nemenyi's critical difference, and the groups of its diagram.

Figures of different tasks have different scales, their ranks have not. The method is that of Demšar, "Statistical
comparisons of classifiers over multiple data sets", JMLR 7 (2006): each task is one observation, so the number of tasks,
not of seeds, decides what can be said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stfbnn.benchmark.statistics import SeedValues
from stfbnn.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """Ranks of the methods on the tasks that all of them have.

    Attributes:
        average: For each method its mean rank over tasks, the best first; 1 is best, equal figures share the mean of their
            ranks.
        ranks: For each task the rank of each method.
        left_out_tasks: Tasks that do not enter, as a method that does enter has no figure there.
        left_out_methods: Methods that do not enter, as they have no figure on a task that does.
    """

    average: Mapping[str, float]
    ranks: Mapping[str, Mapping[str, float]]
    left_out_tasks: tuple[str, ...]
    left_out_methods: tuple[str, ...]

    @property
    def matrix(self) -> NDArray[np.float64]:
        """Ranks, tasks x methods, the methods in the order of ``average``."""
        return np.array([[row[method] for method in self.average] for row in self.ranks.values()])


@dataclass(frozen=True)
class Friedman:
    """Friedman's test of whether all methods rank alike, and Iman and Davenport's less conservative form of it.

    Attributes:
        chi_squared: Friedman's statistic, corrected for ties.
        p_value: Its p-value by the chi-squared distribution with k - 1 degrees of freedom.
        f_statistic: Iman and Davenport's; None where all tasks agree in every rank, which makes it infinite.
        f_p_value: Its p-value by the F distribution with k - 1 and (k - 1)(N - 1) degrees of freedom; None with it.
    """

    chi_squared: float
    p_value: float
    f_statistic: float | None
    f_p_value: float | None


def task_means(table: Mapping[str, SeedValues]) -> dict[str, dict[str, float]]:
    """Average figures over seeds, for those methods that have every seed of the task.

    Args:
        table: For each task, each method and each seed the figure (``statistics.by_task`` makes it).

    Returns:
        For each task and method the mean. A method without one of the task's seeds is missing there, for a mean over other
        seeds is a figure of another division of the data.
    """
    means: dict[str, dict[str, float]] = {}
    for task, methods in table.items():
        seeds = {seed for values in methods.values() for seed in values}
        means[task] = {
            method: math.fsum(values.values()) / len(values)
            for method, values in methods.items()
            if values and set(values) == seeds
        }
    return means


def average_ranks(scores: Mapping[str, Mapping[str, float]], *, lower_is_better: bool) -> Ranks:
    """Rank the methods on every task, and average.

    Only a complete table can be ranked. Where figures are missing, that choice of methods enters which, with the tasks that
    have them all, makes the largest complete table (most figures; among equals the one with more tasks, then more methods,
    then the first by name); what is left out is named.

    Args:
        scores: For each task the figure of each method.
        lower_is_better: Whether small figures are good ones.

    Raises:
        InputError: A figure is not finite, or no task has two methods.
    """
    for task, row in scores.items():
        for method, value in row.items():
            if not math.isfinite(value):
                raise InputError(
                    f"{method} has {value} on {task}, and only finite figures can be ranked; leave it out there"
                )
    methods = _largest_complete({task: frozenset(row) for task, row in scores.items()})
    entering = [task for task, row in scores.items() if methods <= set(row)]
    ordered = sorted(methods)
    values = np.array([[scores[task][method] for method in ordered] for task in entering])
    matrix = stats.rankdata(values if lower_is_better else -values, axis=1)
    means = dict(zip(ordered, matrix.mean(0).tolist(), strict=True))
    everyone = {method for row in scores.values() for method in row}
    return Ranks(
        average=dict(sorted(means.items(), key=lambda item: item[1])),
        ranks={task: dict(zip(ordered, row, strict=True)) for task, row in zip(entering, matrix.tolist(), strict=True)},
        left_out_tasks=tuple(task for task in scores if task not in entering),
        left_out_methods=tuple(sorted(everyone - methods)),
    )


def friedman(ranks: Ranks) -> Friedman:
    """Test whether all methods rank alike.

    F = (N - 1) χ² / (N (k - 1) - χ²) for N tasks and k methods (Iman and Davenport 1980).

    Args:
        ranks: Of at least three methods on at least two tasks.

    Raises:
        InputError: There are fewer methods or tasks.
    """
    matrix = ranks.matrix
    tasks, methods = matrix.shape
    if methods < 3 or tasks < 2:
        raise InputError(
            f"Friedman's test needs at least 3 methods on at least 2 tasks, but there are {methods} on {tasks}; compare two "
            f"methods by a paired test"
        )
    if (matrix == matrix[:, :1]).all():
        return Friedman(0.0, 1.0, 0.0, 1.0)
    result = stats.friedmanchisquare(*matrix.T)
    chi_squared = float(result.statistic)
    rest = tasks * (methods - 1) - chi_squared
    if rest <= 1e-9 * tasks * methods:
        return Friedman(chi_squared, float(result.pvalue), None, None)
    f_statistic = (tasks - 1) * chi_squared / rest
    f_p_value = float(stats.f.sf(f_statistic, methods - 1, (methods - 1) * (tasks - 1)))
    return Friedman(chi_squared, float(result.pvalue), f_statistic, f_p_value)


def critical_difference(methods: int, tasks: int, alpha: float = 0.05) -> float:
    """How far apart two average ranks must be for the methods to differ significantly (Nemenyi's test).

    q sqrt(k (k + 1) / (6 N)), q being the studentised range's 1 - α quantile for k groups and infinitely many degrees of
    freedom, over the root of 2. The family-wise error rate over all pairs is α.

    Args:
        methods: k, at least 2.
        tasks: N, at least 1.
        alpha: The error rate.

    Raises:
        InputError: There are fewer, or ``alpha`` is outside (0, 1).
    """
    if methods < 2 or tasks < 1 or not 0 < alpha < 1:
        raise InputError(
            f"a critical difference needs at least 2 methods, at least 1 task and alpha in (0, 1), not {methods}, {tasks} "
            f"and {alpha}"
        )
    quantile = float(stats.studentized_range.ppf(1 - alpha, methods, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(methods * (methods + 1) / (6 * tasks))


def cliques(average: Mapping[str, float], difference: float) -> tuple[tuple[str, ...], ...]:
    """Groups of methods that do not differ significantly: the bars of a critical-difference diagram.

    Args:
        average: The average rank of each method.
        difference: The critical difference; methods differ significantly if their average ranks are at least so far apart.

    Returns:
        Each largest group of two or more methods in which no two differ, the best rank first.

    Raises:
        InputError: The difference is not positive and finite.
    """
    if not 0 < difference < math.inf:
        raise InputError(f"the critical difference must be positive and finite, but it is {difference}")
    ordered = sorted(average, key=lambda method: average[method])
    groups: list[tuple[str, ...]] = []
    reached = 0
    for start, first in enumerate(ordered):
        # Equal up to rounding counts as at least so far apart: average ranks are multiples of 1 / (2 N).
        stop = sum(average[method] - average[first] < difference * (1 - 1e-12) for method in ordered)
        if stop > reached:
            reached = stop
            if stop - start > 1:
                groups.append(tuple(ordered[start:stop]))
    return tuple(groups)


def _largest_complete(present: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The methods of the largest complete part, out of which methods each task has.

    Adding a method that all chosen tasks have only makes the part larger, so the best choice is what some tasks have in
    common: only intersections of rows need to be looked at.
    """
    choices: set[frozenset[str]] = set()
    for row in set(present.values()):
        choices |= {row, *(row & other for other in choices)}
    choices = {choice for choice in choices if len(choice) >= 2}
    if not choices:
        raise InputError("there is no task on which two methods have a figure, so there is nothing to rank")

    def size(choice: frozenset[str]) -> tuple[int, int, int]:
        tasks = sum(choice <= row for row in present.values())
        return tasks * len(choice), tasks, len(choice)

    largest = max(map(size, choices))
    return min((choice for choice in choices if size(choice) == largest), key=sorted)
