"""The pictures show the numbers they were given, and reach the disk whole."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from PIL import Image

from stfbnn.errors import InputError
from stfbnn.evaluation import ReliabilityCurve, auroc
from stfbnn.report import reliability_diagram, save_figure, uncertainty_histogram

NAN = float("nan")
# Empty, overconfident by .2, underconfident by .1, overconfident by .4.
CURVE = ReliabilityCurve((0.0, 0.25, 0.5, 0.75, 1.0), (NAN, 0.4, 0.6, 0.9), (NAN, 0.2, 0.7, 0.5), (0, 10, 20, 70))


def heights(container: object) -> list[float]:
    return [patch.get_height() for patch in container]


def test_reliability_diagram_draws_the_curve() -> None:
    figure = reliability_diagram({"MAP $5": CURVE, "ours": CURVE}, title="Calibration")
    assert len(figure.axes) == 4
    upper, lower = figure.axes[:2]
    accuracies, over, under = upper.containers
    assert heights(accuracies) == pytest.approx([0.2, 0.7, 0.5])
    assert heights(over) == pytest.approx([0.2, NAN, 0.4], nan_ok=True)
    assert heights(under) == pytest.approx([NAN, 0.1, NAN], nan_ok=True)
    assert [patch.get_x() for patch in accuracies] == [0.25, 0.5, 0.75]
    assert heights(lower.containers[0]) == pytest.approx([0, 0.1, 0.2, 0.7])
    assert upper.get_title() == "MAP $5\nECE 32.00 %"
    assert figure.get_suptitle() == "Calibration"
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"accuracy", "perfect"}


@pytest.mark.parametrize("methods", [1, 4, 5])
def test_one_panel_a_method(methods: int) -> None:
    figure = reliability_diagram({str(index): CURVE for index in range(methods)})
    assert len(figure.axes) == 2 * methods


def test_uncertainty_histogram_draws_shares() -> None:
    random = np.random.default_rng(0)
    inside, outside = random.random(50), random.random(80) + 0.5
    figure = uncertainty_histogram({"a": (inside, outside), "b": (outside, inside)}, label="bits", bins=7)
    first, second = figure.axes
    expected = np.histogram(inside, np.linspace(inside.min(), outside.max(), 8))[0] / 50
    assert first.patches[1].get_data().values == pytest.approx(expected)
    assert first.get_title() == f"a\nAUROC {auroc(inside, outside):.3f}"
    assert second.get_title() == f"b\nAUROC {1 - auroc(inside, outside):.3f}"
    assert first.get_xlabel() == "bits"
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[1] > expected.max()


def test_equal_scores_can_be_drawn() -> None:
    assert len(uncertainty_histogram({"a": ([1.0, 1.0], [1.0])}).axes) == 1


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("b.PDF", b"%PDF"), ("c.svg", b"<?xml")])
def test_saves_in_the_format_of_the_name(tmp_path: Path, name: str, magic: bytes) -> None:
    path = tmp_path / "new" / name
    save_figure(reliability_diagram({"MAP": CURVE}), path)
    assert path.read_bytes().startswith(magic)
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_picture_is_not_blank_and_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        save_figure(reliability_diagram({"MAP": CURVE}, title="x"), tmp_path / name, dpi=80)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    colours = Image.open(tmp_path / "one.png").convert("RGB").getcolors(1 << 20)
    # The accuracy bars' blue is there, and on white.
    assert max(colours)[1] == (255, 255, 255)
    assert any(colour == (0, 0x72, 0xB2) and count > 500 for count, colour in colours)


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    figure = reliability_diagram({"MAP": CURVE})
    figure.suptitle(r"$\nonsense{$")  # mathematics that cannot be read fails while drawing
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(figure, path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_global_state_is_left_alone() -> None:
    before, figures = dict(mpl.rcParams), Gcf.get_num_fig_managers()
    reliability_diagram({"a": CURVE})
    assert Gcf.get_num_fig_managers() == figures  # pyplot does not know of it
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", ["a", "a.gif", "a.tmp"])
def test_bad_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"must end in \.png, \.pdf or \.svg"):
        save_figure(reliability_diagram({"MAP": CURVE}), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_bad_input() -> None:
    with pytest.raises(InputError, match="at least one method"):
        reliability_diagram({})
    with pytest.raises(InputError, match="at least one method"):
        uncertainty_histogram({})
    with pytest.raises(InputError, match="a: scores outside hold 1 NaN"):
        uncertainty_histogram({"a": ([1.0], [NAN])})
    with pytest.raises(InputError, match=r"shape \(1, 1\)"):
        uncertainty_histogram({"a": ([[1.0]], [1.0])})
