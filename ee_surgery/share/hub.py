"""An adapter folder <-> a repository on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ee_surgery.errors import AdapterError, HubError, SurgeryWarning
from ee_surgery.files import JSON_LIMIT, read_bytes
from ee_surgery.share.adapter import (
    BASE,
    CARD,
    CONFIG,
    FRONTIER,
    PLOT,
    PROCESSOR,
    RESULTS,
    WEIGHTS,
    of_others,
    own_files,
)
from ee_surgery.share.card import MARKER

FILES = [CONFIG, WEIGHTS, FRONTIER, BASE, PROCESSOR]
"""What loading reads, and all that it downloads: cards, plots and whatever else is there stay on the Hub."""
_LARGEST = {CONFIG: JSON_LIMIT, FRONTIER: JSON_LIMIT, PROCESSOR: 1 << 20}
"""Bytes of those that are read as a whole. Tensors are as large as branches and bases are."""


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload early exits",
    create_pr: bool = False,
) -> str:
    """Upload an adapter folder in one commit, the repository and branch made where they are not there yet.

    Only the adapter's own files go, whatever else lies in the folder.

    Args:
        private: of a repository that is made; the account's default when left out.
        token: None takes the one that was stored by `hf auth login` or `HF_TOKEN`.
        revision: branch; the main one by default.
    Returns:
        Where to look at the commit, or at the pull request.
    Raises:
        AdapterError: the folder is no adapter, its files do not belong together, or the repository holds another model.
        HubError: no such user, no right to write, no connection. The branch holds what it held before; or all of the
            new adapter, where only the Hub's answer was lost, and pushing again then changes nothing.
    """
    api = HfApi(token=token)
    files = own_files(folder)
    with _hub_errors(f"push to {repo_id}", revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        new = revision is not None and not create_pr and not api.revision_exists(repo_id, revision)
        _refuse_others(api, repo_id, None if new else revision)  # a new branch begins as the main one
        if new:
            api.create_branch(repo_id, branch=revision or "main", exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        add = [CommitOperationAdd(name, path) for name, path in files.items()]
        if CARD in there and MARKER not in _text(api.hf_hub_download(repo_id, CARD, revision=revision)):
            warnings.warn(
                f"{repo_id} has a card of its own: it is kept. Delete it there to get one.",
                SurgeryWarning,
                stacklevel=3,
            )
            add = [operation for operation in add if operation.path_in_repo != CARD]
        # of an earlier version of this adapter, what the new one no longer has
        stale = [name for name in (FRONTIER, BASE, PLOT, RESULTS) if name in there and name not in files]
        # Not `upload_folder`, which may commit in parts, and again where the answer to a commit is lost.
        commit = api.create_commit(
            repo_id,
            [*map(CommitOperationDelete, stale), *add],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or str(commit)


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The adapter folder of a repository in the cache, downloaded where it is not there yet.

    Args:
        revision: branch, tag or commit; the main branch by default.
        local_files_only: take what is in the cache, as `HF_HUB_OFFLINE=1` does.
    Raises:
        HubError: no such repository or revision, no right to read it, no connection and nothing in the cache, no
            room to store it, or no adapter in it.
    """
    _check_sizes(repo_id, revision, token, local_files_only)
    with _hub_errors(f"load {repo_id} (not a folder here)", revision):
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=FILES,
            )
        )
    if not (folder / CONFIG).exists():
        raise HubError(f"Cannot load {repo_id}: it holds no {CONFIG}, so there are no early exits in it.")
    return folder


def _check_sizes(repo_id: str, revision: str | None, token: str | bool | None, local_files_only: bool) -> None:
    """Refuse files that are too large to be what their names say, before they fill the disk.

    Raises:
        HubError: one is.
    """
    if local_files_only or constants.HF_HUB_OFFLINE:
        return
    try:
        found = HfApi(token=token).get_paths_info(repo_id, list(_LARGEST), revision=revision)
    except Exception:  # the download says what is wrong, or takes what is in the cache
        return
    for file in found:
        size, largest = getattr(file, "size", 0), _LARGEST.get(file.path, 0)
        if size > largest:
            raise HubError(
                f"Cannot load {repo_id}: its {file.path} has {size:,} bytes, and {largest:,} are the most that an "
                "adapter's has. Nothing was downloaded."
            )


def _refuse_others(api: HfApi, repo_id: str, revision: str | None) -> None:
    names = api.list_repo_files(repo_id, revision=revision)
    config = None
    if CONFIG in names:
        config = read_bytes(api.hf_hub_download(repo_id, CONFIG, revision=revision), JSON_LIMIT)
    if (found := of_others(names, config)) is not None:
        raise AdapterError(
            f"{repo_id} holds {found}, which is not of an ee_surgery adapter: pushed beside it, the adapter would make "
            "that model unreadable. Nothing was uploaded: push to a repository of its own."
        )


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _hub_errors(what: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        # All of them: the client lets through what httpx, xet and the file system raise, and wraps it in whatever.
        at = "" if revision is None else f" at revision {revision!r}"
        raise HubError(f"Cannot {what}{at}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What is behind an error of the client, and what to do."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    for kind, reason in _REASONS.items():
        if any(isinstance(found, kind) for found in chain):
            return reason.format(error=error)
    for found in chain:
        if isinstance(found, HfHubHTTPError):
            status = getattr(found.response, "status_code", None)
            return f"the Hub answered {found} {_ADVICE.get(status or 0, 'Try again later.')}"
    for found in chain:
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"there is no room for it on this disk ({found}). Make room and try again; no part of it is kept."
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return f"it is not in the cache, or not all of it, and the Hub could not be asked. {error}"
    told = " <- ".join(f"{type(found).__name__}: {found}" for found in chain)
    return f"{told}. Check the connection and try again; nothing was half done."


# The first that fits holds: a gated repository is a kind of missing one.
_REASONS: dict[type[BaseException], str] = {
    HFValidationError: "it is no repository id such as user/name. {error}",
    GatedRepoError: "access is gated. Ask for it on the repository's page, then log in with `hf auth login`.",
    RevisionNotFoundError: "the repository has no such revision.",
    RepositoryNotFoundError: (
        "there is no such repository, or a private one that this token may not see. Check the name, and log in with "
        "`hf auth login` or pass token=."
    ),
}
_ADVICE = {
    401: "No token, or not a valid one: log in with `hf auth login`, or pass token=.",
    403: "This token may not do that: use one with the right to, and a name space of your own.",
}
