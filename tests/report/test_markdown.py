"""The report as Markdown: read back by a parser, it says what the records say."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import benchmark_records as made
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from stfbnn.report.html.content import content_of
from stfbnn.report.html.measures import prediction_table
from stfbnn.report.markdown import escape, fenced, markdown_report, slug

SVG = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def inline(tokens: list[Token]) -> list[str]:
    """The plain texts of all blocks."""
    return ["".join(part.content for part in token.children or []) for token in tokens if token.type == "inline"]


def tables(tokens: list[Token]) -> list[list[list[str]]]:
    found: list[list[list[str]]] = []
    for token in tokens:
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.level >= 4:
            found[-1][-1].append("".join(part.content for part in token.children or []))
    return found


def test_the_tables_are_those_of_the_page() -> None:
    text, _ = markdown_report(made.records(), made.CLAIMS, "Results", made.COMMAND, made.comparison())
    read = tables(parsed(text))
    assert read[0][0] == ["claim", "verdict", "evidence and why"]
    assert [row[1] for row in read[0][1:]] == [claim.verdict for claim in made.CLAIMS]
    content = content_of(made.records(), comparison=made.comparison())
    table = prediction_table(content.tasks[0], content)
    expected = [[line.name.replace("\u00a0", " "), *(cell.whole for cell in line.cells)] for line in table.lines]
    assert [["method", *(head.title for head in table.heads)], *expected] in read
    assert all(len(row) == len(rows[0]) for rows in read for row in rows)


def test_only_what_is_marked_is_bold() -> None:
    text, _ = markdown_report(made.records(), comparison=made.comparison())
    assert len(re.findall(r"\*\*[^*]+\*\*", text)) == 4
    assert "**" not in markdown_report(made.records())[0]


def test_hostile_texts_are_shown_and_not_obeyed() -> None:
    claims, comparison = made.hostile_statistics()
    text, figures = markdown_report(made.hostile(), claims, made.HOSTILE, made.HOSTILE, comparison)
    tokens = parsed(text)
    markup = [token.content for token in tokens if token.type == "html_block"]
    assert [one.strip() for one in markup] == ["<details><summary>Hyper-parameters</summary>", "</details>"]
    children = [part for token in tokens for part in token.children or []]
    assert not [part.content for part in children if part.type == "html_inline"]
    assert not [part for part in children if part.type == "strong_open"]
    shown = " ".join(made.HOSTILE.split())
    assert inline(tokens)[0] == shown
    assert all(len(row) == len(rows[0]) for rows in tables(tokens) for row in rows)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+\.svg", name) for name in figures)
    for drawing in figures.values():
        ElementTree.fromstring(drawing)  # noqa: S314 - our own


@pytest.mark.parametrize(
    "text", ["a|b", "*a* _b_", "<b>&lt;", "`a`", "[a](b) ![c](d)", "a\nb", "\\", "~~a~~", "# a", "x_y_z"]
)
def test_escaped_texts_are_read_as_they_were(text: str) -> None:
    assert inline(MarkdownIt("commonmark").enable("strikethrough").parse(f"say {escape(text)}")) == [
        "say " + " ".join(text.split())
    ]


def test_a_fence_is_longer_than_any_in_the_text() -> None:
    (token,) = parsed(fenced("a ```` b\n```\nc"))
    assert token.type == "fence"
    assert token.content == "a ```` b\n```\nc\n"


def test_file_names_are_harmless_stable_and_distinct() -> None:
    assert slug("fashion-mlp") == "fashion-mlp"
    assert re.fullmatch("etc-passwd-[0-9a-f]{8}", slug("../../etc/passwd"))
    assert slug("../../etc/passwd") == slug("../../etc/passwd")
    assert slug("a b") != slug("a/b")
    assert re.fullmatch("task-[0-9a-f]{8}", slug("任务"))


def test_figures_bring_both_palettes_their_ground_and_their_legend() -> None:
    text, figures = markdown_report(made.records())
    root = ElementTree.fromstring(figures["digits.risk-coverage.svg"])  # noqa: S314 - our own
    style = root.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style
    ground = root.find(f"{SVG}rect")
    assert ground is not None
    assert ground.attrib["class"] == "ground"
    assert ".ground { fill: var(--surface); }" in style
    words = [one.text for one in root.iter(f"{SVG}text")]
    assert set(made.METHODS) <= set(words)
    assert root.findtext(f"{SVG}title") == "Risk and coverage"
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    for group in root.findall(f"{SVG}g"):
        x, y = map(float, re.findall("[0-9.]+", group.attrib["transform"]))
        assert x < width
        assert y < height
    assert "![Risk and coverage. " in text
