"""One self-contained page of HTML: everything in one file, no address outside it, nothing that a record says is obeyed."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from stfbnn.benchmark.records import Record
from stfbnn.files import write_text
from stfbnn.report.html.content import Comparison, Content, Task, content_of
from stfbnn.report.html.drawing import Key, Panel, number, safe
from stfbnn.report.html.figure_parts import Figure
from stfbnn.report.html.figures import ranking_figure, task_figures
from stfbnn.report.html.measures import (
    best_table,
    bold_rule,
    choice_table,
    cost_table,
    failure_table,
    foreign_tables,
    prediction_table,
    ranking_table,
)
from stfbnn.report.html.tables import html_table
from stfbnn.report.markdown import markdown_of
from stfbnn.report.verdicts import Claim

_SIGNS = {"holds": "✔", "holds in part": "◐", "does not hold here": "✘", "not measured": "–"}
_DIGITS = 6


def html_report(
    records: Iterable[Record],
    claims: Iterable[Claim] = (),
    title: str = "Benchmark",
    command: str = "",
    comparison: Comparison | None = None,
    emphasise: Iterable[str] = (),
) -> str:
    """Write the report of a benchmark as one page.

    Args:
        records: Of any tasks, seeds and methods.
        claims: With their verdicts.
        title: Of the page.
        command: That reproduces it; "" for the one in the records.
        comparison: What the statistics say; None marks nothing as significant and ranks nothing.
        emphasise: Methods that the report is about, drawn stronger.

    Returns:
        The page. It asks for nothing over any network and works from a file.

    Raises:
        InputError: There are no records, or they contradict one another.
    """
    return _page(content_of(records, claims, title, command, comparison, emphasise))


def write_report(
    folder: str | os.PathLike[str],
    records: Iterable[Record],
    claims: Iterable[Claim] = (),
    title: str = "Benchmark",
    command: str = "",
    comparison: Comparison | None = None,
    emphasise: Iterable[str] = (),
) -> Path:
    """Write ``report.html``, ``report.md`` and the latter's ``figures/*.svg``, each whole or not at all.

    Args:
        folder: Where to; it is created. Files of the same names are replaced, others are left.
        records: As for :func:`html_report`.
        claims: The same.
        title: The same.
        command: The same.
        comparison: The same.
        emphasise: The same.

    Returns:
        The page's file.

    Raises:
        InputError: As for :func:`html_report`.
    """
    content = content_of(records, claims, title, command, comparison, emphasise)
    # All is made before anything is written, and what the Markdown shows is there before it.
    page, (text, figures) = _page(content), markdown_of(content)
    target = Path(folder)
    for name, drawing in figures.items():
        write_text(target / "figures" / name, drawing)
    write_text(target / "report.md", text)
    write_text(target / "report.html", page)
    return target / "report.html"


def embedded(content: Content) -> str:
    """The records as JSON that no HTML parser takes for markup, numbers to six significant digits."""
    whole = {
        "records": [_short(dataclasses.asdict(record)) for task in content.tasks for record in task.records.values()],
        "rankings": [_short(_ranking(one)) for one in content.comparison.rankings],
    }
    text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _page(content: Content) -> str:
    style = "".join(_asset(name) for name in ("palette.css", "figure.css", "style.css"))
    script = _asset("script.js")
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; img-src data:; base-uri 'none'; "
        f"form-action 'none'"
    )
    figures = {task.name: list(task_figures(task, content)) for task in content.tasks}
    tasks = "".join(_task(task, content, figures[task.name], place) for place, task in enumerate(content.tasks, 1))
    links = "".join(
        f'<li><a href="#task-{place}">{safe(task.name)}</a></li>' for place, task in enumerate(content.tasks, 1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{safe(content.title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header>
<h1>{safe(content.title)}</h1>
<p class="lead">{_lead(content)}</p>
<nav aria-label="Contents"><ul><li><a href="#summary">Summary</a></li>{links}</ul></nav>
<noscript><p>Sorting, choosing rows and raw JSON need scripts. All figures and tables are here without them.</p></noscript>
</header>
<main id="main">
{_summary(content)}
{tasks}
</main>
<p class="hidden" role="status" id="status"></p>
<script type="application/json" id="data">{embedded(content)}</script>
<script>{script}</script>
</body>
</html>
"""


def _lead(content: Content) -> str:
    seeds = sorted({len(task.seeds) for task in content.tasks})
    failed = sum(len(task.failures) for task in content.tasks)
    parts = [_count(content.tasks, "task"), _count(content.methods, "method")]
    parts.append(" to ".join(map(str, sorted({seeds[0], seeds[-1]}))) + (" seeds each" if seeds[-1] > 1 else " seed"))
    without = f" {failed} of {sum(len(task.records) for task in content.tasks)} runs have no figures." if failed else ""
    return f"{', '.join(parts)}.{without}"


def _count(things: Any, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _summary(content: Content) -> str:
    parts = ['<section id="summary" aria-labelledby="summary-head"><h2 id="summary-head">Summary</h2>']
    if content.claims:
        parts.append(f"<h3>Claims</h3>{_claims(content.claims)}")
    parts.append(f"<h3>Best methods</h3>{html_table(best_table(content))}")
    parts.append(_bold(content.comparison))
    ranks = ranking_table(content)
    if ranks is not None:
        parts.append(f"<h3>Ranks across tasks</h3>{html_table(ranks)}")
        for place, ranking in enumerate(content.comparison.rankings):
            command = content.command_of(*content.tasks)
            parts.append(_figure(ranking_figure(ranking, place), f"ranks-{place}", None, command))
    failures = failure_table(content)
    if failures is not None:
        parts.append(f"<h3>What has no figures</h3>{html_table(failures)}")
    parts.append(f"<h3>What was run</h3>{_what_was_run(content)}</section>")
    return "".join(parts)


def _claims(claims: Iterable[Claim]) -> str:
    rows = []
    for claim in claims:
        kind = claim.verdict.replace(" ", "-")
        badge = f'<span class="verdict {kind}"><span aria-hidden="true">{_SIGNS[claim.verdict]}</span> {claim.verdict}</span>'
        why = f'<p class="why">{safe(claim.why)}</p>' if claim.why else ""
        text = f'<th scope="row" role="rowheader" class="claim">{safe(claim.text)}</th>'
        rows.append(
            f'<tr role="row">{text}<td role="cell">{badge}</td><td role="cell">{safe(claim.evidence)}{why}</td></tr>'
        )
    caption = "What is claimed, and what the measurements say"
    heads = "".join(
        f'<th scope="col" role="columnheader">{head}</th>' for head in ("claim", "verdict", "evidence and why")
    )
    # On a narrow page its rows become cards; the roles keep it a table for those who do not see it.
    return (
        f'<div class="scroll"><table class="claims" role="table"><caption><span>{caption}</span></caption>'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table></div>'
    )


def _what_was_run(content: Content) -> str:
    entries: list[tuple[str, str]] = []
    if content.command:
        entries.append(("command", f"<code>{safe(content.command)}</code>"))
    entries.append(("tasks and seeds", "; ".join(f"{safe(task.name)}: {_seeds(task)}" for task in content.tasks)))
    entries.append(("methods", ", ".join(map(safe, content.methods))))
    entries.append(("raw data", "below each figure, to six significant digits; the records' own files hold all digits"))
    for key, values in content.environments.items():
        if key == "command" and content.command:
            continue
        entries.append(
            (safe(key.replace("_", " ")), "<br>".join(f"<code>{safe(_said(value))}</code>" for value in values))
        )
    return f"<dl>{''.join(f'<dt>{key}</dt><dd>{value}</dd>' for key, value in entries)}</dl>"


def _bold(comparison: Comparison) -> str:
    return f'<p class="rule">↑ higher is better, ↓ lower is better. {safe(bold_rule(comparison))}</p>'


def _task(task: Task, content: Content, figures: list[Figure], place: int) -> str:
    head = f"task-{place}"
    command = content.command_of(task)
    parts = [
        f'<section class="task" id="{head}" aria-labelledby="{head}-head"><h2 id="{head}-head">{safe(task.name)}</h2>',
        f"<p>{task.kind.capitalize()}, {_seeds(task)}.</p>",
        _toggle(place) if any(row.scaled for row in task.rows) else "",
        "<h3>Prediction</h3>",
        html_table(prediction_table(task, content)),
        _bold(content.comparison),
    ]
    foreign = foreign_tables(task, content)
    if foreign:
        parts.append("<h3>Foreign sets</h3>" + "".join(map(html_table, foreign)))
    parts.append(f"<h3>Cost</h3>{html_table(cost_table(task, content))}")
    parts.append(f"<details><summary>Hyper-parameters and settings</summary>{_settings(task)}</details>")
    if figures:
        parts.append("<h3>Figures</h3>")
        parts += [_figure(figure, f"{head}-{figure.name}", task, command) for figure in figures]
    return "".join(parts) + "</section>"


def _toggle(place: int) -> str:
    choices = (("both", "both"), ("raw", "as they are"), ("scaled", "with predictive temperature (+ τ)"))
    inputs = ""
    for value, label in choices:
        checked = " checked" if value == "both" else ""
        inputs += f'<label><input type="radio" name="show-{place}" value="{value}"{checked}> {label}</label>'
    return f'<fieldset class="toggle"><legend>Rows and panels to show</legend>{inputs}</fieldset>'


def _settings(task: Task) -> str:
    distinct: dict[str, list[str]] = {}
    for record in task.records.values():
        for key, value in record.settings.items():
            found = distinct.setdefault(str(key), [])
            if _said(value) not in found:
                found.append(_said(value))
    fixed = "".join(f"<dt>{safe(key)}</dt><dd>{safe('; '.join(values))}</dd>" for key, values in distinct.items())
    return html_table(choice_table(task)) + (f"<dl>{fixed}</dl>" if fixed else "")


def _figure(figure: Figure, name: str, task: Task | None, command: str) -> str:
    panels = "".join(_panel(panel, f"{name}-{place}", figure) for place, panel in enumerate(figure.panels))
    keys = f'<ul class="legend">{"".join(map(_key, figure.keys))}</ul>' if figure.keys else ""
    numbers = "".join(map(html_table, figure.numbers))
    asked = f'data-task="{safe(task.name)}" ' if task else ""
    code = f" Command: <code>{safe(command)}</code>" if command else ""
    drawn = (
        f'<figure class="{figure.size}" id="{name}">'
        f'<div class="panels" role="group" aria-label="{safe(figure.heading)}">{panels}</div>'
        f"{keys}<figcaption>{safe(figure.caption)}{code}</figcaption>"
        f"<details><summary>Numbers of this figure</summary>{numbers}</details>"
        f'<details class="raw" {asked}data-parts="{" ".join(figure.parts)}"><summary>Raw JSON of this figure</summary>'
        f'<pre tabindex="0" aria-label="Raw JSON"></pre></details></figure>'
    )
    if figure.extra:
        return f'<details class="more"><summary>{safe(figure.heading)}</summary>{drawn}</details>'
    return f"<h4>{safe(figure.heading)}</h4>{drawn}"


def _panel(panel: Panel, name: str, figure: Figure) -> str:
    kind = "" if panel.scaled is None else " is-scaled" if panel.scaled else " is-raw"
    svg = (
        f'<svg class="chart" viewBox="0 0 {number(panel.width)} {number(panel.height)}" role="img" '
        f'aria-labelledby="{name}-title {name}-text"><title id="{name}-title">{safe(panel.title)}</title>'
        f'<desc id="{name}-text">{safe(panel.summary)}</desc>{panel.body}</svg>'
    )
    if figure.size == "wide":
        svg = f'<div class="scroll" role="region" tabindex="0" aria-label="{safe(panel.title)}">{svg}</div>'
    return f'<div class="panel{kind}">{svg}</div>'


def _key(key: Key) -> str:
    drawn = f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">{key.swatch}</svg>{safe(key.label)}'
    if key.series is None:
        return f"<li><span>{drawn}</span></li>"
    return f'<li><button type="button" aria-pressed="false" data-series="{key.series}">{drawn}</button></li>'


def _seeds(task: Task) -> str:
    few = len(task.seeds) <= 5
    names = f" ({', '.join(map(str, task.seeds))})" if few else f" ({task.seeds[0]} to {task.seeds[-1]})"
    return _count(task.seeds, "seed") + names


def _said(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _ranking(ranking: Any) -> dict[str, Any]:
    return {
        "metric": ranking.metric,
        "average_ranks": dict(ranking.average_ranks),
        "critical_difference": ranking.critical_difference,
        "cliques": [sorted(clique) for clique in ranking.cliques],
        "tasks": ranking.tasks,
        "note": ranking.note,
    }


def _short(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    return str(value)


def _asset(name: str) -> str:
    return resources.files("stfbnn.report.html").joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """How a content security policy names the one style or script that it lets through."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
