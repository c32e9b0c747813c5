"""Posteriors on the Hugging Face hub: a repository holds the same three files as a folder of `stfbnn.save`.

Arguments are named as in huggingface_hub's ``ModelHubMixin``. The mixin itself does not fit: it builds an object from the
files alone, and a posterior is loaded onto a model that its user has.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from stfbnn.artifact import load, save
from stfbnn.artifact_files import CARD, CONFIG, TENSORS
from stfbnn.batches import OutputFunction
from stfbnn.errors import ArtifactError, InputError
from stfbnn.files import write_text
from stfbnn.model_card import check_metrics, model_card
from stfbnn.network import BayesianNetwork


def push_to_hub(
    bnn: BayesianNetwork,
    repo_id: str,
    *,
    commit_message: str = "Upload a posterior with stfbnn",
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    metrics: Mapping[str, float] | None = None,
    task: str | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    license: str | None = None,  # noqa: A002 - the hub's own word
    tags: Sequence[str] = (),
) -> str:
    """Save a fitted posterior to a repository on the hub, which is made where it does not exist.

    What goes there are the three files of `stfbnn.save`, in one commit, and nothing of the model. Give the posterior a
    repository of its own: one that holds another ``config.json``, such as the model's, is refused.

    Args:
        bnn: The network, after `fit`.
        repo_id: ``"user/name"``.
        commit_message: Of the commit.
        private: Whether a new repository is private; None for the account's default.
        token: As for all of huggingface_hub: None for the one of ``hf auth login``.
        branch: To push to, made where it does not exist; None for the main one.
        create_pr: Open a pull request with the commit instead of pushing it.
        metrics: Figures for the model card, by name, such as ``{"accuracy": 0.93}``.
        task: What the figures are for, in the hub's words, such as ``"image-classification"``. With ``dataset`` it makes the
            figures readable to programs, as the card's evaluation results.
        dataset: What the figures were measured on.
        base_model: The model's own repository on the hub.
        license: Of the posterior, in the hub's words, such as ``"apache-2.0"``.
        tags: For the card, beside those that all posteriors get.

    Returns:
        The address of the commit.

    Raises:
        NotFittedError: `fit` has not run.
        ModelChangedError: The user's model was changed since `bayesianize`.
        InputError: An argument is wrong, the posterior cannot be saved (see `stfbnn.save`), the repository holds something
            else, it does not exist and cannot be made, or huggingface_hub is not installed.
        ArtifactError: The hub cannot be reached, or answers with an error.
    """
    hub = _hub()
    if not isinstance(bnn, BayesianNetwork):
        raise InputError(f"push_to_hub takes what stfbnn.bayesianize returned, but it was given a {type(bnn).__name__}")
    bnn.require_fitted()
    _check_name(hub, repo_id)
    figures = check_metrics(metrics or {})
    if (task is None) != (dataset is None) or (task is not None and not figures):
        raise InputError(
            "task and dataset say what the metrics were measured on: give both of them, with metrics, or none"
        )
    with tempfile.TemporaryDirectory(prefix="stfbnn-") as temporary:
        # Everything that can be wrong here comes before a repository is made there.
        folder = save(bnn, Path(temporary) / "posterior")
        card = hub.ModelCard(model_card(bnn, repo_id, figures, function="from_pretrained"))
        card.data.tags = list(dict.fromkeys([*card.data.tags, *_texts("tags", tags)]))
        for key, value in (("base_model", base_model), ("license", license)):
            if value is not None:
                setattr(card.data, key, *_texts(key, [value]))
        if task is not None:
            card.data.model_name = repo_id.rpartition("/")[2]
            card.data.eval_results = [
                hub.EvalResult(
                    task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=name, metric_value=value
                )
                for name, value in figures.items()
            ]
        write_text(folder / CARD, str(card))
        api = hub.HfApi(token=token, library_name="stfbnn")
        with _told(hub, repo_id, "pushed to"):
            full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            # A pull request's own branch, refs/pr/1, is there already.
            if branch is not None and not create_pr and not branch.startswith("refs/"):
                api.create_branch(full_id, branch=branch, exist_ok=True)
            _require_own(api.list_repo_files(full_id, revision=branch), full_id)
            commit = api.upload_folder(
                repo_id=full_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                allow_patterns=[CONFIG, TENSORS, CARD],
            )
    return str(commit.pr_url if create_pr else commit.commit_url)


def from_pretrained(
    pretrained_model_name_or_path: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Any = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    map_location: str | torch.device | None = None,
    output: OutputFunction | None = None,
) -> BayesianNetwork:
    """Load a posterior from the hub, or from a folder, onto the model that it was inferred for.

    Of the repository two files are fetched, ``config.json`` and ``posterior.safetensors``, and kept in huggingface_hub's cache.
    Nothing in them is executed.

    Args:
        pretrained_model_name_or_path: A folder, if there is one of that name; else ``"user/name"`` on the hub.
        model: The trained network, with the very weights and buffers that it had; it is left as it was.
        example_inputs: As for `stfbnn.load`; so are ``map_location`` and ``output``.
        revision: A branch, a tag or the hash of a commit, which never changes.
        token: As for all of huggingface_hub: None for the one of ``hf auth login``.
        cache_dir: Where to keep the files; None for huggingface_hub's own place.
        force_download: Fetch them again.
        local_files_only: Take them from the cache, without asking the hub.
        map_location: The device of the result; None for the model's.
        output: How to take the predictions out of what the model returns.

    Returns:
        The fitted network.

    Raises:
        ArtifactError: The repository or folder holds no whole posterior, or one that was inferred for another model; or the
            hub cannot be reached and the files are not in the cache.
        InputError: An argument is wrong, there is no such repository or revision, or huggingface_hub is not installed.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, but it is a {type(model).__name__}")
    folder = Path(pretrained_model_name_or_path)
    if not folder.is_dir():
        hub, repo_id = _hub(), os.fspath(pretrained_model_name_or_path)
        _check_name(hub, repo_id)
        with _told(hub, repo_id, "fetched from"):
            folder = Path(
                hub.snapshot_download(
                    repo_id,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    allow_patterns=[CONFIG, TENSORS],
                    library_name="stfbnn",
                )
            )
        missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
        if missing:
            raise ArtifactError(
                f"the repository {repo_id!r} holds no saved posterior: it has no {' and no '.join(missing)}; a posterior is "
                f"put there by stfbnn.push_to_hub"
            )
    elif revision is not None:
        raise InputError(f"{folder} is a folder here, which has no revisions; leave revision out")
    return load(folder, model, example_inputs, map_location=map_location, output=output)


def _hub() -> ModuleType:
    try:
        import huggingface_hub  # noqa: PLC0415 - optional
        import huggingface_hub.errors  # noqa: PLC0415
        import huggingface_hub.utils  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            'the hub needs the package huggingface_hub, which is not installed: pip install "stfbnn[hub]"'
        ) from error
    return huggingface_hub


def _check_name(hub: ModuleType, repo_id: str) -> None:
    try:
        hub.utils.validate_repo_id(repo_id)
    except ValueError as error:
        raise InputError(
            f"{str(repo_id)!r} is neither a folder here nor the name of a repository, such as 'user/name' ({error})"
        ) from error


def _texts(name: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, str) or not all(isinstance(value, str) and value for value in values):
        raise InputError(f"{name} must be text that is not empty (tags: a list of texts), but it is {values!r}")
    return list(values)


def _require_own(names: Sequence[str], repo_id: str) -> None:
    if CONFIG in names and TENSORS not in names:
        raise InputError(
            f"the repository {repo_id!r} holds the {CONFIG} of something else, which the posterior's would replace; choose a "
            f"repository of its own, and name the model's with base_model="
        )


@contextmanager
def _told(hub: ModuleType, repo_id: str, what: str) -> Iterator[None]:
    """Say what an error of the hub means for its user."""
    errors = hub.errors
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise InputError(f"the repository {repo_id!r} has no such revision or branch: {_short(error)}") from error
    except errors.GatedRepoError as error:
        raise InputError(
            f"the repository {repo_id!r} is gated: ask for access on its page, and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is neither a folder {repo_id!r} here nor a repository of that name on the hub that you may see; check the "
            f"name, and for a private one log in with `hf auth login` or pass token="
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ArtifactError(
            f"the posterior {repo_id!r} is not in the cache and the hub was not reached: connect and call again "
            f"(without local_files_only), or pass a folder"
        ) from error
    # The HTTP library's own errors are not all OSErrors; which library it is depends on huggingface_hub's version.
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:
        raise ArtifactError(
            f"the posterior cannot be {what} {repo_id!r}: {_short(error)}; is the hub reached, and are you logged in "
            f"(`hf auth login`) with the right to do this?"
        ) from error


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
