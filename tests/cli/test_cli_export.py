"""``stfbnn export``: what the file computes is what ``stfbnn predict`` writes."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from commands import run
from stfbnn.data import load as load_data
from stfbnn.data import loader

SMALL = ["--model-args", '{"hidden": 8}', "--device", "cpu"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    run("train", "--data", "digits", "-o", folder, "--epochs", 2, *SMALL)
    run("fit", folder, "--epochs", 1, "--temperature", 0.3, "--samples", 2)
    return folder


def test_the_file_predicts_what_the_command_predicts(fitted, tmp_path):
    path = tmp_path / "model.onnx"
    said = json.loads(run("export", fitted, "-o", path, "--samples", 3, "--seed", 5, "--json").stdout)
    assert (said["samples"], said["layout"], said["size"]) == (3, "stacked", path.stat().st_size)
    assert said["difference"] < 1e-4
    run("predict", fitted, "-o", tmp_path / "p.npz", "--samples", 3, "--seed", 5)
    with np.load(tmp_path / "p.npz") as file:
        expected = dict(file)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    test = load_data("digits").test
    mean, std = (np.array(json.loads(about[name]), dtype=np.float32) for name in ("input_mean", "input_std"))
    inputs = torch.cat([batch[0] for batch in loader(test, 64)]).numpy()
    inputs = (inputs - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
    probs, entropy, _, epistemic = session.run(None, {said["inputs"][0]: inputs})
    assert json.loads(about["classes"]) == [str(digit) for digit in range(10)]
    np.testing.assert_allclose(probs[:, 3], expected["probability_3"], atol=1e-5)
    np.testing.assert_allclose(entropy, expected["entropy"], atol=1e-5)
    np.testing.assert_allclose(epistemic, expected["epistemic"], atol=1e-5)


def test_a_program_of_torch_and_a_line_for_people(fitted, tmp_path):
    path = tmp_path / "model.pt2"
    said = run("export", fitted, "-o", path, "--format", "torch", "--samples", 2, "--layout", "loop").stdout
    assert "2 draws (loop)" in said
    assert "gives probs, entropy, aleatoric, epistemic" in said
    assert torch.export.load(path).module()(torch.zeros(5, 1, 8, 8))["probs"].shape == (5, 10)


def test_a_wrong_suffix_ends_in_one_line(fitted, tmp_path):
    said = run("export", fitted, "-o", tmp_path / "model.pb", code=1).stderr
    assert said.startswith('error: a file of format "onnx" must end in .onnx')
    assert list(tmp_path.iterdir()) == []
