"""The demonstration: it runs, its strange examples are photographs, and its words follow from its figures."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from stfbnn import demo
from stfbnn.cli import app
from stfbnn.cli.demo import _reading
from stfbnn.errors import InputError

# Two epochs do not converge, as the warning says; here only the way through matters.
pytestmark = pytest.mark.filterwarnings("ignore:on the held-out data")
SETTINGS = demo.DemoSettings(train_epochs=10, fit_epochs=2, temperatures=(0.3, 0.1), samples=8, patches=20)


@pytest.fixture(scope="module")
def result():
    return demo.run_demo(SETTINGS, progress=False)


def test_quick_demo_prints_json_and_draws(tmp_path):
    out = CliRunner().invoke(app, ["demo", "--quick", "--json", "-o", str(tmp_path / "d")])
    assert out.exit_code == 0, out.output
    said = json.loads(out.stdout)
    assert list(said["methods"]) == ["trained network", "temperature-scaled", "STF-BNN", "STF-BNN + τ"]
    assert said["parameters"]["trained network"] == 64 * 256 + 256 + 256 * 256 + 256 + 2560 + 10
    assert said["parameters"]["STF-BNN"] == 2 * (64 * 256 + 256)
    assert [Path(path).read_bytes()[:4] for path in said["plots"]] == [b"\x89PNG"] * 2
    assert set(said["seconds"]) == {"data", "stage one", "stage two", "comparison"}


def test_quick_demo_prints_tables_and_the_paths(tmp_path):
    out = CliRunner().invoke(app, ["demo", "--quick", "-o", str(tmp_path)])
    assert out.exit_code == 0, out.output
    for text in ("accuracy ↑", "ECE ↓", "trainable", "photo patches", str(tmp_path / "reliability.png"), "Time: data"):
        assert text in out.stdout


def test_the_parts_are_disjoint_shares_of_the_digits(result):
    assert result.counts == {"train": 1078, "held-out": 360, "test": 359, demo.OUTSIDE: 20}
    assert torch.get_num_threads() == 1


def test_the_same_seed_gives_the_same_figures(result):
    assert demo.run_demo(SETTINGS, progress=False).side.metrics == result.side.metrics


def test_patches_are_averages_of_photographs():
    patches = demo.photo_patches(6, seed=2)
    assert patches.shape == (6, 1, 8, 8)
    assert torch.equal(patches, demo.photo_patches(6, seed=2))
    assert not torch.equal(patches, demo.photo_patches(6, seed=3))
    photo = torch.from_numpy(load_sample_images().images[0].copy()).double().mean(2) / 255
    rows, columns = (size // 4 for size in photo.shape)
    small = photo[: 4 * rows, : 4 * columns].reshape(rows, 4, columns, 4).mean((1, 3)).float()
    windows = small.unfold(0, 8, 1).unfold(1, 8, 1)
    assert float((windows - patches[0, 0]).abs().amax((2, 3)).min()) < 1e-6
    with pytest.raises(InputError, match="positive"):
        demo.photo_patches(0, seed=0)


def test_the_gain_is_a_paired_difference(result):
    gain, error = demo.log_density_gain(result.side, "STF-BNN", "trained network")
    metrics = result.side.metrics
    assert gain == pytest.approx(metrics["trained network"].nll - metrics["STF-BNN"].nll, abs=1e-9)
    probs = [result.side.predictions[name].probs.double() for name in ("STF-BNN", "trained network")]
    picked = [values.gather(1, result.side.targets[:, None]).log().squeeze(1) for values in probs]
    difference = picked[0] - picked[1]
    assert error == pytest.approx(float(difference.std() / len(difference) ** 0.5), rel=1e-6)


def test_the_words_admit_what_got_worse(result):
    # Ten epochs make no overconfident network: the Bayesian layer has nothing to repair and costs likelihood.
    metrics = result.side.metrics
    words = _reading(result)
    for name, phrase in (("trained network", "the trained network"), ("temperature-scaled", "temperature scaling")):
        verdict = "better" if metrics["STF-BNN"].nll < metrics[name].nll else "worse"
        assert f"NLL {verdict} than {phrase}" in words
    assert metrics["STF-BNN"].nll > metrics["trained network"].nll
