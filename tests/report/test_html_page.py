"""The page as a file: complete, closed in itself, harmless whatever the records say, readable in both colour schemes."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import benchmark_records as made
import pytest

from stfbnn.errors import InputError
from stfbnn.report.html.page import html_report, write_report

VOID = {"meta", "link", "br", "input"}


class Tree(HTMLParser):
    """Elements with their attributes and texts; refuses tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.open: list[tuple[str, int]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, place in self.open:
            self.texts[place] = self.texts.get(place, "") + data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, self.texts.get(place, "")) for place, (name, attrs) in enumerate(self.elements) if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return html_report(made.records(), made.CLAIMS, "Results", made.COMMAND, made.comparison(), ["stf-bnn"])


@pytest.fixture(scope="module")
def tree(page: str) -> Tree:
    return Tree(page)


def test_headings_are_in_order_and_the_language_is_said(tree: Tree) -> None:
    levels = [int(tag[1]) for tag, _ in tree.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert tree.all("html")[0][0]["lang"] == "en"


def test_every_table_has_a_caption_and_every_head_a_scope(tree: Tree) -> None:
    assert len(tree.all("table")) == len(tree.all("caption"))
    assert all(text.strip() for _, text in tree.all("caption"))
    assert all(attrs["scope"] in ("col", "row", "colgroup") for attrs, _ in tree.all("th"))
    for attrs, text in tree.all("button"):
        assert attrs["type"] == "button"
        assert text.strip()


def test_every_chart_is_an_image_with_a_name_a_description_and_its_numbers(tree: Tree) -> None:
    charts = [attrs for attrs, _ in tree.all("svg") if attrs["class"] == "chart"]
    identities = {
        attrs["id"]: text
        for _, attrs_text in (("", tree.all("title")), ("", tree.all("desc")))
        for attrs, text in attrs_text
        if "id" in attrs
    }
    assert len(charts) > 50
    for attrs in charts:
        assert attrs["role"] == "img"
        title, description = (identities[name] for name in attrs["aria-labelledby"].split())
        assert title
        assert len(description) > 20
    figures, summaries = tree.all("figure"), [text for _, text in tree.all("summary")]
    assert summaries.count("Numbers of this figure") == summaries.count("Raw JSON of this figure") == len(figures)
    assert all(made.COMMAND in text for _, text in tree.all("figcaption"))


def test_identities_are_unique_and_links_lead_somewhere(tree: Tree) -> None:
    identities = [attrs["id"] for _, attrs in tree.elements if "id" in attrs]
    assert len(identities) == len(set(identities))
    assert {attrs["href"].removeprefix("#") for attrs, _ in tree.all("a")} <= set(identities)


def test_the_page_names_no_address_outside_itself(page: str, tree: Tree) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    for tag, attrs in tree.elements:
        assert "src" not in attrs
        assert "style" not in attrs
        assert not any(name.startswith("on") for name in attrs), tag
    assert [attrs["href"] for attrs, _ in tree.all("link")] == ["data:,"]


def test_what_is_significant_is_bold_and_nothing_else_is(tree: Tree) -> None:
    bold = [text for _, text in tree.all("strong")]
    # The line of its table twice (method and value) in the summary, once in each table.
    assert len(bold) == 4
    assert bold[0] == "stf-bnn mixture"
    assert not Tree(html_report(made.records())).all("strong")


def test_the_embedded_json_is_what_the_records_say(tree: Tree) -> None:
    (data,) = [text for attrs, text in tree.all("script") if attrs.get("type") == "application/json"]
    records = json.loads(data)["records"]
    by_key = {(one["task"], one["seed"], one["method"]): one for one in records}
    assert len(by_key) == len(made.records())
    for record in made.records():
        shown = by_key[record.task, record.seed, record.method]
        if record.raw is None:
            assert shown["failed"] == record.failed
            continue
        assert shown["raw"]["metrics"].keys() == record.raw.metrics.keys()
        for name, value in record.raw.metrics.items():
            assert shown["raw"]["metrics"][name] == (value if value is None else pytest.approx(value, rel=1e-5))
        assert shown["cost"]["artifact_bytes"] == record.cost.artifact_bytes
    assert json.loads(data)["rankings"][0]["critical_difference"] == 1.5


def test_hostile_texts_are_shown_and_not_obeyed() -> None:
    claims, comparison = made.hostile_statistics()
    page = html_report(made.hostile(), claims, made.HOSTILE, made.HOSTILE, comparison)
    tree = Tree(page)
    shown = made.HOSTILE.replace("\u202e", "\ufffd")
    assert tree.all("h1") == [({}, shown)]
    assert shown in tree.all("title")[0][1]
    assert not tree.all("img")
    assert len(tree.all("script")) == 2
    assert page.count("</script>") == 2
    assert "<!--" not in page
    (data,) = [text for attrs, text in tree.all("script") if attrs.get("type") == "application/json"]
    assert {record["task"] for record in json.loads(data)["records"]} == {made.HOSTILE}


def test_a_task_on_which_everything_failed_still_has_its_place() -> None:
    tree = Tree(html_report([made.failure("digits", seed, "network") for seed in (0, 1)]))
    assert any("the library it needs is not installed" in text for _, text in tree.all("td"))
    assert not tree.all("figure")


def test_a_classifier_without_errors_and_without_a_threshold_can_be_drawn() -> None:
    record = made.classification("digits", 0, "network")
    perfect = {"coverage": [0.5, 1.0], "risk": [0.0, 0.0]}
    row = dataclasses.replace(
        record.raw, risk_coverage=perfect, abstention={"threshold": None, "risk": None, "coverage": None}
    )
    figures = Tree(html_report([dataclasses.replace(record, raw=row, scaled=None)])).all("figure")
    assert {attrs["id"] for attrs, _ in figures} >= {
        "task-1-risk-coverage",
        "task-1-accuracy-rejection",
        "task-1-abstention",
    }


def test_the_command_in_the_records_stands_in_for_one_that_is_not_given() -> None:
    page = html_report(made.records(("digits",)), comparison=made.comparison())
    assert all(made.COMMAND in text for _, text in Tree(page).all("figcaption"))


def test_files_are_written_whole_with_figures_for_the_markdown(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    written = write_report(tmp_path / "out", made.records(), made.CLAIMS, command=made.COMMAND)
    assert written == tmp_path / "out" / "report.html"
    text = (tmp_path / "out" / "report.md").read_text()
    named = set(re.findall(r"\(figures/([^)]+)\)", text))
    assert named == {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "figures"}
    assert "digits.pareto.svg" in named


def test_nothing_is_written_of_records_that_contradict_one_another(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two records"):
        write_report(tmp_path / "out", made.records() * 2)
    assert not (tmp_path / "out").exists()


def palettes() -> dict[str, dict[str, str]]:
    text = resources.files("stfbnn.report.html").joinpath("palette.css").read_text()
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    return {
        name: dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", part))
        for name, part in (("light", light), ("dark", dark))
    }


def contrast(first: str, second: str) -> float:
    """Contrast by the Web Content Accessibility Guidelines 2.2: ratio of relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_contrast_is_computed_as_the_guidelines_do() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(scheme: str) -> None:
    palette = palettes()[scheme]
    for ground in ("surface", "raised", "strong"):
        for ink in ("text", "muted", "accent", "good", "middling", "bad"):
            assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
    # Lines and marks, which need 3 (success criterion 1.4.11).
    for series in range(8):
        assert contrast(palette[f"series-{series}"], palette["surface"]) >= 3, series


def test_both_schemes_define_every_colour_and_nothing_else_names_one() -> None:
    schemes = palettes()
    assert schemes["light"].keys() == schemes["dark"].keys()
    for name in ("figure.css", "style.css"):
        text = resources.files("stfbnn.report.html").joinpath(name).read_text()
        assert set(re.findall(r"var\(--([a-z0-9-]+)\)", text)) <= {*schemes["light"], "ink"}
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b|rgb|hsl", text)


def test_charts_alone_are_well_formed(page: str) -> None:
    for drawing in re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(drawing)  # noqa: S314 - our own
