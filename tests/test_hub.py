"""Posteriors on the hub: pushed and fetched through huggingface_hub, with a stand-in for the server; nothing is sent."""

import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core_models import conv_net, mlp
from stfbnn.artifact import save
from stfbnn.conversion import bayesianize
from stfbnn.errors import ArtifactError, InputError, NotFittedError
from stfbnn.hub import from_pretrained, push_to_hub
from stfbnn.likelihood import Categorical
from stfbnn.network import BayesianNetwork
from stfbnn.prediction import predict

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra 'hub' is not installed")
errors = pytest.importorskip("huggingface_hub.errors")
constants = pytest.importorskip("huggingface_hub.constants")
utils = pytest.importorskip("huggingface_hub.utils")

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
FILES = {"config.json", "posterior.safetensors", "README.md"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server in a folder: one folder for each repository and branch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[dict[str, Any]] = []

    def folder(self, repo_id: str, revision: str | None) -> Path:
        return self.root / repo_id / (revision or "main")

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False, **_: Any) -> Any:
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.asked.append({"call": "create_repo", "private": private})
        self.folder(repo_id, None).mkdir(parents=True, exist_ok=exist_ok)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool = False) -> None:
        self.folder(repo_id, branch).mkdir(exist_ok=exist_ok)

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        return [path.name for path in self.folder(repo_id, revision).iterdir()]

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: Any, **options: Any) -> Any:
        self.asked.append({"call": "upload_folder", **options})
        target = self.folder(repo_id, options["revision"])
        names = [path.name for path in Path(folder_path).iterdir()]
        for name in utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(folder_path / name, target / name)
        url = f"https://huggingface.co/{repo_id}"
        review = f"{url}/discussions/1" if options["create_pr"] else None
        return huggingface_hub.CommitInfo(
            f"{url}/commit/{COMMIT}", options["commit_message"], "", COMMIT, pr_url=review
        )

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: Any, **options: Any) -> str:
        self.asked.append({"call": "snapshot_download", "revision": revision, **options})
        source = self.folder(repo_id, revision)
        if not source.exists():
            kind = "RevisionNotFoundError" if source.parent.exists() else "RepositoryNotFoundError"
            raise http_error(kind, 404)
        target = self.root / "cache" / repo_id
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        names = [path.name for path in source.iterdir()]
        for name in utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(source / name, target / name)
        return str(target)


def http_error(kind: str, status: int) -> Exception:
    """What huggingface_hub itself raises for an answer of the server."""
    module = sys.modules[errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
    response = module.Response(status, request=module.Request("GET", "https://huggingface.co/api"))
    found: Exception = getattr(errors, kind)(f"{status} answered", response=response)
    return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    for name in ("create_repo", "create_branch", "list_repo_files", "upload_folder"):
        function = getattr(stand_in, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda _, *a, function=function, **k: function(*a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


def fitted(model: nn.Module, x: torch.Tensor = X, shift: float = 0.2) -> BayesianNetwork:
    """As `fit` leaves it."""
    bnn = bayesianize(model, x[:2])
    bnn.likelihood, bnn.temperature = Categorical(), 0.3
    with torch.no_grad():
        for tensor in bnn.posterior.parameters():
            tensor.add_(shift)
    return bnn


def test_what_is_pushed_comes_back_bit_by_bit(hub: Hub) -> None:
    model = conv_net()
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    bnn = fitted(model, images)
    address = push_to_hub(bnn, "me/digits")
    assert address == f"https://huggingface.co/me/digits/commit/{COMMIT}"
    assert {path.name for path in hub.folder("me/digits", None).iterdir()} == FILES
    again = from_pretrained("me/digits", model)
    assert torch.equal(predict(again, images).log_probs, predict(bnn, images).log_probs)


def test_only_the_posteriors_own_two_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    model = mlp().eval()
    push_to_hub(fitted(model), "me/digits")
    (hub.folder("me/digits", None) / "setup.py").write_text("raise SystemExit", encoding="utf-8")
    from_pretrained("me/digits", model)
    assert {path.name for path in (tmp_path / "hub/cache/me/digits").iterdir()} == FILES - {"README.md"}


def test_branches_and_revisions_are_kept_apart(hub: Hub) -> None:
    model = mlp().eval()
    push_to_hub(fitted(model), "me/digits")
    push_to_hub(fitted(model, shift=-0.2), "me/digits", branch="cold")
    main, cold = from_pretrained("me/digits", model), from_pretrained("me/digits", model, revision="cold")
    assert not torch.equal(main.posterior.mean_vector(), cold.posterior.mean_vector())
    with pytest.raises(InputError, match="no such revision"):
        from_pretrained("me/digits", model, revision="warm")


def test_arguments_reach_the_hub(hub: Hub, tmp_path: Path) -> None:
    model = mlp().eval()
    address = push_to_hub(fitted(model), "digits", private=True, commit_message="first", create_pr=True)
    assert address == "https://huggingface.co/me/digits/discussions/1"
    assert hub.asked[0]["private"] is True
    assert (hub.asked[1]["commit_message"], hub.asked[1]["create_pr"]) == ("first", True)
    from_pretrained("me/digits", model, token="hf_x", cache_dir=tmp_path, local_files_only=True)  # noqa: S106 - none
    asked = hub.asked[-1]
    assert (asked["token"], asked["cache_dir"], asked["local_files_only"]) == ("hf_x", tmp_path, True)


def test_the_card_has_what_the_hub_reads(hub: Hub) -> None:
    push_to_hub(
        fitted(mlp().eval()),
        "me/digits",
        metrics={"accuracy": 0.93, "nll": 0.25},
        task="image-classification",
        dataset="digits",
        base_model="me/net",
        license="apache-2.0",
        tags=["medical", "bayesian"],
    )
    card = huggingface_hub.ModelCard.load(hub.folder("me/digits", None) / "README.md")
    data = card.data
    assert (data.library_name, data.base_model, data.license) == ("stfbnn", "me/net", "apache-2.0")
    assert data.tags == ["bayesian", "uncertainty", "medical"]
    found = {result.metric_type: (result.metric_value, result.dataset_name) for result in data.eval_results}
    assert found == {"accuracy": (0.93, "digits"), "nll": (0.25, "digits")}
    assert "stfbnn.from_pretrained('me/digits', model)" in card.text
    assert "| accuracy | 0.93 |" in card.text


def test_the_card_of_a_folder_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    save(fitted(mlp().eval()), tmp_path / "a", metrics={"accuracy": 0.93})
    card = huggingface_hub.ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.to_dict() == {"library_name": "stfbnn", "tags": ["bayesian", "uncertainty"]}


def test_a_local_folder_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp().eval()
    bnn = fitted(model)
    folder = save(bnn, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in (folder, str(folder)):
        assert torch.equal(predict(from_pretrained(name, model), X).probs, predict(bnn, X).probs)
    with pytest.raises(InputError, match=r'pip install "stfbnn\[hub\]"'):
        from_pretrained("me/digits", model)
    with pytest.raises(InputError, match=r'pip install "stfbnn\[hub\]"'):
        push_to_hub(bnn, "me/digits")


def test_the_real_cache_is_read_without_a_network(tmp_path: Path) -> None:
    model = mlp().eval()
    bnn = fitted(model)
    root = tmp_path / "models--me--digits"
    blobs = save(bnn, root / "blobs")
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT, encoding="ascii")
    for name in FILES:
        (snapshot / name).symlink_to(blobs / name)
    again = from_pretrained("me/digits", model, cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(predict(again, X).probs, predict(bnn, X).probs)
    with pytest.raises(ArtifactError, match="not in the cache"):
        from_pretrained("me/other", model, cache_dir=tmp_path, local_files_only=True)


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's address is one where nobody listens, on this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_server")
def test_a_hub_that_is_not_reached_is_said(tmp_path: Path) -> None:
    model = mlp().eval()
    with pytest.raises(ArtifactError, match=r"hub (was not|is) reached"):
        from_pretrained("me/digits", model, cache_dir=tmp_path)
    with pytest.raises(ArtifactError, match="cannot be pushed to 'me/digits'"):
        push_to_hub(fitted(model), "me/digits", token="hf_x")  # noqa: S106 - none


@pytest.mark.parametrize(
    ("kind", "status", "expected", "message"),
    [
        ("RepositoryNotFoundError", 404, InputError, "neither a folder"),
        ("GatedRepoError", 403, InputError, "gated"),
        ("HfHubHTTPError", 500, ArtifactError, "500 answered"),
        ("HfHubHTTPError", 401, ArtifactError, "hf auth login"),
    ],
)
def test_answers_of_the_hub_are_put_into_words(
    kind: str, status: int, expected: type[Exception], message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise http_error(kind, status)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    model = mlp().eval()
    with pytest.raises(expected, match=message):
        from_pretrained("me/digits", model)
    with pytest.raises(expected, match=message):
        push_to_hub(fitted(model), "me/digits")


def test_a_repository_without_a_posterior_is_named_and_never_overwritten(hub: Hub) -> None:
    model = mlp().eval()
    folder = hub.folder("me/net", None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"'me/net' holds no saved posterior: it has no posterior\.safetensors"):
        from_pretrained("me/net", model)
    with pytest.raises(InputError, match="of something else"):
        push_to_hub(fitted(model), "me/net")
    assert (folder / "config.json").read_text(encoding="utf-8") == "{}"
    push_to_hub(fitted(model), "me/posterior")
    push_to_hub(fitted(model), "me/posterior")


def test_a_posterior_of_another_model_is_refused(hub: Hub) -> None:
    push_to_hub(fitted(mlp().eval()), "me/digits")
    with pytest.raises(ArtifactError, match="other trunk weights"):
        from_pretrained("me/digits", mlp(seed=1).eval())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "a/b/c"}, "neither a folder here nor the name of a repository"),
        ({"repo_id": 3}, "nor the name of a repository"),
        ({"metrics": {"nll": float("nan")}}, "must be finite"),
        ({"task": "image-classification"}, "give both"),
        ({"task": "image-classification", "dataset": "digits"}, "give both"),
        ({"tags": "medical"}, "tags must be"),
        ({"license": ""}, "license must be"),
        ({"base_model": 3}, "base_model must be"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(arguments: dict[str, Any], message: str, hub: Hub) -> None:
    bnn = fitted(mlp().eval())
    with pytest.raises(InputError, match=message):
        push_to_hub(bnn, **{"repo_id": "me/digits", **arguments})
    assert not hub.asked


def test_what_is_no_posterior_or_no_model_is_refused(hub: Hub, tmp_path: Path) -> None:
    model = mlp().eval()
    with pytest.raises(NotFittedError):
        push_to_hub(bayesianize(model, X[:2]), "me/digits")
    with pytest.raises(InputError, match="given a Sequential"):
        push_to_hub(model, "me/digits")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be a torch"):
        from_pretrained("me/digits", "model")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no revisions"):
        from_pretrained(save(fitted(model), tmp_path / "a"), model, revision="main")
    with pytest.raises(InputError, match="neither a folder here"):
        from_pretrained("./no/such/folder", model)
    assert not hub.asked
