"""Files of a folder, or of a repository on the Hugging Face Hub at one commit; and folders sent there as one commit."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mmtoken.errors import CheckpointError

DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Arguments that say where files come from, as `huggingface_hub` and transformers call them."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
"""Endings of files that can run code when they are loaded, or are of a kind that can."""


def pinned(source: str, probe: str, options: dict[str, Any], field: str) -> dict[str, Any]:
    """`options` with the commit that their `revision` stands for now, so that no two files are of different commits.

    Args:
        source: a repository ("org/name").
        probe: a file in its root, which is fetched.
        options: those of `DOWNLOAD` count.
        field: what messages call the source.

    Raises:
        CheckpointError: it cannot be fetched, or has no such file.
    """
    if not options.get("local_files_only") and not _hub_answers():
        options = {**options, "local_files_only": True}
    file = fetch(source, probe, options, field)
    if file is None:
        raise CheckpointError(f"{field}={source!r} cannot be loaded: it has no {probe}.")
    return {**options, "revision": file.parent.name}  # the cache's layout: snapshots/<commit>/<file>


def fetch(source: str, name: str, options: dict[str, Any], field: str) -> Path | None:
    """A file of a folder or of a repository; None if there is none of this name.

    Raises:
        CheckpointError: the repository cannot be reached, does not exist or lets nobody in.
    """
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    fetching = {key: options[key] for key in DOWNLOAD if key in options}
    try:
        return Path(hf_hub_download(source, name, **fetching))
    except LocalEntryNotFoundError as error:
        known = try_to_load_from_cache(source, name, fetching.get("cache_dir"), fetching.get("revision"))
        if known is not None and not isinstance(known, str):  # the hub said earlier that there is none
            return None
        raise _unreadable(source, error, options, field) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # errors of connections have no base that all versions of the client share
        raise _unreadable(source, error, options, field) from error


def file_names(source: str, options: dict[str, Any]) -> list[str]:
    """Names of the files in a folder, or in a repository (none if it cannot be asked)."""
    if Path(source).is_dir():
        return sorted(path.name for path in Path(source).iterdir())
    if options.get("local_files_only"):
        return []
    try:
        return sorted(HfApi(token=options.get("token")).list_repo_files(source, revision=options.get("revision")))
    except Exception:  # it only makes a message better
        return []


def upload(
    folder: Path,
    name: str,
    *,
    revision: str | None,
    token: str | bool | None,
    private: bool | None,
    message: str,
    replace: list[str],
) -> str:
    """Send a folder to a repository, which is made if there is none: all files in one commit. Returns that commit.

    Args:
        folder: what to send.
        name: "org/name".
        revision: an existing branch; None: the main one.
        token: of the account; None: the one that is logged in.
        private: for a new repository; None: as its owner has set.
        message: of the commit.
        replace: patterns of files that leave the repository in the same commit unless the folder has them.

    Raises:
        CheckpointError: the hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message=message, delete_patterns=replace
        )
    except Exception as error:  # as in `fetch`
        raise CheckpointError(
            f"folder={str(folder)!r} was not pushed to {name!r} ({reason(error)}); the repository's files are as they "
            "were: check its name, the token's rights and the connection, and push again."
        ) from error
    return str(commit.oid)


def reason(error: BaseException) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:240]} ..."


def _unreadable(source: str, error: Exception, options: dict[str, Any], field: str) -> CheckpointError:
    says = f"{field}={source!r} cannot be loaded"
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{says}: it is gated; ask for access on its page, and log in or give token=.")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{says}: the hub has no such repository, or it is private; check the name, or log in or give token=."
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{says}: it has no revision={options.get('revision')!r}; give a branch, tag or commit.")
    if isinstance(error, LocalEntryNotFoundError):
        return CheckpointError(
            f"{says}: the hub is not asked or does not answer, and not all of its files are in the cache; connect, or "
            f"give a folder ({reason(error)})."
        )
    return CheckpointError(f"{says} ({reason(error)}); check the name and the connection, and try again.")


def _hub_answers() -> bool:
    """Whether the hub's name can be looked up. Without a network, retries would take a minute and fill the screen."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def is_repository(name: str) -> bool:
    """Whether a name has the form "org/name" of a repository; it need not exist."""
    return name.count("/") == 1 and not name.startswith((".", os.sep, "~"))
