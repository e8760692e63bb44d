"""The folder of an output: checks before a merge, and the files of an earlier output in it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from merge_engine.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from merge_engine.checkpoint.sidecar import MANIFEST_NAME, REPORT_NAMES
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.checkpoint.unfinished import STAGING, drafts_in, is_unfinished
from merge_engine.errors import OutputError
from merge_engine.storage.bounded import MAX_MANIFEST, read_bounded
from merge_engine.text import some

HEADS = (INDEX_FILE, SINGLE_FILE)
"""The files that make a folder a checkpoint. Loaders that find both take the second."""

# Loaders take these for a model, or for a part of one.
_FOREIGN = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json")
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
    if folder.is_symlink() and not folder.exists():
        return [f"{folder}: a broken link to {folder.readlink()}; make that folder, or remove the link"]
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
    if os.path.lexists(folder / STAGING):
        # What the interrupted merge leaves there is known when the next one has tidied up, and it looks again.
        return problems
    problems += contents_in_the_way(folder, overwrite)
    free = shutil.disk_usage(existing).free + _bytes_of_parts(folder)
    if free < needed_bytes:
        problems.append(
            f"{folder}: the output needs {needed_bytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free"
        )
    return problems


def contents_in_the_way(folder: Path, overwrite: bool) -> list[str]:
    """The reasons why an output cannot take the place of what ``folder`` holds, one line each.

    Unfinished files of a merge are in nobody's way. ``overwrite`` allows an earlier output and other files, but no
    weights that loaders take and a merge never writes: beside the new configuration they would be a mixture. Raises
    ``OSError``.
    """
    if not folder.is_dir():
        return []
    names = [entry.name for entry in folder.iterdir() if not is_unfinished(entry)]
    if names and not overwrite:
        return [f"{folder}: is not empty; choose another folder or pass --overwrite"]
    foreign = sorted({*names} & {*_FOREIGN})
    if foreign:
        foreign = sorted({*foreign} - {*_listed_files(folder)})
    if not {*names} & {*HEADS}:
        foreign += sorted(
            name for name in names if name.endswith(".safetensors") and not _OUR_SHARD.fullmatch(name)
        )
    if foreign:
        return [
            f"{folder}: holds {some(foreign)}, which a loader could take together with the new files; "
            "remove it or choose another folder"
        ]
    return []


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


def earlier_files(folder: Path, new: Iterable[str]) -> list[str]:
    """The files that give way to an output with the files ``new``: names relative to the folder.

    The files that make the folder a checkpoint come first. The others are shards and reports of an earlier output, its
    manifest, the side files that the manifest lists, and all files with the names of new ones.
    """
    shards = sorted(file.name for file in folder.glob("*.safetensors") if _OUR_SHARD.fullmatch(file.name))
    listed = _listed_files(folder)
    names = dict.fromkeys([*HEADS, *listed, MANIFEST_NAME, *REPORT_NAMES, *shards, *new])
    return [name for name in names if _is_file(folder / name)]


def is_inside(folder: Path, name: object) -> bool:
    """Whether this is the name of a file in ``folder`` or in its subfolders, on a path without links."""
    if not isinstance(name, str) or "\0" in name:
        return False
    relative = PurePosixPath(name)
    if not relative.name or relative.is_absolute() or ".." in relative.parts:
        return False
    try:
        return (folder / relative).parent.resolve() == folder.resolve() / relative.parent
    except (
        OSError,
        RuntimeError,
        ValueError,
    ):  # too long, links in a circle, characters that no file name has
        return False


def _listed_files(folder: Path) -> list[str]:
    """The side files of an earlier output, as its manifest lists them under ``files``.

    A manifest that is malformed, a link, too large, or that names a file outside the folder is not trusted: the list is
    then empty, so that nothing is deleted. Raises ``OSError`` for one that cannot be read.
    """
    path = folder / MANIFEST_NAME
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_MANIFEST:
        return []
    try:
        manifest = parse_json(read_bounded(path, MAX_MANIFEST))
    except ValueError:
        return []
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, (list, dict)) or not all(is_inside(folder, name) for name in listed):
        return []
    names = [PurePosixPath(name) for name in listed]
    return [name.as_posix() for name in names if not is_unfinished(folder / name.parts[0])]


def _is_file(path: Path) -> bool:
    """Whether there is a file, a link or the like, but no folder. No name is too long to be asked for."""
    return os.path.lexists(path) and (path.is_symlink() or not path.is_dir())


def _bytes_of_parts(folder: Path) -> int:
    """Bytes on the disk of unfinished files: they are a part of the new output, or deleted before it is written."""
    if not folder.is_dir():
        return 0
    parts = [entry for entry in folder.iterdir() if is_unfinished(entry)]
    parts += [draft for drafts in drafts_in(folder) for draft in drafts.iterdir()]
    return sum(512 * part.lstat().st_blocks for part in parts)


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
