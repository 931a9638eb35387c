"""Models named on the Hugging Face Hub: their files brought to the local cache, and outputs sent there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from swquant.errors import SwquantError

_IGNORED = ("*/*", "consolidated*")
"""Subfolders hold other formats; ``consolidated`` files repeat the weights in a layout of their own."""


_SHA256 = re.compile("[0-9a-f]{64}")
"""A blob's name where the hub stores large files (LFS, Xet); others have git's, SHA-1 of more than the content."""


def hub_digest(path: Path) -> str | None:
    """SHA-256 of a file of the local cache, of which the hub's client says it by the name of the blob; else ``None``.

    The cache has ``blobs/<name>`` beside ``snapshots/<commit>/<file>``, and the latter is a link to the former.
    """
    blob = path.resolve()
    snapshots = blob.parent.with_name("snapshots")
    is_ours = path.is_symlink() and blob.parent.name == "blobs" and snapshots in path.parent.resolve().parents
    return blob.name if is_ours and _SHA256.fullmatch(blob.name) else None


def split_revision(name: str, revision: str | None) -> tuple[str, str | None]:
    """``owner/name`` and the revision out of ``owner/name@revision``, or the one that is given.

    Raises:
        SwquantError: Both are given and differ, or nothing follows the ``@``.
    """
    bare, at, named = name.partition("@")
    if not at:
        return name, revision
    if not named:
        raise SwquantError(f"{name!r} ends in '@'; give a branch, a tag or a commit after it")
    if revision not in (None, named):
        raise SwquantError(f"{name!r} names the revision {named!r} and --revision says {revision!r}; give one of them")
    return bare, named


def require_subfolder(folder: str) -> None:
    """Refuse what is not a folder inside a model, or a shell pattern.

    Raises:
        SwquantError: Naming it.
    """
    parts = folder.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(mark in folder for mark in "\\:*?[]\0"):
        raise SwquantError(f"--subfolder is {folder!r}, expected a folder inside the model, such as 'original'")


def download(
    name: str,
    patterns: Sequence[str],
    deeper: Sequence[str] = (),
    revision: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Bring a model's files to the local cache, or find them there.

    Args:
        name: A model on the Hub, e.g. ``meta-llama/Llama-3.2-1B``.
        patterns: The files wanted, as shell patterns.
        deeper: Those wanted in folders inside.
        revision: A branch, a tag or a commit; the main branch if ``None``.
        subfolder: The folder of the repository that the model lies in.

    Returns:
        The directory that holds them.

    Raises:
        SwquantError: The name is no model that can be had: misspelt, gated, or the Hub cannot be reached.
    """
    inside = f"{subfolder}/" if subfolder else ""
    wanted, ignored = ([inside + pattern for pattern in some] for some in (patterns, _IGNORED))
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=ignored))
        if deeper:  # of the same commit, whose name the folder has
            snapshot_download(name, revision=found.name, allow_patterns=[inside + pattern for pattern in deeper])
    except HFValidationError as error:
        raise SwquantError(
            f"the model {name!r} is neither a directory nor a valid hub name; give a path or 'owner/name'"
        ) from error
    except GatedRepoError as error:
        raise SwquantError(
            f"the hub model {name!r} is gated; accept its terms at https://huggingface.co/{name} "
            "and sign in with 'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise SwquantError(
            f"the hub model {name!r} has no revision {revision!r}; give a branch, a tag or a commit of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise SwquantError(
            f"the model {name!r} is neither a directory nor a model on the hub; "
            "check the spelling, or sign in with 'hf auth login' if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise SwquantError(
            f"the model {name!r} is not a directory, is not wholly in the local hub cache, and the hub cannot be "
            "reached; give a path, or connect and try again"
        ) from error
    except Exception as error:  # the client lets through whatever its network and file layers raise
        raise SwquantError(
            f"the hub model {name!r} cannot be downloaded ({type(error).__name__}: {_first_line(error)}); "
            "try again, or give the path of a local copy"
        ) from error
    if subfolder is not None and not (found / subfolder).is_dir():
        raise SwquantError(f"the hub model {name!r} has no folder {subfolder!r}; check --subfolder")
    return found / (subfolder or "")


def require_push(name: str) -> None:
    """Refuse before the work starts what could not be sent after it.

    Args:
        name: ``owner/name`` of a repository, which need not exist yet.

    Raises:
        SwquantError: It is no such name, nobody is signed in, or the Hub cannot be reached.
    """
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError
    except HFValidationError as error:
        raise SwquantError(f"--push-to-hub is {name!r}, expected 'owner/name'") from error
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise SwquantError(f"nobody is signed in, so {name} cannot be pushed; sign in with 'hf auth login'") from error
    except Exception as error:  # the client lets through whatever its network layer raises
        raise SwquantError(
            f"{name} cannot be pushed ({type(error).__name__}: {_first_line(error)}); connect, sign in with "
            "'hf auth login', or leave --push-to-hub out"
        ) from error


def push(directory: Path, name: str, *, private: bool) -> str:
    """Send a finished output to the Hub, as one commit.

    Args:
        directory: The output.
        name: ``owner/name``; made if there is none.
        private: Whether a repository that is made here is private.

    Returns:
        Where it is.

    Raises:
        SwquantError: It was not sent; what is on the disk stays.
    """
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Upload by swquant")
    except Exception as error:  # the client lets through whatever its network and file layers raise
        raise SwquantError(
            f"{directory} was not pushed to {name} ({type(error).__name__}: {_first_line(error)}); it is whole on the "
            f"disk: 'hf upload {name} {directory}' sends it"
        ) from error
    return f"https://huggingface.co/{name}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no details")
