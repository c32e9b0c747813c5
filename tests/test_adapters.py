"""Several posteriors for one model: switched in no time, at the price of their own tensors, and never mixed up."""

import builtins
import copy
import gc
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core_models import conv_net, mlp
from stfbnn.adapters import Adapters
from stfbnn.artifact import load, save
from stfbnn.conversion import bayesianize
from stfbnn.errors import ArtifactError, InputError, ModelChangedError
from stfbnn.likelihood import Categorical, Gaussian, Likelihood
from stfbnn.network import BayesianNetwork
from stfbnn.prediction import predict

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def posterior(model: nn.Module, x: Tensor, seed: int = 0, likelihood: Likelihood | None = None, **options: Any) -> Any:
    """As `fit` leaves it, each seed with another mean."""
    bnn = bayesianize(model, x[:2], **options)
    bnn.likelihood, bnn.temperature = likelihood or Categorical(), 0.1 + seed
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in bnn.posterior.parameters():
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return bnn


def saved(model: nn.Module, x: Tensor, folder: Path, seeds: Iterable[int], **options: Any) -> list[Path]:
    return [save(posterior(model, x, seed, **options), folder / str(seed)) for seed in seeds]


def storages(networks: Iterable[nn.Module]) -> dict[int, int]:
    """Bytes by address of all memory that the networks' tensors lie in, those that are no parameters too."""
    found = {}
    for network in networks:
        plain = [value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        trained = getattr(network, "trained", {}).values()
        for tensor in (*network.parameters(), *network.buffers(), *plain, *trained):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def wide() -> nn.Module:
    """A trunk of 10 MB behind a layer of 40 bytes, with batch norms in it that are folded."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(1, 512, 3, padding=1),
        nn.BatchNorm2d(512),
        nn.ReLU(),
        nn.Conv2d(512, 512, 3, padding=1),
        nn.BatchNorm2d(512),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 3),
    )
    return net.eval()


def resident() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_each_adapter_predicts_what_its_folder_predicts_alone(tmp_path: Path) -> None:
    model = conv_net()
    folders = saved(model, IMAGES, tmp_path, range(3))
    adapters = Adapters(model)
    for number, folder in enumerate(folders):
        adapters.add(f"site {number}", folder)
    alone = [predict(load(folder, model), IMAGES).log_probs for folder in folders]
    for number in (2, 0, 1, 0):
        adapters.activate(f"site {number}")
        assert adapters.active == f"site {number}"
        assert torch.equal(predict(adapters.current, IMAGES).log_probs, alone[number])
        assert torch.equal(predict(adapters["site 1"], IMAGES).log_probs, alone[1])
    assert not torch.equal(alone[0], alone[1])


def test_calls_go_to_the_active_adapter(tmp_path: Path) -> None:
    model = mlp().eval()
    first, second = posterior(model, X, 0), posterior(model, X, 1)
    adapters = Adapters(model)
    adapters.add("first", first)
    adapters.add("second", second)
    assert adapters.active == "first"
    assert torch.equal(adapters(X, weights="mean"), first(X, weights="mean"))
    with adapters.using("second") as network:
        assert network is second
        assert torch.equal(adapters(X, weights="mean"), second(X, weights="mean"))
    assert adapters.active == "first"
    with pytest.raises(ZeroDivisionError), adapters.using("second"):
        1 / 0  # noqa: B018 - to leave the block
    assert adapters.active == "first"
    assert torch.equal(adapters.model(X), model(X))


def test_adapters_on_one_layer_share_the_trunk_and_all_share_the_models_tensors(tmp_path: Path) -> None:
    model = conv_net()
    (one, two), (other,) = saved(model, IMAGES, tmp_path, range(2)), saved(model, IMAGES, tmp_path, [2], layer="3")
    (plain,) = saved(model, IMAGES, tmp_path, [3], fold_batch_norm=False)
    adapters = Adapters(model)
    for folder in (one, two, other, plain):
        adapters.add(folder.name, folder)
    assert adapters["0"].folding.folded
    assert adapters["0"].network is adapters["1"].network
    assert adapters["2"].network is not adapters["0"].network
    assert adapters["3"].network is not adapters["0"].network, "one is folded and the other is not"
    own = storages([model])
    for name in adapters:
        found = adapters[name].network.get_submodule("9")
        assert found.weight.untyped_storage().data_ptr() in own
    posteriors = [storages([adapters[name].posterior]) for name in adapters]
    assert not posteriors[0].keys() & posteriors[1].keys()


def test_the_tenth_adapter_costs_kilobytes(tmp_path: Path) -> None:
    model = wide()
    folders = saved(model, IMAGES, tmp_path, range(10))
    trunk = sum(storages([model]).values())
    assert trunk > 9e6
    adapters = Adapters(model)
    adapters.add("0", folders[0])
    assert len(adapters["0"].folding.folded) == 2
    for number in range(1, 9):
        adapters.add(str(number), folders[number])
    gc.collect()
    before, held = resident(), storages([model, *(adapters[name] for name in adapters)])
    adapters.add("9", folders[9])
    gc.collect()
    after = storages([model, *(adapters[name] for name in adapters)])
    assert sum(after.values()) - sum(held.values()) < 1000
    assert resident() - before < trunk / 4
    assert sum(after.values()) < 2 * trunk + 10_000, "the model, and once what folding made new"


def test_switching_reads_no_file_and_copies_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp().eval()
    adapters = Adapters(model)
    for folder in saved(model, X, tmp_path, range(2)):
        adapters.add(folder.name, folder)
        for file in folder.iterdir():
            file.unlink()
    places = storages([adapters[name] for name in adapters])

    def refuse(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"a file was opened: {arguments}")

    for owner in (builtins, Path):
        monkeypatch.setattr(owner, "open", refuse)
    outputs = []
    for name in ("1", "0", "1"):
        adapters.activate(name)
        outputs.append(adapters(X, weights="mean"))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert storages([adapters[name] for name in adapters]) == places


def test_adapters_may_differ_in_all_that_belongs_to_a_posterior(tmp_path: Path) -> None:
    model = mlp().eval()
    made = {
        "mean-field": posterior(model, X, 0),
        "low-rank": posterior(model, X, 1, posterior="low-rank", prior="pretrained"),
        "regression": posterior(model, X, 2, likelihood=Gaussian(noise_std=0.3)),
        "other layer": posterior(model, X, 3, layer="2"),
    }
    adapters = Adapters(model)
    for name, bnn in made.items():
        adapters.add(name, save(bnn, tmp_path / name))
    assert adapters["mean-field"].network is adapters["low-rank"].network is adapters["regression"].network
    assert [adapters[name].temperature for name in adapters] == [0.1, 1.1, 2.1, 3.1]
    for name, bnn in made.items():
        mine, alone = predict(adapters[name], X), predict(bnn, X)
        assert type(mine) is type(alone)
        targets = torch.zeros(16, 3) if name == "regression" else torch.zeros(16, dtype=torch.long)
        assert torch.equal(mine.log_density(targets), alone.log_density(targets))


def test_a_network_gives_up_its_own_trunk_for_the_shared_one(tmp_path: Path) -> None:
    model = conv_net()
    (folder,) = saved(model, IMAGES, tmp_path, [0])
    adapters = Adapters(model)
    adapters.add("folder", folder)
    bnn = posterior(model, IMAGES, 1)
    before = predict(bnn, IMAGES).log_probs
    assert adapters.add("network", bnn) is bnn
    assert bnn.network is adapters["folder"].network
    assert torch.equal(predict(bnn, IMAGES).log_probs, before)
    apart = posterior(model, IMAGES, 2, layer="3")
    adapters.add("another layer", apart)
    assert apart.network is not bnn.network


def test_moving_one_adapter_leaves_the_others_where_they_are(tmp_path: Path) -> None:
    model = conv_net()
    adapters = Adapters(model)
    for folder in saved(model, IMAGES, tmp_path, range(2)):
        adapters.add(folder.name, folder)
    before = adapters["1"](IMAGES, weights="mean")
    wanted = adapters["0"](IMAGES, weights="mean")
    moved = adapters["0"].double()
    assert moved.network is not adapters["1"].network
    torch.testing.assert_close(moved(IMAGES.double(), weights="mean"), wanted.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(adapters["1"](IMAGES, weights="mean"), before)
    (folder,) = saved(model, IMAGES, tmp_path, [2])
    assert adapters.add("2", folder).network is adapters["1"].network, "not the one in double precision"
    assert next(model.parameters()).dtype == torch.float32


def test_a_posterior_of_another_model_is_refused(tmp_path: Path) -> None:
    model, other = conv_net(), conv_net(seed=1)
    (folder,) = saved(other, IMAGES, tmp_path, [0])
    adapters = Adapters(model)
    with pytest.raises(ArtifactError, match="other buffers"):
        adapters.add("a", folder)
    with pytest.raises(InputError, match="not made from this very model"):
        adapters.add("a", posterior(copy.deepcopy(model), IMAGES))
    assert adapters.names == ()
    assert adapters.active is None


@pytest.mark.parametrize("number", [0, 1])
def test_after_a_change_of_the_model_every_adapter_refuses(number: int, tmp_path: Path) -> None:
    model = mlp().eval()
    folders = saved(model, X, tmp_path, range(2))
    adapters = Adapters(model)
    adapters.add("0", folders[0])
    adapters.add("1", posterior(model, X, 1))
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(ModelChangedError):
        adapters[str(number)](X)
    with pytest.raises(ModelChangedError):
        predict(adapters[str(number)], X)
    with pytest.raises(ModelChangedError):
        adapters.add("2", folders[1])


def test_a_change_that_no_counter_sees_leads_to_no_shared_trunk(tmp_path: Path) -> None:
    model = conv_net()
    adapters = Adapters(model)
    adapters.add("before", saved(model, IMAGES, tmp_path, [0])[0])
    model[3].weight.data.mul_(2)
    added = adapters.add("after", saved(model, IMAGES, tmp_path, [1])[0])
    assert added.network is not adapters["before"].network
    assert torch.equal(predict(added, IMAGES).log_probs, predict(load(tmp_path / "1", model), IMAGES).log_probs)


def test_removing_frees_and_the_active_one_leaves_none(tmp_path: Path) -> None:
    model = mlp().eval()
    adapters = Adapters(model)
    adapters.add("a", posterior(model, X, 0))
    adapters.add("b", posterior(model, X, 1))
    adapters.remove("a")
    assert (adapters.names, adapters.active, len(adapters)) == (("b",), None, 1)
    with pytest.raises(InputError, match="no adapter is active"):
        adapters(X)
    adapters.activate("b")
    with adapters.using("b"):
        adapters.remove("b")
    assert adapters.active is None
    assert "b" not in adapters
    adapters.add("b", posterior(model, X, 1))
    assert adapters.active == "b"


MISTAKES: list[tuple[str, Callable[[Adapters, BayesianNetwork], Any]]] = [
    ("there is an adapter 'a' already", lambda adapters, bnn: adapters.add("a", bnn)),
    ("must be a text", lambda adapters, bnn: adapters.add("", bnn)),
    ("must be a text", lambda adapters, bnn: adapters.add(3, bnn)),  # type: ignore[arg-type]
    ("are for folders", lambda adapters, bnn: adapters.add("b", bnn, example_inputs=X)),
    ("there is no adapter 'b'; there are 'a'", lambda adapters, _: adapters["b"]),
    ("there is no adapter 'b'", lambda adapters, _: adapters.activate("b")),
    ("there is no adapter 'b'", lambda adapters, _: adapters.remove("b")),
    ("there is no adapter 'b'", lambda adapters, _: adapters.using("b").__enter__()),
    ("must be a torch", lambda *_: Adapters("model")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_named(number: int) -> None:
    message, call = MISTAKES[number]
    model = mlp().eval()
    adapters = Adapters(model)
    adapters.add("a", posterior(model, X))
    with pytest.raises(InputError, match=message):
        call(adapters, posterior(model, X))
    assert (adapters.names, adapters.active) == (("a",), "a")


def test_it_says_what_it_holds() -> None:
    model = mlp().eval()
    adapters = Adapters(nn.DataParallel(model))
    adapters.add("a", posterior(model, X))
    assert adapters.model is model
    assert list(adapters) == ["a"]
    assert "'a' (active): layer='0'" in repr(adapters)
