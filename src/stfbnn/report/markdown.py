"""The report as Markdown for a repository: the page's tables and claims, its figures as SVG files of their own.

Every SVG brings both palettes and a ground of its own, so that it can be read on a white and on a dark page alike.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from importlib import resources

from stfbnn.benchmark.records import Record
from stfbnn.report.html.content import Comparison, Content, Task, content_of
from stfbnn.report.html.drawing import fit, number, safe
from stfbnn.report.html.figure_parts import Figure
from stfbnn.report.html.figures import ranking_figure, task_figures
from stfbnn.report.html.measures import (
    Cell,
    TableData,
    best_table,
    bold_rule,
    choice_table,
    cost_table,
    failure_table,
    foreign_tables,
    prediction_table,
    ranking_table,
)
from stfbnn.report.html.tables import heads_of, is_numeric
from stfbnn.report.verdicts import Claim

_COLUMNS = {"small": 4, "medium": 2, "wide": 1}
_STYLES = ("palette.css", "figure.css")
_GAP, _KEY_HEIGHT, _EDGE = 16.0, 22.0, 14.0
_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$!#])")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}")


def markdown_report(
    records: Iterable[Record],
    claims: Iterable[Claim] = (),
    title: str = "Benchmark",
    command: str = "",
    comparison: Comparison | None = None,
    emphasise: Iterable[str] = (),
) -> tuple[str, dict[str, str]]:
    """Write the report of a benchmark as Markdown.

    Args:
        records: Of any tasks, seeds and methods.
        claims: With their verdicts.
        title: Of the report.
        command: That reproduces it; "" for the one in the records.
        comparison: What the statistics say; None marks nothing as significant and ranks nothing.
        emphasise: Methods that the report is about, drawn stronger.

    Returns:
        The text, and the SVG files that it shows: their contents by the names that they need under ``figures/``.

    Raises:
        InputError: There are no records, or they contradict one another.
    """
    return markdown_of(content_of(records, claims, title, command, comparison, emphasise))


def markdown_of(content: Content) -> tuple[str, dict[str, str]]:
    """The same, of content that is grouped already."""
    figures: dict[str, str] = {}
    parts = [f"# {escape(content.title)}"]
    if content.command:
        parts.append(fenced(content.command))
    parts.append("## Summary")
    if content.claims:
        rows = [[claim.text, claim.verdict, f"{claim.evidence} {claim.why}".strip()] for claim in content.claims]
        lines = [_row(map(escape, ("claim", "verdict", "evidence and why"))), "| --- | --- | --- |"]
        parts += ["### Claims", "\n".join([*lines, *(_row(map(escape, row)) for row in rows)])]
    parts += ["### Best methods", markdown_table(best_table(content)), escape(bold_rule(content.comparison))]
    ranks = ranking_table(content)
    if ranks is not None:
        parts += ["### Ranks across tasks", markdown_table(ranks)]
        for place, ranking in enumerate(content.comparison.rankings):
            parts += _shown(ranking_figure(ranking, place), "all", content.command_of(*content.tasks), figures)
    failures = failure_table(content)
    if failures is not None:
        parts += ["### What has no figures", markdown_table(failures)]
    parts += ["### What was run", _what_was_run(content)]
    for task in content.tasks:
        parts += _task(task, content, figures)
    return "\n\n".join(parts) + "\n", figures


def markdown_table(table: TableData) -> str:
    """A table with its caption above it; what is marked is bold."""
    kinds = ["---"] + ["---:" if is_numeric(table, place) else "---" for place in range(len(table.heads))]
    lines = [_row(map(escape, heads_of(table))), _row(kinds)]
    for one in table.lines:
        note = f" ({one.note})" if one.note else ""
        lines.append(_row([escape(one.name + note), *map(_cell, one.cells)]))
    return f"{escape(table.caption)}\n\n" + "\n".join(lines)


def figure_file(figure: Figure) -> str:
    """A figure as an SVG document: its panels side by side, its legend below them."""
    across = min(_COLUMNS[figure.size], len(figure.panels))
    wide = max(panel.width for panel in figure.panels)
    high = max(panel.height for panel in figure.panels)
    width = 2 * _EDGE + across * wide + (across - 1) * _GAP
    parts = []
    for place, panel in enumerate(figure.panels):
        down, right = divmod(place, across)
        x, y = _EDGE + right * (wide + _GAP), _EDGE + down * (high + _GAP)
        parts.append(f'<g transform="translate({number(x)} {number(y)})">{panel.body}</g>')
    bottom = _EDGE + -(-len(figure.panels) // across) * (high + _GAP)
    x = _EDGE
    for key in figure.keys:
        label = fit(key.label, width - 2 * _EDGE - 36, 11)
        taken = 52 + 6.4 * len(label)
        if x > _EDGE and x + taken > width - _EDGE:
            x, bottom = _EDGE, bottom + _KEY_HEIGHT
        text = f'<text class="name" x="36" y="10">{safe(label)}</text>'
        parts.append(f'<g transform="translate({number(x)} {number(bottom)})">{key.swatch}{text}</g>')
        x += taken
    height = bottom + (_KEY_HEIGHT if figure.keys else 0) + _EDGE - (0 if figure.keys else _GAP)
    size = f'width="{number(width)}" height="{number(height)}" viewBox="0 0 {number(width)} {number(height)}"'
    said = " ".join(f"{panel.title}: {panel.summary}" for panel in figure.panels)
    style = "".join(resources.files("stfbnn.report.html").joinpath(name).read_text("utf-8") for name in _STYLES)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title text">'
        f'<title id="title">{safe(figure.heading)}</title><desc id="text">{safe(said)}</desc><style>{style}'
        f'svg .ground {{ fill: var(--surface); }}</style><rect class="ground" width="100%" height="100%" rx="8"/>'
        f"{''.join(parts)}</svg>\n"
    )


def escape(text: object) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no table that ends early."""
    shown = _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(text: str) -> str:
    """A block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


def slug(name: str) -> str:
    """A name for files: the task's where it is harmless, else what is harmless of it and a digest of the rest."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    kept = re.sub("[^A-Za-z0-9]+", "-", name).strip("-")[:40]
    return f"{kept or 'task'}-{hashlib.blake2b(name.encode('utf-8', 'replace'), digest_size=4).hexdigest()}"


def _task(task: Task, content: Content, figures: dict[str, str]) -> list[str]:
    seeds = ", ".join(map(str, task.seeds))
    parts = [f"## {escape(task.name)}", f"{task.kind.capitalize()}; seeds {seeds}.", "### Prediction"]
    parts += [markdown_table(prediction_table(task, content)), escape(bold_rule(content.comparison))]
    foreign = foreign_tables(task, content)
    parts += ["### Foreign sets", *map(markdown_table, foreign)] if foreign else []
    parts += ["### Cost", markdown_table(cost_table(task, content))]
    # Blank lines around the table, without which it is taken for HTML.
    parts += ["<details><summary>Hyper-parameters</summary>", markdown_table(choice_table(task)), "</details>"]
    shown = list(task_figures(task, content))
    parts += ["### Figures"] if shown else []
    for figure in shown:
        parts += _shown(figure, slug(task.name), content.command_of(task), figures)
    return parts


def _shown(figure: Figure, of_what: str, command: str, figures: dict[str, str]) -> list[str]:
    name = f"{of_what}.{figure.name}.svg"
    figures[name] = figure_file(figure)
    said = [f"{panel.title}: {panel.summary}" for panel in figure.panels[:2]]
    more = [f"And {len(figure.panels) - 2} further panels."] if len(figure.panels) > 2 else []
    alt = escape(" ".join([f"{figure.heading}.", *said, *more]))
    caption = escape(figure.caption) + (f" Command: {_code(command)}" if command else "")
    return [f"#### {escape(figure.heading)}", f"![{alt}](figures/{name})", caption]


def _what_was_run(content: Content) -> str:
    tasks = "; ".join(f"{task.name}: seeds {', '.join(map(str, task.seeds))}" for task in content.tasks)
    lines = [f"- tasks: {escape(tasks)}", f"- methods: {escape(', '.join(content.methods))}"]
    for key, values in content.environments.items():
        lines.append(f"- {escape(key.replace('_', ' '))}: {'; '.join(escape(value) for value in values)}")
    return "\n".join(lines)


def _code(text: str) -> str:
    """Code within a line, whose quotes are longer than any in it."""
    line = " ".join(text.split())
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    quotes = "`" * (longest + 1)
    return f"{quotes} {line} {quotes}" if longest else f"`{line}`"


def _cell(cell: Cell) -> str:
    spread = f" ± {escape(cell.spread)}" if cell.spread else ""
    text = escape(cell.text)
    return f"**{text}**{spread}" if cell.marked else f"{text}{spread}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
