"""Fetch models from the Hugging Face hub and put them there, as safetensors and JSON.

Only files on a list are moved in either direction: never a pickle, an optimiser's state or a log.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from foveate.backbones import check_folder
from foveate.convert.card import CARD, HUB, card_text, is_generated, with_facts
from foveate.convert.dense import DENSE, DENSE_WEIGHTS
from foveate.convert.folders import CONFIG, WEIGHTS, config_path, note_results, save
from foveate.convert.parts import read_tensors, run_model, version
from foveate.convert.record import RECORD
from foveate.convert.timm_folder import check_timm_folder, is_timm_folder
from foveate.core import ReducedViT
from foveate.dense import DenseModel
from foveate.files import read_json

__all__ = ["PREFIX", "download", "is_hub_name", "push_to_hub", "shared_files", "split_name"]

_log = logging.getLogger(__name__)
PREFIX = "hf-hub:"  # in front of OWNER/NAME or OWNER/NAME@REVISION, as timm has it
_FOREIGN = "config.json"  # of timm and transformers
_WEIGHTS = {
    CONFIG: (WEIGHTS,),
    DENSE: (DENSE_WEIGHTS,),
    _FOREIGN: ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
}
_SMALL = (*_WEIGHTS, "preprocessor_config.json", RECORD, CARD)
_OURS = (CONFIG, WEIGHTS, DENSE, DENSE_WEIGHTS, RECORD, CARD)
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Tell the name of a model on the hub from a path."""
    return str(name).startswith(PREFIX)


def split_name(name: str) -> tuple[str, str | None]:
    """Return repository and revision of OWNER/NAME@REVISION, with the prefix or without it."""
    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    if not _REPOSITORY.fullmatch(repository) or (at and not revision):
        raise ValueError(
            f"a model on the hub is called OWNER/NAME or OWNER/NAME@REVISION, got {name!r}"
        )
    return repository, revision or None


# From the hub ------------------------------------------------------------------------------------


def download(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetch a model into the hub's cache and return its folder there.

    The kind of model is found out before its weights are fetched.

    Args:
        name: OWNER/NAME; ``hf-hub:`` in front and @REVISION behind are optional.
        revision: branch, tag or commit; None is the main branch.
        token: access token of the hub; None takes that of the user who is logged in.
        cache_dir: folder to keep files in, instead of the hub's own cache.
        local_files_only: take only what is in the cache already.
    """
    repository, said = split_name(name)
    if said and revision and said != revision:
        raise ValueError(f"{name} names the revision {said}, but revision={revision!r} was given")

    def fetch(patterns: Sequence[str], at: str | None) -> Path:
        with _explained(repository, at):
            found = snapshot_download(
                repository,
                revision=at,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
                library_name="foveate",
                library_version=version(),
            )
        return Path(found)

    folder = fetch(_SMALL, said or revision)
    kind = next((one for one in (DENSE, CONFIG, _FOREIGN) if (folder / one).is_file()), None)
    if kind is None:
        raise ValueError(
            f"{repository} on the hub is not a model of foveate, timm or transformers: it has none "
            f"of {CONFIG}, {DENSE} and {_FOREIGN}"
        )
    if kind == _FOREIGN:
        try:
            (check_timm_folder if is_timm_folder(folder) else check_folder)(folder)
        except ValueError as error:
            raise ValueError(f"{repository} on the hub cannot be used: {error}") from error
    # A snapshot's folder has the name of its commit, so both fetches take the same commit.
    return fetch((*_SMALL, *_WEIGHTS[kind]), folder.name)


@contextmanager
def _explained(repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the hub into one sentence."""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} is gated: ask for access on its page of the hub, then log in with "
            "`hf auth login` or give a token"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no repository {repository} that you may see: check the name, and for a "
            "private one log in with `hf auth login` or give a token"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repository} on the hub has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{repository} is not, or not wholly, in the cache, and the hub cannot be reached (no "
            "network, or only local files are allowed)"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"the hub does not let you do that with {repository}: log in with `hf auth login` "
                "or give a token that may write there"
            ) from error
        raise ValueError(f"the hub refused {repository}: {_first_line(error)}") from error
    except ValueError as error:  # the hub's library refused the arguments
        raise ValueError(f"{repository} on the hub: {_first_line(error)}") from error
    except Exception as error:  # network errors, whose types changed from release to release
        raise ValueError(f"the hub cannot be reached: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# To the hub --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Upload:
    """Settings of an upload; ``push_to_hub`` describes the fields."""

    message: str
    revision: str | None
    create_pr: bool
    private: bool | None
    token: str | bool | None


def push_to_hub(
    model: ReducedViT | DenseModel | str | os.PathLike[str],
    repo_id: str,
    *,
    license: str | None = None,
    results: str | os.PathLike[str] | None = None,
    commit_message: str = "Add a model of foveate",
    revision: str | None = None,
    create_pr: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Put a model on the Hugging Face hub, and return the address of the commit.

    The repository is made if it is missing. Only weights, configuration, the record of a run and
    the card are uploaded; such files of an earlier push are replaced or deleted. A card that
    somebody wrote or changed on the hub is kept, unless the folder's own was changed by hand.

    Args:
        model: a model from ``apply``, a detector or a segmenter, which is saved whole; or the
            folder of one, or of a run that ended with one.
        repo_id: OWNER/NAME.
        license: name of the model's licence, as the hub writes it: "apache-2.0".
        results: folder that ``foveate eval --out`` wrote; what it measured of this model goes on
            the card and into the record.
        commit_message: message of the commit.
        revision: branch, which is made if it is missing; None is the main branch.
        create_pr: open a pull request instead of committing.
        private: make a new repository private; None is the owner's default.
        token: access token of the hub; None takes that of the user who is logged in.
    """
    upload = _Upload(commit_message, revision, create_pr, private, token)
    repository, at = split_name(repo_id)
    if at is not None:
        raise ValueError(f"give the branch as revision={at!r}, not in {repo_id!r}")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"a pull request goes to main; leave revision={revision!r} out")
    if isinstance(model, nn.Module):
        if not isinstance(model, (ReducedViT, DenseModel)):
            raise ValueError(
                f"a {type(model).__name__} has no method: timm.models.push_to_hf_hub puts a plain "
                "model on the hub"
            )
        with TemporaryDirectory() as made:
            save(model, made, everything=True)
            return _push(Path(made), repository, license, results, upload)
    return _push(Path(model), repository, license, results, upload)


def shared_files(folder: Path) -> list[Path]:
    """Return the files of a saved folder, or of a run, that a push uploads.

    ValueError if the folder holds no model that ``foveate.save`` wrote.
    """
    folder = run_model(folder)
    if folder.is_file():
        raise ValueError(
            f"{folder} is a plain model, which timm loads without foveate: put it on the hub with "
            "timm.models.push_to_hf_hub"
        )
    if not config_path(folder).is_file():
        raise ValueError(
            f"{folder} is not a folder that foveate.save wrote: it has neither {CONFIG} nor {DENSE}"
        )
    return [folder / name for name in _OURS if (folder / name).is_file()]


def _push(
    folder: Path,
    repository: str,
    license: str | None,
    results: str | os.PathLike[str] | None,
    upload: _Upload,
) -> str:
    """Check a folder, and put its files on the hub."""
    shared_files(folder)
    folder = run_model(folder)
    for weights in _WEIGHTS[config_path(folder).name]:
        read_tensors(folder / weights)  # so that no damaged file is uploaded
    if results is not None:
        note_results(folder, Path(results))
    files: dict[str, Path | bytes] = {path.name: path for path in shared_files(folder)}
    text, generated = _card(folder, repository, license)
    files[CARD] = text.encode()
    api = HfApi(token=upload.token, library_name="foveate", library_version=version())
    with _explained(repository, upload.revision):
        api.create_repo(repository, private=upload.private, exist_ok=True)
        if upload.revision is not None and not upload.create_pr:
            api.create_branch(repository, branch=upload.revision, exist_ok=True)
        there = api.list_repo_files(repository, revision=upload.revision)
        if generated and CARD in there:
            theirs = api.hf_hub_download(repository, CARD, revision=upload.revision)
            if not is_generated(Path(theirs).read_text(encoding="utf-8")):
                _log.warning(
                    "the card of %s was written or changed on the hub and is kept: check that it "
                    "is still right, or delete it there and push again",
                    repository,
                )
                del files[CARD]
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items()]
        stale = [name for name in _OURS if name in there and name not in files and name != CARD]
        operations += [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(
            repository,
            operations,
            commit_message=upload.message,
            revision=upload.revision,
            create_pr=upload.create_pr,
        )
    return str(done.pr_url or done.commit_url)


def _card(folder: Path, repository: str, license: str | None) -> tuple[str, bool]:
    """Return a folder's card as it goes to the hub, and whether foveate wrote it."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    if text is not None and not is_generated(text):
        if license is not None:
            raise ValueError(f"{path} was changed by hand, so write its license there")
        return text.replace(HUB, PREFIX + repository), False
    config = with_facts(folder, read_json(config_path(folder), f"{folder} holds no model"))
    if license is not None:
        config["about"]["license"] = license
    return card_text(folder, config, repository), True
