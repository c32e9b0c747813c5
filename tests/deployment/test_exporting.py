"""Files: onnxruntime and torch.export compute what predict computes, at any size of batch; or nothing is left."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deployed_networks import AgainstTheBatch, networks, normal, ready, tokens
from torch import Tensor, nn

from core_models import conv_net, mlp
from stfbnn.batches import Inputs, rows, tensors_of
from stfbnn.conversion import bayesianize
from stfbnn.deployment import ExportError, export, exporting, onnx_file
from stfbnn.errors import InputError, NotFittedError
from stfbnn.likelihood import Categorical, CustomLikelihood, Gaussian
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import Mixture
from stfbnn.prediction import predict


def run_onnx(path: Path, inputs: Inputs) -> dict[str, Tensor]:
    """By onnxruntime alone; inputs by their place."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    feeds = {name: value.numpy() for name, value in zip(names, tensors_of(inputs), strict=True)}
    outputs = [one.name for one in session.get_outputs()]
    return dict(zip(outputs, map(torch.from_numpy, session.run(None, feeds)), strict=True))


def assert_predicts(found: dict[str, Tensor], bnn: BayesianNetwork, inputs: Inputs, samples: int, seed: int) -> None:
    pred = predict(bnn, inputs, samples=samples, seed=seed)
    assert (found["epistemic"] > 0).all()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), getattr(pred, name).double(), atol=1e-4, rtol=0, msg=name)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "initializer_range": 0.5,
    }
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).eval()


def test_a_convolutional_network_in_onnx_is_small_and_says_what_it_is(tmp_path: Path) -> None:
    model = conv_net()
    bnn = ready(model, normal(2, 1, 8, 8))
    bnn.predictive_temperature = 1.5
    path = tmp_path / "sub" / "model.onnx"
    more = {"classes": '["a", "b", "c"]'}
    done = export(bnn, path, normal(2, 1, 8, 8), samples=4, seed=3, opset=18, metadata=more)
    for size in (1, 3, 17):
        assert_predicts(run_onnx(path, normal(size, 1, 8, 8)), bnn, normal(size, 1, 8, 8), 4, 3)

    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [18]
    found = {entry.key: entry.value for entry in graph.metadata_props}
    assert found["model_fingerprint"] == bnn.model_fingerprint
    assert found["stfbnn_version"] == "0.1.0"
    numbers = {"temperature": 0.5, "predictive_temperature": 1.5, "samples": 4, "seed": 3, "output_count": 3}
    assert {name: float(found[name]) for name in numbers} == numbers
    assert (found["likelihood"], found["classes"], found["layout"]) == ("categorical", more["classes"], "stacked")
    dimensions = [
        [one.dim_param or one.dim_value for one in value.type.tensor_type.shape.dim] for value in graph.graph.input
    ]
    assert dimensions == [["batch", 1, 8, 8]]
    assert str(Path.cwd()) not in path.read_bytes().decode("latin1")

    # One convolution of the trunk, and four of the first layer, whose trained weights are not in the file.
    assert sum(node.op_type == "Conv" for node in graph.graph.node) == 5
    weights = sum(np.prod(one.dims) for one in graph.graph.initializer if len(one.dims) > 1)
    assert weights == 4 * 36 + model[3].weight.numel() + model[9].weight.numel()
    assert (done.path, done.size) == (path, path.stat().st_size)
    assert (done.inputs, done.outputs) == (("input",), ("probs", "entropy", "aleatoric", "epistemic"))
    assert 0 <= done.difference <= 1e-4


def test_embedding_and_lstm_in_onnx(tmp_path: Path) -> None:
    model, inputs, _ = networks()["tagger"]
    bnn = ready(model, rows(inputs, 0, 2))
    export(bnn, tmp_path / "m.onnx", rows(inputs, 0, 2), samples=3)
    for size in (1, 3, 17):
        assert_predicts(run_onnx(tmp_path / "m.onnx", tokens(size)), bnn, tokens(size), 3, 0)


def test_a_transformers_model_in_onnx_takes_its_mapping_with_a_padding_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = {"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long), "return_dict": True}
    bnn = ready(bert(), example)
    assert bnn.layer_name == "bert.embeddings.word_embeddings"
    done = export(bnn, tmp_path / "m.onnx", example, samples=2)
    assert done.inputs == ("input_ids", "attention_mask")
    for size in (1, 3, 17):
        mask = (torch.arange(6) < 1 + torch.arange(size).unsqueeze(1) % 6).long()
        inputs = {**example, "input_ids": tokens(size, 6), "attention_mask": mask}
        assert_predicts(run_onnx(tmp_path / "m.onnx", inputs), bnn, inputs, 2, 0)


def test_a_regression_by_a_mixture_in_onnx_with_an_input_named_as_an_output(tmp_path: Path) -> None:
    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(outputs=1)

        def forward(self, mean: Tensor, scale: Tensor) -> Tensor:
            return self.net(mean / scale) * 50

    def inputs(size: int) -> tuple[Tensor, Tensor]:
        return normal(size, 6), normal(size, 1).abs() + 1

    bnn = ready(Ratio(), inputs(2), Gaussian(noise_std=0.3), posterior=Mixture(components=2))
    with torch.no_grad():
        bnn.posterior.components[1].mean_vector().add_(0.5)
        bnn.posterior.set_weights(torch.tensor([0.8, 0.2]))
    done = export(bnn, tmp_path / "m.onnx", inputs(2), samples=4)
    assert (done.inputs, done.outputs) == (("mean_input", "scale"), ("mean", "std", "aleatoric", "epistemic"))
    for size in (1, 3, 17):
        pred = predict(bnn, inputs(size), samples=4)
        for name, value in run_onnx(tmp_path / "m.onnx", inputs(size)).items():
            torch.testing.assert_close(value, getattr(pred, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
def test_a_program_of_torch_goes_round_with_several_inputs(kind: str, tmp_path: Path) -> None:
    model, inputs, _ = networks()[kind]
    bnn = ready(model, rows(inputs, 0, 2), Categorical())
    done = export(bnn, tmp_path / "m.pt2", rows(inputs, 0, 1), samples=3, seed=1, format="torch")
    assert done.inputs == (("left", "right") if kind == "tuple" else ("right", "left"))
    assert done.difference <= 1e-4
    extra = {"stfbnn.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert program.example_inputs is None
    assert json.loads(extra["stfbnn.json"])["model_fingerprint"] == bnn.model_fingerprint
    for size in (1, 3, 17):
        part = rows(inputs, 0, size)
        if kind == "tuple":
            found = program.module()(*part)
        else:
            found = program.module()(**{name: value for name, value in part.items() if name != "sign"})
        assert_predicts(found, bnn, part, 3, 1)


def test_probabilities_draw_by_draw_in_a_program_of_torch(tmp_path: Path) -> None:
    bnn = ready(nn.Sequential(mlp(), nn.Softmax(1)), normal(2, 6), Categorical(outputs="probabilities"))
    done = export(bnn, tmp_path / "m.pt2", normal(2, 6), samples=3, format="torch", layout="loop")
    assert (done.layout, done.samples) == ("loop", 3)
    assert_predicts(torch.export.load(tmp_path / "m.pt2").module()(normal(17, 6)), bnn, normal(17, 6), 3, 0)


class DecidesByValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else self.net(-x)


class ExampleByExample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(one.unsqueeze(0)) for one in x])


class NotInOnnx(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.net(x))


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (DecidesByValues, "torch", "its forward decides by the values of its tensors"),
        (ExampleByExample, "torch", "for one size of batch only"),
        (AgainstTheBatch, "torch", "depend on the rest of the batch"),
        (NotInOnnx, "onnx", "cannot be written as ONNX .*bessel_j0"),
    ],
)
def test_networks_that_cannot_be_exported_are_named_and_leave_no_file(
    model: Any, kind: Any, message: str, tmp_path: Path
) -> None:
    bnn = ready(model(), normal(4, 6).abs())
    path = tmp_path / ("m.onnx" if kind == "onnx" else "m.pt2")
    with pytest.raises(ExportError, match=message):
        export(bnn, path, normal(4, 6).abs(), samples=2, format=kind)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_does_not_replace_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bnn = ready(mlp(), normal(2, 6))
    path = tmp_path / "m.pt2"
    path.write_text("old")
    before = exporting.plain_call
    monkeypatch.setattr(exporting, "plain_call", lambda *a: {name: value + 2e-4 for name, value in before(*a).items()})
    with pytest.raises(ExportError, match=r"differs from PyTorch by 2\.0e-04, where 1e-04 is allowed"):
        export(bnn, path, normal(2, 6), samples=2, format="torch")
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    assert path.read_text() == "old"


def test_without_onnxruntime_the_file_is_written_and_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with caplog.at_level(logging.WARNING):
        done = export(ready(mlp(), normal(2, 6)), tmp_path / "m.onnx", normal(2, 6), samples=2)
    assert done.difference is None
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))
    assert caplog.records == []


def test_what_is_asked_wrongly_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(2, 6)
    bnn, path = ready(mlp(), x), tmp_path / "m.onnx"

    def refused(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(InputError, match=match):
            export(*(arguments or (bnn, path, x)), **options)

    monkeypatch.setattr(exporting, "build", None)
    refused('format must be "onnx" or "torch"', format="tflite")
    refused("must end in .pt2, but it is", format="torch")
    refused("must end in .onnx", bnn, tmp_path / "m.bin", x)
    refused("is a folder", bnn, tmp_path.joinpath("d.onnx").mkdir() or tmp_path / "d.onnx", x)
    refused("opset must be an integer of at least 18", opset=9)
    refused("leave it away", bnn, tmp_path / "m.pt2", x, format="torch", opset=18)
    refused("metadata must be texts by names", metadata={"classes": 3})
    refused("stfbnn.bayesianize or stfbnn.load", mlp(), path, x)
    refused(r"10000000 draws of the first layer are 3\.\d GB, and an ONNX file holds 2 GB", samples=10**7)
    with pytest.raises(NotFittedError):
        export(bayesianize(mlp(), x), path, x)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(r"needs the package onnxscript: pip install 'stfbnn\[onnx\]'")
    monkeypatch.undo()
    own = CustomLikelihood(lambda outputs, targets: -(outputs - targets).square().sum(1))
    refused("likelihood of your own", ready(mlp(), x, own), path, x)
    assert [file.name for file in tmp_path.iterdir()] == ["d.onnx"]


def test_a_runtime_that_does_not_take_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="onnxruntime does not take the file"):
        onnx_file.Runtime(tmp_path / "m.onnx")
