"""The unfinished files in an output folder while a merge writes into it: parts, records, drafts, staged files.

A part is a shard with a name that no reader takes for weights. A record says that the part beside it is complete.
The process that opened the folder writes parts directly. Another process writes a draft, and renames it to a part when
it is complete. Each merge has a folder of its own for drafts. When that folder is removed, a process that is late can
neither begin a draft nor turn one into a part, of this merge or of the next one into the same output folder.

The folder ``merge.part`` holds all other files of the new output until they get their names, and from then on the
files of the earlier output until the new one is complete (``publication.py``).
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from merge_engine.errors import OutputError

PART_SUFFIX = ".part"
RECORD_SUFFIX = ".record" + PART_SUFFIX
"""The end of the name of a record: what a merge knows about a complete part of the same shard."""
STAGING = "merge" + PART_SUFFIX
"""The folder, in an output folder, of files that come and files that give way."""

_PART = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors(\.record)?\.part")
_DRAFTS = re.compile(rf"merge-[0-9a-f]{{32}}{re.escape(PART_SUFFIX)}")


def is_unfinished(entry: Path) -> bool:
    """Whether an entry of an output folder is what an interrupted merge left there."""
    is_part = _PART.fullmatch(entry.name) is not None
    if not is_part and entry.name != STAGING and not _DRAFTS.fullmatch(entry.name):
        return False
    is_folder = entry.is_dir() and not entry.is_symlink()
    return is_folder != is_part


def unfinished_files(folder: Path) -> list[str]:
    """The names of a merge's unfinished weight files and folders in an output folder."""
    files = folder.glob("*" + PART_SUFFIX)
    return sorted(
        file.name for file in files if is_unfinished(file) and not file.name.endswith(RECORD_SUFFIX)
    )


def remove_parts(folder: Path, kept: frozenset[str] = frozenset()) -> None:
    """Delete the parts and records in an output folder, except those of the shards with the names ``kept``.

    Raises ``OSError``.
    """
    for file in folder.glob("*" + PART_SUFFIX):
        shard = file.name.removesuffix(PART_SUFFIX).removesuffix(".record")
        if _PART.fullmatch(file.name) and is_unfinished(file) and shard not in kept:
            file.unlink()


def drafts_in(folder: Path) -> list[Path]:
    """The folders of drafts in an output folder."""
    return [
        entry
        for entry in folder.glob("merge-*" + PART_SUFFIX)
        if _DRAFTS.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink()
    ]


def make_drafts(folder: Path) -> Path:
    """Make a folder of drafts in an output folder. Raises ``OSError``."""
    drafts = folder / _new_name()
    drafts.mkdir()
    return drafts


def new_draft(drafts: Path, name: str) -> Path:
    """The file for a new draft of the shard with this name. Earlier drafts of it are deleted and cannot be completed.

    Raises ``OutputError`` if the folder of drafts is gone, and ``OSError``.
    """
    if not drafts.is_dir():
        raise OutputError(
            f"{drafts}: is gone, because the merge that the shard belongs to has ended; start it again"
        )
    for earlier in drafts.glob(f"{glob.escape(name)}.*"):
        earlier.unlink(missing_ok=True)
    return drafts / f"{name}.{os.urandom(16).hex()}"


def discard(folder: Path) -> None:
    """Delete a folder of drafts, or of staged files, with all files in it.

    It is first renamed, so that nothing in it counts any more; if that is all that is done, the next merge deletes
    the rest. Raises ``OSError``.
    """
    closed = folder.rename(folder.with_name(_new_name()))
    for file in closed.iterdir():
        file.unlink()
    closed.rmdir()


def _new_name() -> str:
    return f"merge-{os.urandom(16).hex()}{PART_SUFFIX}"
