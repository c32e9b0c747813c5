"""The page in a real browser: sorting, choosing rows, keyboards, narrow windows, and nothing asked of any network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import benchmark_records as made
import numpy as np
import pytest
from browser import EXECUTABLE, Browser

from stfbnn.report.html.page import html_report, write_report

pytestmark = [
    pytest.mark.skipif(EXECUTABLE is None, reason="no chromium is installed"),
    pytest.mark.skipif(os.name != "posix", reason="the browser is driven over inherited pipes"),
]

TABLE = 'document.querySelectorAll("#task-1 table.sortable")'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("report")
    write_report(found, made.records(), made.CLAIMS, "Results", made.COMMAND, made.comparison(), ["stf-bnn"])
    return found


@pytest.fixture
def opened(browser: Browser, folder: Path) -> Iterator[Browser]:
    """The page, open; afterwards it must have been quiet and alone."""
    browser.open(folder / "report.html")
    yield browser
    assert browser.problems == []
    assert browser.requests == [(folder / "report.html").as_uri()]


def names(browser: Browser, table: int) -> list[str]:
    return browser.evaluate(f"Array.from({TABLE}[{table}].tBodies[0].rows, row => row.cells[0].textContent)")


def press(browser: Browser, table: int, column: int) -> str:
    """Press a column's button, and say how the page then says that it is sorted."""
    button = f"{TABLE}[{table}].querySelector('button[data-column=\"{column}\"]')"
    return browser.evaluate(f"{button}.click(), {button}.closest('th').getAttribute('aria-sort')")


def test_a_column_sorts_by_number_in_both_directions(opened: Browser) -> None:
    def search(method: str) -> float:
        costs = [one.cost for one in made.records() if one.task == "digits" and one.method == method]
        return float(np.mean([cost.search_seconds / cost.stage_one_seconds for cost in costs]))

    cost_table = 3
    expected = sorted(made.METHODS, key=search)
    # Among them 4 and 12, which as words would stand the other way round.
    assert search("full-bnn") > 10 > search("deep ensemble") > 2
    assert names(opened, cost_table) == expected
    assert press(opened, cost_table, 2) == "descending"
    assert names(opened, cost_table) == expected[::-1]
    assert press(opened, cost_table, 2) == "ascending"
    assert names(opened, cost_table) == expected
    assert press(opened, cost_table, 0) == "ascending"
    assert names(opened, cost_table) == sorted(made.METHODS)
    assert opened.evaluate(f"{TABLE}[{cost_table}].querySelectorAll('[aria-sort]').length") == 1
    assert opened.evaluate("document.getElementById('status').textContent") == "Sorted by method, ascending"


def test_what_has_no_figure_stays_last(opened: Browser) -> None:
    for direction in ("descending", "ascending"):
        assert press(opened, 1, 4) == direction
        assert {name.split(" +")[0] for name in names(opened, 1)[-2:]} == {"network"}
        values = opened.evaluate(
            f"Array.from({TABLE}[1].tBodies[0].rows, row => row.cells[4].dataset.value).slice(0, -2)"
        )
        assert [float(value) for value in values] == sorted(map(float, values), reverse=direction == "descending")


def test_the_keyboard_sorts(opened: Browser) -> None:
    opened.evaluate(f"{TABLE}[0].querySelector('button[data-column=\"1\"]').focus()")
    opened.press("Enter", 13, "\r")
    assert opened.evaluate(f"{TABLE}[0].querySelector('th[aria-sort]').textContent") == "accuracy ↑"
    opened.press("Tab", 9)
    opened.press(" ", 32, " ")
    assert opened.evaluate(f"{TABLE}[0].querySelector('th[aria-sort]').textContent") == "NLL ↓"


def test_one_choice_of_rows_counts_for_the_whole_page(opened: Browser) -> None:
    shown = "Array.from(document.querySelectorAll({!r})).filter(one => one.checkVisibility()).length"
    raw, scaled = (shown.format(f"section.task tr.{kind}, .panel.{kind}") for kind in ("is-raw", "is-scaled"))
    both = (opened.evaluate(raw), opened.evaluate(scaled))
    assert min(both) > 20
    opened.evaluate("document.querySelector('#task-1 .toggle input').focus()")
    opened.press("ArrowRight", 39)
    assert (opened.evaluate(raw), opened.evaluate(scaled)) == (both[0], 0)
    assert opened.evaluate("document.querySelector('#task-2 .toggle input:checked').value") == "raw"
    opened.evaluate("document.querySelector('#task-2 .toggle input[value=scaled]').click()")
    assert (opened.evaluate(raw), opened.evaluate(scaled)) == (0, both[1])
    # Regressions have no such rows and stay.
    assert opened.evaluate("document.querySelector('#task-3 tbody tr').checkVisibility()")


def test_a_picked_method_stands_out_in_its_figure(opened: Browser) -> None:
    figure = "document.getElementById('task-1-risk-coverage')"
    opened.evaluate(f"{figure}.querySelectorAll('.legend button')[1].click()")
    assert opened.evaluate(f"{figure}.querySelectorAll('.panels .picked').length") == 2
    assert opened.evaluate(f"{figure}.querySelector('.panels .picked title').textContent") == "deep ensemble"
    opened.evaluate(f"{figure}.querySelectorAll('.legend button')[1].click()")
    assert opened.evaluate(f"{figure}.classList.contains('picking')") is False


def test_every_figure_shows_its_raw_json(opened: Browser) -> None:
    opened.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    texts = opened.evaluate(
        "new Promise(done => setTimeout(() => done(Array.from(document.querySelectorAll('details.raw'),"
        " one => [one.closest('figure').id, one.querySelector('pre').textContent])), 200))"
    )
    found = {name: json.loads(text) for name, text in texts}
    assert len(found) == opened.evaluate("document.querySelectorAll('figure').length")
    record = next(one for one in made.records() if (one.task, one.method, one.seed) == ("digits", "stf-bnn", 1))
    shown = next(one for one in found["task-1-reliability"] if (one["method"], one["seed"]) == ("stf-bnn", 1))
    assert shown["raw"]["reliability"]["counts"] == record.raw.reliability["counts"]
    assert found["task-1-pareto"][0]["cost"]["trainable_parameters"] == 203_530
    assert found["ranks-0"]["tasks"] == 7


def test_a_reader_of_the_screen_is_told_what_charts_show(opened: Browser) -> None:
    nodes = opened.send("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") == "image" and not node["ignored"]]
    assert len(images) == opened.evaluate(
        "Array.from(document.querySelectorAll('svg.chart')).filter(one => one.checkVisibility()).length"
    )
    assert all(len(image["name"]["value"]) > 30 for image in images)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_never_scrolls_sideways(browser: Browser, folder: Path, width: int, scheme: str) -> None:
    browser.open(folder / "report.html", width, scheme=scheme)
    browser.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.evaluate("window.innerWidth") == width
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    assert browser.problems == []


def test_hostile_records_run_nothing(browser: Browser, tmp_path: Path) -> None:
    claims, comparison = made.hostile_statistics()
    page = tmp_path / "report.html"
    page.write_text(html_report(made.hostile(), claims, made.HOSTILE, made.HOSTILE, comparison), encoding="utf-8")
    browser.open(page, 360)
    browser.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.evaluate("typeof hacked") == "undefined"
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.requests == [page.as_uri()]
    assert browser.problems == []


def test_the_policy_stops_what_the_page_does_not_bring(browser: Browser, folder: Path) -> None:
    """Were a text to break out in spite of all: no foreign script runs and no address is asked."""
    browser.open(folder / "report.html")
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=/none.png onerror=hacked=1>')")
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'hacked = 2'}))"
    )
    assert browser.evaluate("new Promise(done => setTimeout(() => done(typeof hacked), 200))") == "undefined"
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_the_figures_of_the_markdown_are_images(browser: Browser, folder: Path, tmp_path: Path) -> None:
    files = sorted((folder / "figures").iterdir())
    page = tmp_path / "figures.html"
    page.write_text("".join(f'<img src="{path.as_uri()}">' for path in files))
    browser.open(page)
    sizes = browser.evaluate("Array.from(document.images, one => [one.complete, one.naturalWidth])")
    assert len(sizes) == len(files)
    assert all(complete and width > 300 for complete, width in sizes)
