"""The folder of an output: the files of an earlier output in it, and errors that name it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from merge_engine.checkpoint.layout import INDEX_FILE, SINGLE_FILE
from merge_engine.checkpoint.sidecar import MANIFEST_NAME, REPORT_NAMES
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.checkpoint.unfinished import is_unfinished
from merge_engine.errors import OutputError, way_out
from merge_engine.storage.bounded import MAX_MANIFEST, read_bounded

HEADS = (INDEX_FILE, SINGLE_FILE)
"""The files that make a folder a checkpoint. Loaders that find both take the second."""

_IN_THE_WAY = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
OUR_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn ``OSError`` into an ``OutputError`` that names the file (or folder), the free space and the way out.

    If something is in the way, the error names that.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _IN_THE_WAY and isinstance(error.filename, str):
            file = Path(error.filename)
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(file if file.is_dir() else file.parent).free / 1e9:.2f} GB"
        said = f"{error.strerror} (free space: {free}){way_out(error)}"
        raise OutputError(f"{file}: cannot be written: {said}") from error


def earlier_files(folder: Path, new: Iterable[str]) -> list[str]:
    """The files that give way to an output with the files ``new``: names relative to the folder.

    The files that make the folder a checkpoint come first. The others are shards and reports of an earlier output, its
    manifest, the side files that the manifest lists, and all files with the names of new ones.
    """
    shards = sorted(file.name for file in folder.glob("*.safetensors") if OUR_SHARD.fullmatch(file.name))
    listed = listed_files(folder)
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
    except (OSError, RuntimeError, ValueError):
        return False  # too long, links in a circle, characters that no file name has


def listed_files(folder: Path) -> list[str]:
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
