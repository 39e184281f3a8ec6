"""From what a user names - a directory or a Hugging Face Hub repository - to a directory on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from awq_ext.errors import CheckpointError

# What a checkpoint is made of. Nothing that can run code (pickles, Python files), nothing in subdirectories, and not
# the second copy of all weights that Mistral's repositories have.
WANTED = ("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
UNWANTED = ("*/*", "consolidated*.safetensors")


def resolve(
    path_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory of a checkpoint: the given one, or the snapshot of a hub repository ("organisation/name").

    A directory that exists comes first; anything else must be a repository, which is fetched into the hub's cache
    (``cache_dir``, else where ``HF_HOME`` says) unless it is there already. With ``local_files_only`` or
    ``HF_HUB_OFFLINE=1`` the network is not touched.

    Raises CheckpointError if there is no such directory or repository, if it cannot be had offline, or if the
    download fails.
    """
    name = os.fspath(path_or_repo)
    path = Path(name).expanduser()
    if not name:
        raise CheckpointError("the name of the checkpoint is empty; give a directory or a hub repository 'org/name'")
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and *.safetensors")
    if not isinstance(path_or_repo, str) or _looks_like_path(name):
        raise CheckpointError(f"{path} does not exist; give a directory that does, or a hub repository 'org/name'")
    return _snapshot(name, revision, cache_dir, local_files_only)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _snapshot(
    repo: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> Path:
    from huggingface_hub import errors, snapshot_download  # here: most checkpoints are directories

    what = f"'{repo}'" + (f" at revision '{revision}'" if revision else "")
    try:
        found = snapshot_download(
            repo,
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"{what} is neither a directory here nor a valid repository name: {error}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{what} is gated: accept its terms on https://huggingface.co/{repo} and run 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{what} is neither a directory here nor a repository on the hub; check the name, or run 'hf auth login' "
            "if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{what} is not on the hub: the repository has no such branch, tag or commit") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{what} is neither a directory here nor in the hub's cache, and the hub cannot be asked (offline). "
            "Run once with a network, or give the path of a local copy"
        ) from error
    except Exception as error:  # the transports below huggingface_hub raise families of their own
        raise CheckpointError(f"{what} could not be fetched from the hub: {type(error).__name__}: {error}") from error
    return Path(found)
