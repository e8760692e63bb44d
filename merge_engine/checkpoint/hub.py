"""From the name of a model in a recipe, a folder or a name on the Hugging Face hub, to a local path."""

from __future__ import annotations

import os
import re
from pathlib import Path

from merge_engine.errors import CheckpointError, way_out
from merge_engine.text import did_you_mean, shortened

_SIDE_FILES = [
    *("*.json", "*.txt", "*.model", "tokenizer.model*", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes"),
    *("*.vocab", "*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
]
# Mistral's second copy, and weights in subfolders, except those of sentence-transformers' layers (2_Dense).
_NEVER_READ = [
    *("consolidated*.safetensors", "*/*.bin", "[!0-9]*/*.safetensors", "[0-9][!_]*/*.safetensors"),
]
_HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/([\w.-]+))?"
)


def locate(path: str, revision: str | None, *, weights: bool = True) -> Path:
    """The local path of a model: an existing path as it is, otherwise a snapshot from the hub.

    ``revision`` is a branch, tag or commit on the hub. Without ``weights`` only the other files are downloaded. Files
    in the hub's cache are not downloaded again; without a network only the cache is used. Raises ``CheckpointError`` if
    there is no such model or it cannot be downloaded.
    """
    shown = shortened(path)
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError
        local = Path(path).expanduser()
        exists = local.exists() or local.is_symlink()
    except RuntimeError as error:  # ~name without such a user
        raise CheckpointError(f"{shown}: there is no such folder or file: {error}") from None
    except ValueError:  # a NUL, or half a character
        raise CheckpointError(f"{shown}: no folder or file has such a name") from None
    except OSError as error:  # a name too long, a folder without permission
        raise CheckpointError(f"{shown}: cannot be read: {error.strerror}{way_out(error)}") from error
    if exists:
        if revision is not None:
            raise CheckpointError(
                f"{shown}: a revision ({shortened(revision)}) is given, but this is a local path; remove it"
            )
        return local
    if "://" in path or _HUB_ADDRESS.match(path):
        raise CheckpointError(
            f"{shown}: an address, not a folder or a name on the hub; {_instead_of_address(path)}"
        )
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:  # the hub has names and owner/name only
        raise CheckpointError(f"{shown}: there is no such folder or file{_suggestion(local)}")
    try:
        folder = _snapshot(path, revision, [*_SIDE_FILES, *(["*.safetensors"] if weights else [])])
        if weights and not any(folder.glob("*.safetensors")):
            folder = _snapshot(path, revision, [*_SIDE_FILES, "*.bin"])
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_suggestion(local)}") from error
    return folder


def _instead_of_address(address: str) -> str:
    if address.startswith("file://"):
        return f"write {shortened(address.removeprefix('file://'))}"
    found = _HUB_ADDRESS.match(address)
    revision = f"@{found[2]}" if found and found[2] not in (None, "main") else ""
    return f"write {found[1]}{revision}" if found else "download the model and name its folder"


def _suggestion(local: Path) -> str:
    """A question to append to an error, if something beside ``local`` has nearly its name."""
    try:
        names = [entry.name for entry in local.parent.iterdir()]
    except OSError:
        return ""
    return did_you_mean(local.name, names, cutoff=0.75, quoted=local.parent.joinpath)


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=_NEVER_READ
            )
        )
    # The hub's own errors, its HTTP library's and the system's share no base class.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{shortened(repo)}: neither a folder here nor a model on the hub{at} that can be fetched: {reason}"
        ) from error
