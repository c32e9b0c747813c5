"""Tables as HTML: captions, scopes, and heads that are buttons where a reader may sort."""

from __future__ import annotations

import re
from itertools import groupby

from stfbnn.report.html.drawing import safe
from stfbnn.report.html.measures import Cell, Head, Line, TableData


def html_table(table: TableData) -> str:
    """Write a table in a box of its own that scrolls where the page is narrow.

    Args:
        table: What it shows. Lines with and without a predictive temperature get classes, by which the page shows either.
    """
    head = _grouped_heads(table) if any(one.group for one in table.heads) else _heads(table)
    kinds = ["figure" if is_numeric(table, place) else "words" for place in range(len(table.heads))]
    body = "".join(_line(line, kinds) for line in table.lines)
    caption = safe(table.caption)
    kind = ' class="sortable"' if table.sortable else ""
    # The box can be scrolled by the keyboard, so it has to be reached by it and to have a name.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table{kind}>'
        f"<caption><span>{caption}</span></caption><thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _heads(table: TableData) -> str:
    cells = [_head(table, table.first, None)]
    cells += [_head(table, head.title, place) for place, head in enumerate(table.heads)]
    return f"<tr>{''.join(cells)}</tr>"


def _grouped_heads(table: TableData) -> str:
    upper, lower = [_head(table, table.first, None, rows=2)], []
    for group, members in groupby(enumerate(table.heads), key=lambda one: one[1].group):
        found = list(members)
        if group:
            upper.append(f'<th scope="colgroup" class="group" colspan="{len(found)}">{safe(group)}</th>')
            lower += [_head(table, head.title, place) for place, head in found]
        else:
            upper += [_head(table, head.title, place, rows=2) for place, head in found]
    return f"<tr>{''.join(upper)}</tr><tr>{''.join(lower)}</tr>"


def _head(table: TableData, title: str, place: int | None, rows: int = 1) -> str:
    span = f' rowspan="{rows}"' if rows > 1 else ""
    kind = "name" if place is None else "figure" if is_numeric(table, place) else "words"
    attributes = f'scope="col" class="{kind}"{span}'
    if not table.sortable:
        return f"<th {attributes}>{safe(title)}</th>"
    number = 0 if place is None else place + 1
    first = "ascending" if place is None else table.heads[place].first
    if place is not None and table.sorted_by and table.sorted_by[0] == place:
        attributes += f' aria-sort="{table.sorted_by[1]}"'
    button = f'<button type="button" data-column="{number}" data-first="{first}">{safe(title)}</button>'
    return f"<th {attributes}>{button}</th>"


def _line(line: Line, columns: list[str]) -> str:
    classes = [] if line.scaled is None else ["is-scaled" if line.scaled else "is-raw"]
    classes += ["strong"] if line.emphasised else []
    kind = f' class="{" ".join(classes)}"' if classes else ""
    note = f' <span class="note">{safe(line.note)}</span>' if line.note else ""
    cells = "".join(_cell(cell, column) for cell, column in zip(line.cells, columns, strict=True))
    name = f'<th scope="row" class="name">{safe(line.name)}{note}</th>'
    return f"<tr{kind}>{name}{cells}</tr>"


def _cell(cell: Cell, kind: str) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    text = f"<strong>{safe(cell.text)}</strong>" if cell.marked else safe(cell.text)
    spread = f'<span class="spread"> ± {safe(cell.spread)}</span>' if cell.spread else ""
    return f'<td class="{kind}"{value}>{text}{spread}</td>'


def heads_of(table: TableData) -> list[str]:
    """The full head of every column in one line, for forms of a table that know no groups."""
    return [table.first, *(_whole(head) for head in table.heads)]


def is_numeric(table: TableData, place: int) -> bool:
    """Whether a column holds numbers alone."""
    return all(_is_number(line.cells[place]) for line in table.lines)


def _is_number(cell: Cell) -> bool:
    return cell.value is not None or re.fullmatch(r"[-–]?[\d.,%]*", cell.text) is not None


def _whole(head: Head) -> str:
    return f"{head.group}: {head.title}" if head.group else head.title
