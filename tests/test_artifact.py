"""Saving and loading: nothing is lost, and nothing damaged or foreign gets in."""

import copy
import hashlib
import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from core_models import classification, conv_net, loader, mlp
from stfbnn import artifact_files
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.description import describe_inputs, stand_in
from stfbnn.errors import ArtifactError, InputError, ModelChangedError, NotFittedError
from stfbnn.inference.fit import fit
from stfbnn.likelihood import Categorical, Gaussian
from stfbnn.network import BayesianNetwork
from stfbnn.posterior import MeanField, MeanFieldPosterior
from stfbnn.prediction import predict
from stfbnn.prior import Normal
from stfbnn.provenance import attach, provenance_of

FILES = {"config.json", "posterior.safetensors", "README.md"}


def fitted(model: nn.Module, x: Any, y: Tensor, likelihood: Any = "auto", **options: Any) -> BayesianNetwork:
    bnn = bayesianize(model, x, **options)
    batches = [(x, y)]
    fit(bnn, batches, epochs=1, engine="bayes-by-backprop", likelihood=likelihood, temperature=0.3, progress=False)
    return bnn


def small(prior: Any = None, likelihood: Any = "auto", seed: int = 0) -> tuple[nn.Module, BayesianNetwork, Tensor]:
    model = mlp(seed=seed).eval()
    x, y = classification(40)
    return model, fitted(model, x, y, likelihood, prior=prior), x


class TwoInputs(nn.Module):
    """Takes a mapping: tokens through an embedding, a mask and a number; returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor, mask: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        weights = mask.unsqueeze(-1).float()
        mean = (self.embedding(tokens) * weights).sum(1) / weights.sum(1)
        return {"scores": self.head(self.norm(mean)) * scale}


def scores(raw: dict[str, Tensor]) -> Tensor:
    return raw["scores"]


def mlp_case() -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    x, y = classification(40)
    return mlp(), x, y, {"prior": "empirical-bayes"}


def conv_case() -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    return conv_net(), torch.randn(24, 1, 8, 8), torch.arange(24) % 3, {"prior": "pretrained"}


def no_folding_case() -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    return conv_net(), torch.randn(24, 1, 8, 8), torch.arange(24) % 3, {"fold_batch_norm": False}


def regression_case() -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    x = torch.randn(30, 6)
    return mlp(outputs=2), x, x[:, :2] + 0.1 * torch.randn(30, 2), {"prior": 0.7}


def embedding_case() -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    model = TwoInputs()
    model.norm.running_var.mul_(2)
    inputs = {"tokens": torch.randint(3, 20, (18, 7)), "mask": torch.rand(18, 7) > 0.3, "scale": 2.0}
    inputs["mask"][:, 0] = True
    return model, inputs, torch.arange(18) % 3, {"output": scores}


def double_case() -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    x, y = classification(40)
    return mlp().double(), x.double(), y, {"layer": "2"}


def single_layer_case() -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    x, y = classification(40)
    return nn.Linear(6, 3), x, y, {}


CASES = [
    mlp_case,
    conv_case,
    no_folding_case,
    regression_case,
    embedding_case,
    double_case,
    single_layer_case,
]


def values(prediction: Any) -> Tensor:
    return prediction.draws if hasattr(prediction, "draws") else prediction.log_probs


@pytest.mark.parametrize("case", CASES)
def test_loading_gives_back_the_same_network(tmp_path: Path, case: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    model, x, y, options = case()
    bnn = fitted(model.eval(), x, y, **options)
    bnn.num_examples = 123
    bnn.predictive_temperature = 1.0 if y.is_floating_point() else 1.2345678901234567
    assert save(bnn, tmp_path / "saved") == tmp_path / "saved"
    again = load(tmp_path / "saved", copy.deepcopy(model), output=options.get("output"))

    assert torch.equal(values(predict(again, x, samples=5, seed=3)), values(predict(bnn, x, samples=5, seed=3)))
    assert torch.equal(again.prior.std, bnn.prior.std)
    assert torch.equal(again.prior.mean, bnn.prior.mean)
    assert again.prior.learned == bnn.prior.learned
    assert again.prior_recipe == bnn.prior_recipe
    assert type(again.likelihood) is type(bnn.likelihood)
    assert again.likelihood.config() == bnn.likelihood.config()
    for name in ("temperature", "predictive_temperature", "num_examples", "layer_name", "first_layer"):
        assert getattr(again, name) == getattr(bnn, name)
    assert again.folding.folded == bnn.folding.folded
    assert again.folding.convolutions == bnn.folding.convolutions
    assert again.input_description == bnn.input_description
    for name, value in bnn.posterior.std().items():
        assert torch.equal(again.posterior.std()[name], value)


def test_folding_is_restored_without_the_example_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y, options = conv_case()
    bnn = fitted(model, x, y, **options)
    assert bnn.folding.first_layer_affine is not None, "the case is to have a norm folded into the random layer"
    save(bnn, tmp_path / "a")
    assert load(tmp_path / "a", model).folding.first_layer_affine is not None
    assert load(tmp_path / "a", model, x).folding.folded == bnn.folding.folded


def test_undescribable_inputs_leave_norms_unfolded_with_a_warning(tmp_path: Path) -> None:
    class Moded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor, mode: str) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    model = Moded().eval()
    x = (torch.randn(8, 1, 8, 8), "a word, which is not written down")
    bnn = bayesianize(model, x)
    assert bnn.input_description is None
    assert bnn.folding.folded
    bnn.likelihood, bnn.temperature = Categorical(), 1.0
    save(bnn, tmp_path / "a")
    with pytest.warns(UserWarning, match="example_inputs="):
        unfolded = load(tmp_path / "a", model)
    assert not unfolded.folding.folded
    vector = bnn.posterior.mean_vector() + 0.1
    torch.testing.assert_close(unfolded.outputs(vector, x), bnn.outputs(vector, x))
    assert torch.equal(load(tmp_path / "a", model, x).outputs(vector, x), bnn.outputs(vector, x))


def test_stand_ins_fit_their_description() -> None:
    real = {
        "image": torch.rand(3, 4, 5, dtype=torch.float64) * 3 - 1,
        "tokens": torch.tensor([[2, 9, 4]]),
        "mask": torch.tensor([[True, False, False], [True, True, False]]),
        "none": None,
        "flag": True,
    }
    made = stand_in(json.loads(json.dumps(describe_inputs(real))), torch.device("cpu"))
    assert list(made) == list(real)
    for name in ("image", "tokens", "mask"):
        assert made[name].shape == real[name].shape
        assert made[name].dtype == real[name].dtype
        assert made[name].min() >= real[name].min()
        assert made[name].max() <= real[name].max()
    assert made["image"].unique().numel() > 30
    assert made["mask"].any(1).all()
    assert not made["mask"].all(1).any()
    assert (made["none"], made["flag"]) == (None, True)
    for indescribable in (torch.tensor([1.0, math.inf]), (torch.zeros(2), "a text"), (torch.zeros(2), [1])):
        assert describe_inputs(indescribable) is None
    pair = stand_in(describe_inputs((torch.zeros(2, 3), 4)), torch.device("cpu"))
    assert isinstance(pair, tuple)
    assert pair[1] == 4


def test_inference_can_go_on(tmp_path: Path) -> None:
    model, bnn, x = small(prior="empirical-bayes")
    save(bnn, tmp_path / "a")
    again = load(tmp_path / "a", model)
    y = classification(40)[1]
    for network in (bnn, again):
        fit(network, loader(x, y, shuffle=False), epochs=1, temperature=1.0, progress=False)
    for name, value in bnn.posterior.mean().items():
        assert torch.equal(again.posterior.mean()[name], value)
    assert torch.equal(again.prior.std, bnn.prior.std)


def test_files_and_their_size(tmp_path: Path) -> None:
    model = mlp(inputs=300, hidden=50).eval()
    bnn = fitted(model, torch.randn(8, 300), torch.arange(8) % 3)
    save(bnn, tmp_path / "deep" / "er" / "a", metrics={"test NLL": 0.25, "a|b": 1})
    folder = tmp_path / "deep" / "er" / "a"
    assert {entry.name for entry in folder.iterdir()} == FILES
    assert [entry.name for entry in folder.parent.iterdir()] == ["a"], "nothing temporary is left"
    size = 300 * 50 + 50
    assert 8 * size < (folder / "posterior.safetensors").stat().st_size <= 8 * size + 4096
    assert (folder / "config.json").stat().st_size <= 4096
    card = (folder / "README.md").read_text()
    for text in ("weight 50×300", "15,050", "| test NLL | 0.25 |", "a\\|b", 'stfbnn.load("a"', "T | 0.3", "zero"):
        assert text.replace('"', "'") in card
    # The tensors by a reader of one's own: header length, JSON header, raw little-endian numbers.
    raw = (folder / "posterior.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    start, stop = header["log_std.weight"]["data_offsets"]
    log_std = np.frombuffer(raw[8 + length :][start:stop], "<f4").reshape(header["log_std.weight"]["shape"])
    np.testing.assert_allclose(np.exp(log_std), bnn.posterior.std()["weight"].numpy(), rtol=1e-6)
    # The checksum as docs/artifact-format.md says it.
    config = (folder / "config.json").read_bytes()
    stored = json.loads(config)["checksum"]
    assert hashlib.sha256(config.replace(stored.encode(), b"0" * 64)).hexdigest() == stored
    assert hashlib.sha256(raw).hexdigest() == json.loads(config)["file"]["sha256"]
    assert torch.equal(load(folder, model).posterior.mean()["weight"], bnn.posterior.mean()["weight"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    model = mlp(inputs=2, hidden=2, outputs=2).eval()
    bnn = fitted(model, torch.randn(8, 2), torch.arange(8) % 2)
    return save(bnn, tmp_path_factory.mktemp("artifact") / "a"), model


@pytest.mark.parametrize("name", ["config.json", "posterior.safetensors"])
def test_every_flipped_bit_and_every_cut_is_refused(saved: tuple[Path, nn.Module], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a"
    shutil.copytree(saved[0], folder)
    good = (folder / name).read_bytes()

    # Every byte once, its bit going round; then bits and cuts at random places.
    for index in range(len(good)):
        bad = bytearray(good)
        bad[index] ^= 1 << index % 8
        (folder / name).write_bytes(bad)
        with pytest.raises(ArtifactError):
            artifact_files.read_folder(folder)

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 8 * len(good) - 1), st.integers(0, len(good) - 1))
    def damage(bit: int, length: int) -> None:
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        for bad in (bytes(flipped), good[:length], good + good[: length + 1]):
            (folder / name).write_bytes(bad)
            with pytest.raises(ArtifactError):
                load(folder, saved[1])

    damage()
    (folder / name).write_bytes(good)
    assert load(folder, saved[1]).fitted
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=re.escape(name)):
        load(folder, saved[1])


def edit(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A well-signed artifact with other content, as a buggy or hostile writer might make it."""
    _, tensors = artifact_files.read_folder(source)
    entries = json.loads((source / "config.json").read_text())
    for key in ("checksum", "file"):
        del entries[key]
    change(entries, tensors)
    artifact_files.write_folder(target, entries, tensors, "", overwrite=True)
    return target


def set_value(tensor: str, value: float) -> Callable[[Any, Any], None]:
    return lambda entries, tensors: tensors[tensor].view(-1)[0].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("loc.weight", math.nan), "loc.weight.*1 NaN or infinite"),
        (set_value("log_std.bias", math.inf), "log_std.bias.*NaN or infinite"),
        (set_value("log_std.bias", -200.0), "1 standard deviations that are not positive"),
        (set_value("log_std.bias", 200.0), "1 standard deviations that are not positive"),
        (lambda e, t: t.pop("loc.bias"), r"missing \['loc.bias'\]"),
        (lambda e, t: t.update(extra=torch.zeros(1)), r"unexpected \['extra'\]"),
        (lambda e, t: t.update({"loc.bias": t["loc.bias"].double()}), "loc.bias.*float64.*float32"),
        (lambda e, t: t.update({"loc.weight": torch.zeros(2, 3)}), r"loc.weight.*\(2, 3\).*\(2, 2\)"),
        (lambda e, t: e.pop("prior"), "no entry 'prior.recipe'"),
        (lambda e, t: e["prior"].update(std=0), "prior.std.*positive"),
        (lambda e, t: e["prior"]["recipe"].update(std=-1.0), "prior cannot be built"),
        (lambda e, t: e.update(temperature="warm"), "temperature.*type int or float"),
        (lambda e, t: e.update(temperature=True), "temperature.*type int or float"),
        (lambda e, t: e.update(num_examples=1.5), "num_examples.*int or null"),
        (lambda e, t: e["layer"].update(tied=[1]), "layer.tied.*list of strings"),
        (lambda e, t: e["posterior"].update(family="cauchy"), "cauchy"),
        (lambda e, t: e["posterior"]["config"].update(rank=3), "mean-field.*rank"),
        (lambda e, t: e["likelihood"].update(name="poisson"), "poisson"),
        (lambda e, t: e.update(format="other"), '"format" is .other'),
        (lambda e, t: e.update(format_version="2.0", library_version="9.9"), r"version 2.0.*reads 1.x.*stfbnn 9.9"),
    ],
)
def test_well_signed_nonsense_is_refused(
    saved: tuple[Path, nn.Module], tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(edit(saved[0], tmp_path / "b", change), saved[1])


def test_tensors_of_another_artifact_are_refused(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    other = edit(saved[0], tmp_path / "b", set_value("loc.weight", 3.0))
    shutil.copy(saved[0] / "config.json", other / "config.json")
    with pytest.raises(ArtifactError, match="SHA-256"):
        load(other, saved[1])


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '"' + "0" * 64 + '"', '{"temperature": NaN}', "\xff\xfe"])
def test_what_is_no_description_is_refused(saved: tuple[Path, nn.Module], tmp_path: Path, text: str) -> None:
    folder = tmp_path / "a"
    shutil.copytree(saved[0], folder)
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError):
        load(folder, saved[1])


def test_future_entries_and_minor_versions_are_tolerated(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    def extend(entries: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        entries["format_version"] = "1.7"
        entries["a new entry"] = {"of": ["any", "kind"]}
        entries["layer"]["colour"] = "blue"

    folder = edit(saved[0], tmp_path / "b", extend)
    assert json.loads((folder / "config.json").read_text())["format_version"] == "1.7"
    assert load(folder, saved[1]).fitted
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"blue"', '"bleu"'))
    with pytest.raises(ArtifactError, match="damaged or was edited"):
        load(folder, saved[1])


def with_norm(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), activation(), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()


def renamed() -> nn.Module:
    return nn.ModuleDict({"body": with_norm()})


def widened(index: int) -> nn.Module:
    model = with_norm()
    model[index] = nn.Linear(6, 7) if index == 0 else nn.Linear(5, 4)
    return model


def altered(name: str) -> nn.Module:
    model = with_norm()
    with torch.no_grad():
        model.state_dict()[name].view(-1)[0].add_(1)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (renamed(), "no layer '0'.*another architecture"),
        (widened(0), r"layer '0' has the parameters.*\[7, 6\].*\[5, 6\].*another architecture"),
        (with_norm().double(), "float64.*float32"),
        (widened(3), "another architecture.*Sequential of 63 parameters.*Sequential of 69"),
        (with_norm(nn.Tanh), "another architecture.*activation"),
        (altered("3.weight"), "same architecture but other trunk weights"),
        (altered("2.weight"), "same architecture but other trunk weights"),
        (altered("2.running_mean"), "same architecture but other buffers"),
        (altered("2.num_batches_tracked"), "same architecture but other buffers"),
        (altered("0.bias"), "trained weights of the layer '0'"),
    ],
)
def test_another_model_is_refused_and_named(tmp_path: Path, model: nn.Module, message: str) -> None:
    x, y = classification(20)
    folder = save(fitted(with_norm(), x, y), tmp_path / "a")
    with pytest.raises(ArtifactError, match=message):
        load(folder, model)
    assert load(folder, nn.DataParallel(with_norm())).fitted


def test_only_a_fitted_and_unchanged_network_is_saved(tmp_path: Path) -> None:
    x, _ = classification(20)
    with pytest.raises(NotFittedError):
        save(bayesianize(mlp(), x), tmp_path / "a")
    with pytest.raises(InputError, match="Sequential"):
        save(mlp(), tmp_path / "a")  # type: ignore[arg-type]
    model, bnn, _ = small()
    with torch.no_grad():
        model[2].bias.add_(1)
    with pytest.raises(ModelChangedError):
        save(bnn, tmp_path / "a")
    _, bnn, _ = small()
    with torch.no_grad():
        bnn.posterior.log_std[0] = math.nan
    with pytest.raises(InputError, match="diverged"):
        save(bnn, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


class OwnLikelihood(Categorical):
    pass


class OwnPosterior(MeanFieldPosterior):
    pass


class OwnFamily(MeanField):
    def build(self, layout: Any, mean: Tensor, prior: Any) -> MeanFieldPosterior:
        return OwnPosterior(layout, mean, prior.std)


class OwnPrior(Normal):
    pass


def test_objects_of_the_users_own_are_refused_clearly(tmp_path: Path) -> None:
    _, bnn, _ = small(likelihood=OwnLikelihood())
    with pytest.raises(InputError, match=r"likelihood is a OwnLikelihood.*Categorical"):
        save(bnn, tmp_path / "a")
    _, bnn, _ = small(prior=OwnPrior())
    with pytest.raises(InputError, match="prior is a OwnPrior"):
        save(bnn, tmp_path / "a")
    x, y = classification(20)
    bnn = fitted(mlp().eval(), x, y, posterior=OwnFamily())
    with pytest.raises(InputError, match="family is a OwnFamily"):
        save(bnn, tmp_path / "a")
    bnn.family = MeanField()
    with pytest.raises(InputError, match="OwnPosterior"):
        save(bnn, tmp_path / "a")
    _, bnn, _ = small()
    bnn.prior.mean.add_(1)
    with pytest.raises(InputError, match="prior is not the one"):
        save(bnn, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_replaced_only_on_request(tmp_path: Path) -> None:
    model, bnn, _ = small()
    folder = save(bnn, tmp_path / "a")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(InputError, match="overwrite=True"):
        save(bnn, folder)
    assert (folder / "config.json").read_bytes() == before
    bnn.temperature = 0.01
    save(bnn, folder, overwrite=True)
    assert load(folder, model).temperature == 0.01
    (folder / "figure.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"figure\.png"):
        save(bnn, folder, overwrite=True)
    assert (folder / "figure.png").exists()
    with pytest.raises(InputError, match="is a file"):
        save(bnn, folder / "config.json")
    (tmp_path / "empty").mkdir()
    save(bnn, tmp_path / "empty")
    (tmp_path / "link").symlink_to(folder)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "empty", "link"}


def save_two(bnn: BayesianNetwork, folder: Path) -> None:
    for name in ("new", "newer"):
        save(bnn, folder / name)


@pytest.mark.parametrize("method", ["write_bytes", "rename", "mkdir"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, call: int
) -> None:
    model, bnn, _ = small()
    folder = save(bnn, tmp_path / "a")
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    bnn.temperature = 0.01
    calls = []
    original = getattr(Path, method)

    def failing(self: Path, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, method, failing)
    with pytest.raises(OSError, match="No space"):
        save(bnn, folder, overwrite=True)
    calls.clear()
    with pytest.raises(OSError, match="No space"):
        save_two(bnn, tmp_path)
    monkeypatch.undo()
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    assert load(folder, model).temperature == 0.3


def test_a_kill_between_the_renames_is_explained(tmp_path: Path) -> None:
    model, bnn, _ = small()
    save(bnn, tmp_path / "a").rename(tmp_path / ".a.0123abcd.old")
    with pytest.raises(ArtifactError, match=r"whole in .*\.a\.0123abcd\.old"):
        load(tmp_path / "a", model)
    with pytest.raises(ArtifactError, match="there is no folder"):
        load(tmp_path / "b", model)


def test_arguments_of_load(tmp_path: Path) -> None:
    model, bnn, x = small()
    folder = save(bnn, tmp_path / "a")
    assert load(str(folder), model, map_location="cpu").device == torch.device("cpu")
    with pytest.raises(InputError, match="map_location"):
        load(folder, model, map_location="nowhere")
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        load(folder, {"0.weight": x})  # type: ignore[arg-type]
    torch.manual_seed(1)
    embedding, inputs, y, options = embedding_case()
    folder = save(fitted(embedding.eval(), inputs, y, **options), tmp_path / "b")
    with pytest.raises(InputError, match="output="):
        load(folder, embedding)
    for metrics in ({"a\nb": 1.0}, {"a": math.nan}, {"a": "high"}, {1: 1.0}):
        with pytest.raises(InputError, match="metric"):
            save(bnn, tmp_path / "c", metrics=metrics)  # type: ignore[arg-type]


def test_the_noise_of_a_regression_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 6)
    model = mlp(outputs=2).eval()
    for noise in (None, [0.1, 0.3], 0.2):
        likelihood = Gaussian() if noise is None else Gaussian(noise)
        bnn = fitted(model, x, x[:, :2], likelihood)
        again = load(save(bnn, tmp_path / "a", overwrite=True), model)
        assert torch.equal(again.likelihood.noise_std, bnn.likelihood.noise_std)
        assert again.likelihood.learned == (noise is None)


def test_no_training_example_is_in_the_artifact(tmp_path: Path) -> None:
    model = mlp().eval()
    x, y = classification(40)
    attach(model, provenance_of([(x, y)]))
    folder = save(fitted(model, x, y), tmp_path / "a")
    content = b"".join((folder / name).read_bytes() for name in FILES)
    for value in bayesianize(model, x).provenance.hashes[:5].tolist():
        assert str(value).encode() not in content
        assert value.to_bytes(8, "little") not in content
    assert load(folder, model).provenance is not None
    assert load(folder, mlp().eval()).provenance is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_map_location_moves_to_an_accelerator(tmp_path: Path) -> None:
    model, bnn, x = small()
    again = load(save(bnn, tmp_path / "a"), model, map_location="cuda")
    assert again.device.type == "cuda"
    assert next(model.parameters()).device.type == "cpu"
    torch.testing.assert_close(predict(again, x).probs, predict(bnn, x).probs, rtol=1e-3, atol=1e-4)
    back = load(save(again, tmp_path / "b"), model, map_location="cpu")
    assert torch.equal(predict(back, x).probs, predict(bnn, x).probs)
