"""An adapter folder <-> a repository on the Hugging Face Hub, in one commit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ee_surgery.errors import HubError
from ee_surgery.share.adapter import BASE, CONFIG, FRONTIER, WEIGHTS

FILES = [CONFIG, WEIGHTS, FRONTIER, BASE, "preprocessor_config.json"]
"""What loading reads; cards and plots stay on the Hub."""


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

    Args:
        token: None takes the one that was stored by `hf auth login` or `HF_TOKEN`.
        revision: branch; the main one by default.
    Returns:
        Where to look at the commit, or at the pull request.
    Raises:
        HubError: no such user, no right to write, no connection; the repository holds what it held before.
    """
    api = HfApi(token=token)
    with _hub_errors(f"push to {repo_id}", revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            ignore_patterns=["*.partial"],
            # of an earlier version of this adapter, what the new one no longer has
            delete_patterns=[name for name in (FRONTIER, BASE) if not (folder / name).exists()],
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
        HubError: no such repository or revision, no right to read it, no connection and nothing in the cache, or no
            room to store it.
    """
    with _hub_errors(f"load {repo_id}", revision):
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=FILES,
        )
    return Path(folder)


@contextmanager
def _hub_errors(what: str, revision: str | None) -> Iterator[None]:
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        yield
    except HFValidationError as error:
        raise HubError(
            f"Cannot {what}: {error} It is no folder here, and no repository id such as user/name."
        ) from error
    except GatedRepoError as error:
        raise HubError(f"Cannot {what}: access is gated. Ask for it on the repository's page, then log in.") from error
    except RevisionNotFoundError as error:
        raise HubError(f"Cannot {what}: it has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"Cannot {what}: no such repository, or a private one that this token may not see. Check the name, and "
            "log in with `hf auth login` or pass token=."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"Cannot {what}{at}: it is not in the cache, and the Hub could not be asked. {error}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        advice = {
            401: "The token is not valid: log in with `hf auth login`, or pass token=.",
            403: "This token may not do that: use one with the right to write, and a name space of your own.",
        }.get(status or 0, "Try again.")
        raise HubError(f"Cannot {what}{at}: the Hub answered {error} {advice}") from error
    except OSError as error:  # no room, or no connection: httpx's errors are not all of them OSErrors
        raise HubError(f"Cannot {what}{at}: {error}. Nothing was half written; try again.") from error
