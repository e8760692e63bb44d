"""The unfinished files in an output folder while a merge writes into it: parts and drafts.

A part is a shard with a name that no reader takes for weights. The process that opened the folder writes parts
directly. Another process writes a draft, and renames it to a part when it is complete. Each merge has a folder of
its own for drafts. When that folder is removed, a process that is late can neither begin a draft nor turn one into
a part, of this merge or of the next one into the same output folder.
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

_DRAFTS = re.compile(rf"merge-[0-9a-f]{{32}}{re.escape(PART_SUFFIX)}")


def unfinished_files(folder: Path) -> list[str]:
    """The names of a merge's unfinished weight files and folders of drafts in an output folder."""
    return sorted(file.name for file in (*folder.glob("*.safetensors" + PART_SUFFIX), *drafts_in(folder)))


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


def remove_drafts(drafts: Path) -> None:
    """Delete a folder of drafts: first rename it, so that it cannot be used, then delete its files.

    Raises ``OSError``.
    """
    closed = drafts.rename(drafts.with_name(_new_name()))
    for draft in closed.iterdir():
        draft.unlink()
    closed.rmdir()


def _new_name() -> str:
    return f"merge-{os.urandom(16).hex()}{PART_SUFFIX}"
