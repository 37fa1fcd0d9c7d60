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
"""Files that loading reads, and the only ones it downloads: cards and plots stay on the Hub."""
_LARGEST = {CONFIG: JSON_LIMIT, FRONTIER: JSON_LIMIT, PROCESSOR: 1 << 20}
"""Size limits in bytes of files that are read as a whole. Tensors may be as large as branches and bases."""


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
    """Upload an adapter folder in one commit, creating repository and branch if needed.

    Only the adapter's own files are uploaded, whatever else is in the folder.

    Args:
        private: visibility of a new repository; the account's default if not given.
        token: None uses the one stored by `hf auth login`, or `HF_TOKEN`.
        revision: branch; the main one by default.
    Returns:
        URL of the commit or of the pull request.
    Raises:
        AdapterError: not an adapter folder, files that do not belong together, or a repository of another model.
        HubError: no such user, no write access, no connection. The branch is unchanged; or it has all of the new
            adapter, if only the Hub's response was lost, and then pushing again changes nothing.
    """
    api = HfApi(token=token)
    files = own_files(folder)
    with _hub_errors(f"push to {repo_id}", revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        new = revision is not None and not create_pr and not api.revision_exists(repo_id, revision)
        _refuse_others(api, repo_id, None if new else revision)  # a new branch starts as a copy of the main one
        if new:
            api.create_branch(repo_id, branch=revision or "main", exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision)
        add = [CommitOperationAdd(name, path) for name, path in files.items()]
        if CARD in there and MARKER not in _text(api.hf_hub_download(repo_id, CARD, revision=revision)):
            warnings.warn(
                f"{repo_id} has a README not written by ee_surgery; it is kept. Delete it there to get a model card.",
                SurgeryWarning,
                stacklevel=3,
            )
            add = [operation for operation in add if operation.path_in_repo != CARD]
        # files of an earlier version of this adapter that the new one does not have
        stale = [name for name in (FRONTIER, BASE, PLOT, RESULTS) if name in there and name not in files]
        # Not `upload_folder`: it may commit in parts, and commit again if the response to a commit is lost.
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
    """The cached adapter folder of a repository, downloaded if needed.

    Args:
        revision: branch, tag or commit; the main branch by default.
        local_files_only: use only the cache, as with `HF_HUB_OFFLINE=1`.
    Raises:
        HubError: no such repository or revision, no read access, no connection and nothing in the cache, no disk
            space, or no adapter in it.
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
        raise HubError(f"Cannot load {repo_id}: it has no {CONFIG}, so it is not an adapter.")
    return folder


def _check_sizes(repo_id: str, revision: str | None, token: str | bool | None, local_files_only: bool) -> None:
    """Refuse files that are too large for an adapter, before downloading them.

    Raises:
        HubError: a file is too large.
    """
    if local_files_only or constants.HF_HUB_OFFLINE:
        return
    try:
        found = HfApi(token=token).get_paths_info(repo_id, list(_LARGEST), revision=revision)
    except Exception:  # the download reports the error, or uses the cache
        return
    for file in found:
        size, largest = getattr(file, "size", 0), _LARGEST.get(file.path, 0)
        if size > largest:
            raise HubError(
                f"Cannot load {repo_id}: its {file.path} has {size:,} bytes; an adapter's has at most {largest:,}. "
                "Nothing was downloaded."
            )


def _refuse_others(api: HfApi, repo_id: str, revision: str | None) -> None:
    names = api.list_repo_files(repo_id, revision=revision)
    config = None
    if CONFIG in names:
        config = read_bytes(api.hf_hub_download(repo_id, CONFIG, revision=revision), JSON_LIMIT)
    if (found := of_others(names, config)) is not None:
        raise AdapterError(
            f"{repo_id} holds {found}, which does not belong to an ee_surgery adapter: pushing here would make that "
            "model unreadable. Nothing was uploaded. Push to a separate repository."
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
        # Everything: the client passes on errors of httpx, xet and the file system, wrapped in various types.
        at = "" if revision is None else f" at revision {revision!r}"
        raise HubError(f"Cannot {what}{at}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The cause of an error of the client, and what to do."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    for kind, reason in _REASONS.items():
        if any(isinstance(found, kind) for found in chain):
            return reason.format(error=error)
    for found in chain:
        if isinstance(found, HfHubHTTPError):
            status = getattr(found.response, "status_code", None)
            return f"the Hub responded {found} {_ADVICE.get(status or 0, 'Try again later.')}"
    for found in chain:
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"not enough disk space ({found}). Free some and try again; no partial download is kept."
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return f"it is not, or not completely, in the cache, and the Hub cannot be reached. {error}"
    causes = " <- ".join(f"{type(found).__name__}: {found}" for found in chain)
    return f"{causes}. Check the connection and try again; no partial change was made."


# The first match counts: a gated repository is a subclass of a missing one.
_REASONS: dict[type[BaseException], str] = {
    HFValidationError: "it is not a repository id such as user/name. {error}",
    GatedRepoError: "access is gated. Request it on the repository's page, then log in with `hf auth login`.",
    RevisionNotFoundError: "the repository has no such revision.",
    RepositoryNotFoundError: (
        "there is no such repository, or it is private and this token has no access. Check the name, and log in with "
        "`hf auth login` or pass token=."
    ),
}
_ADVICE = {
    401: "No valid token: log in with `hf auth login`, or pass token=.",
    403: "This token has no permission: use one with write access, and your own namespace.",
}
