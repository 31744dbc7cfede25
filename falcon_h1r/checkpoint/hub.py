"""From what a user types to a folder on disk: a local path, or a Hugging Face hub repository."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from ..files import foreign_kind, open_file, settle_folder
from .errors import CheckpointError

EMBEDDED = "h1r-pico"  # the checkpoint that the package holds
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja, beside the tokenizer's files

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(
    path_or_repo_id: str | Path, revision: str | None = None, *, weights: bool = True
) -> Path:
    """Folder that holds the checkpoint.

    path_or_repo_id: a local folder, a hub repository id "owner/name", or "h1r-pico", the embedded
        checkpoint; an existing folder wins, and one whose save was killed at its very end is put
        into its place first.
    revision: branch, tag or commit of a hub repository; refused for all others.
    weights: False fetches only the configuration and tokenizer files of a hub repository.

    From the hub only JSON, tokenizer and `model*.safetensors` files of the repository's top level
    and its chat templates are fetched, never pickled weights. `HF_HUB_OFFLINE` and the cache's
    place are huggingface_hub's own settings.

    Raises `CheckpointError` when there is no such folder, repository or revision, when the hub
    cannot be reached and the files are not in its cache, or when huggingface_hub is not installed.
    """
    if not isinstance(path_or_repo_id, (str, os.PathLike)):
        raise CheckpointError(
            f"checkpoint is {path_or_repo_id!r}, expected a folder, a hub repository owner/name or "
            f"{EMBEDDED!r}"
        )
    text = os.fspath(path_or_repo_id)
    path = Path(os.path.expanduser(text))
    with contextlib.suppress(OSError, ValueError):
        if text and not os.path.lexists(path):
            settle_folder(path)  # a killed save may have left the folder beside its place
    # os.path rather than Path methods: those raise for a NUL or an overlong name.
    if text and os.path.isdir(path):
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r} was given for the local folder {path}; "
                "only a hub repository has revisions"
            )
        return path
    if text and os.path.exists(path):
        kind = "a file"
        with contextlib.suppress(OSError, ValueError), open_file(path) as file:
            kind = foreign_kind(file.read(64)) or kind
        raise CheckpointError(f"{path} is {kind}, expected the folder that holds {CONFIG}")
    if path_or_repo_id == EMBEDDED:
        return _embedded(revision)
    if isinstance(path_or_repo_id, os.PathLike) or not _REPO_ID.fullmatch(text):
        raise CheckpointError(
            f"no such folder: {text!r} (a hub repository id is written owner/name, and the "
            f"embedded checkpoint {EMBEDDED})"
        )
    return _download(text, revision, weights)


def _embedded(revision: str | None) -> Path:
    if revision is not None:
        raise CheckpointError(f"revision={revision!r}: the embedded {EMBEDDED} has none")
    folder = Path(__file__).parents[1] / "assets" / EMBEDDED
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: this installation lacks its checkpoint")
    return folder


def _download(repo_id: str, revision: str | None, weights: bool) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"no such folder: {repo_id!r}; to fetch it from the hub, install huggingface_hub"
        ) from error

    patterns = ["*.json", *(name for name in TOKENIZER_FILES if "json" not in name)]
    patterns.append(f"{CHAT_TEMPLATES}/*.jinja")
    if weights:
        patterns.append("model*.safetensors")
    place = f"{repo_id!r} (no local folder of that name; revision {revision or 'main'!r})"
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*.json", "*/*.safetensors", "*/*/*"],  # a star takes slashes too
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{place}: access to this hub repository is restricted") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{place}: no such hub repository, or it is private") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{place}: the hub repository has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{place}: not (completely) in the local hub cache, and the hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE is set)"
        ) from error
    except Exception as error:  # whatever HTTP library this version of huggingface_hub uses
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{place}: download failed: {type(error).__name__}: {reason}"
        ) from error
    return Path(folder)
