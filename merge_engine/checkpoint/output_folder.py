"""The folder of an output: checks before a merge, and the removal of an earlier output in it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from merge_engine.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from merge_engine.checkpoint.sidecar import MANIFEST_NAME, REPORT_NAMES
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.checkpoint.unfinished import (
    PART_SUFFIX,
    RECORD_SUFFIX,
    drafts_in,
    remove_drafts,
    unfinished_files,
)
from merge_engine.errors import OutputError
from merge_engine.text import some

_OUR_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def check_output_folder(
    folder: Path, inputs: Sequence[Path], overwrite: bool, needed_bytes: int
) -> list[str]:
    """The reasons why the output cannot be written to ``folder``, one line each; empty if it can.

    ``inputs`` are the folders or files of the input checkpoints. ``needed_bytes`` must be free even if an earlier
    output is overwritten, because that one is kept until the new one is complete.
    """
    try:
        return _problems(folder, inputs, overwrite, needed_bytes)
    except OSError as error:  # a name too long, a folder without permission
        return [f"{folder}: cannot be used as the output: {error.strerror}; choose another folder"]
    except RuntimeError:  # pathlib's error for links in a circle
        return [f"{folder}: a link in it leads back to itself; choose another folder"]


def _problems(folder: Path, inputs: Sequence[Path], overwrite: bool, needed_bytes: int) -> list[str]:
    problems = []
    if folder.exists() and not folder.is_dir():
        return [f"{folder}: is a file; the output is a folder"]
    resolved = folder.resolve()
    for source in inputs:
        # The folder of an input file is no input, but the file could be deleted as an earlier output.
        homes = [source.resolve()] if source.is_dir() else [source.parent.resolve(), source.resolve().parent]
        if resolved in homes:
            problems.append(f"{folder}: is the folder of the input {source}; write somewhere else")
        elif source.is_dir() and (resolved.is_relative_to(homes[0]) or homes[0].is_relative_to(resolved)):
            problems.append(f"{folder}: lies inside or around the input {source}; write somewhere else")
    existing = _nearest_existing(resolved)
    if not existing.is_dir():
        return [*problems, f"{folder}: {existing} is a file, no folder can be made in it"]
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        return [*problems, f"{folder}: no permission to write to {existing}"]
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        parts = unfinished_files(folder)
        what = f"holds an unfinished merge ({some(parts)})" if parts else "is not empty"
        problems.append(f"{folder}: {what}; choose another folder or pass --overwrite")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        problems.append(
            f"{folder}: the output needs {needed_bytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free"
        )
    return problems


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn ``OSError`` into an ``OutputError`` that names the file (or folder) and the free space."""
    try:
        yield
    except OSError as error:
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(file if file.is_dir() else file.parent).free / 1e9:.2f} GB"
        raise OutputError(f"{file}: cannot be written: {error.strerror} (free space: {free})") from error


def remove_unfinished(folder: Path, kept: Collection[str] = ()) -> None:
    """Delete the ``.part`` files of a killed merge, except those whose names are in ``kept``.

    Drafts first, because another process may turn them into parts.
    """
    for drafts in drafts_in(folder):
        remove_drafts(drafts)
    (folder / (INDEX_FILE + PART_SUFFIX)).unlink(missing_ok=True)
    for suffix in (PART_SUFFIX, RECORD_SUFFIX):
        for file in folder.glob("*.safetensors" + suffix):
            shard = file.name.removesuffix(suffix)
            if file.name not in kept and (shard == SINGLE_FILE or _OUR_SHARD.fullmatch(shard)):
                file.unlink()


def retire_previous_output(folder: Path, kept: Collection[str]) -> None:
    """Delete the weights of an earlier output and the report on it, except shards whose names are in ``kept``.

    The index or the single weight file is deleted first, and durably, so that the folder is not a checkpoint while
    its files change.
    """
    for name in (SINGLE_FILE, INDEX_FILE):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)
    for name in REPORT_NAMES:
        (folder / name).unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        if _OUR_SHARD.fullmatch(file.name) and file.name not in kept and not file.is_dir():
            file.unlink()


def listed_files(folder: Path) -> list[Path]:
    """The side files of an earlier output, as its manifest lists them under ``files``.

    All of them are inside the folder. A manifest that is malformed, or that names a file outside, is not trusted: the
    list is then empty, so that nothing is deleted.
    """
    try:
        manifest = parse_json((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return []
    names = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(names, (dict, list)) or not all(_is_inside(folder, name) for name in names):
        return []
    return [folder / name for name in names]


def remove_listed(folder: Path, files: Sequence[Path]) -> None:
    """Delete these files of an earlier output, and subfolders of ``folder`` that become empty."""
    for file in files:
        if file.is_file() or file.is_symlink():
            file.unlink()
    for parent in {file.parent for file in files} - {folder}:
        with contextlib.suppress(OSError):  # other files are in it
            parent.rmdir()


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (new, renamed, deleted files) survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_inside(folder: Path, name: object) -> bool:
    if not isinstance(name, str) or "\0" in name:
        return False
    relative = PurePosixPath(name)
    if not relative.name or relative.is_absolute() or ".." in relative.parts:
        return False
    try:
        return (folder / relative).parent.resolve().is_relative_to(folder.resolve())
    except (RuntimeError, ValueError):  # links in a circle, characters that no file name has
        return False


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
