"""What lies in an output folder while a merge writes into it: parts and drafts of files.

A part is a shard under a name that no reader takes for one. What writes it in the process that opened the folder fills
it in place. In another process a shard is a draft until it is complete, and then becomes a part. Drafts have a folder
of their own for each merge. Once that is gone, a process that is late can neither begin a draft nor make one a part:
not of this merge, and not of the next into the same folder.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from merge_engine.errors import OutputError

PART_SUFFIX = ".part"

_DRAFTS = re.compile(rf"merge-[0-9a-f]{{32}}{re.escape(PART_SUFFIX)}")


def unfinished_files(folder: Path) -> list[str]:
    """Names of what a merge was still writing when it ended: weight files and folders of drafts."""
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
    """Where to write the shard with this name. Earlier drafts of it are deleted: nobody can complete them any more.

    Raises ``OutputError`` when the folder of drafts is gone, and ``OSError``.
    """
    if not drafts.is_dir():
        raise OutputError(
            f"{drafts}: is gone, because the merge that the shard belongs to has ended; start it again"
        )
    for earlier in drafts.glob(f"{glob.escape(name)}.*"):
        earlier.unlink(missing_ok=True)
    return drafts / f"{name}.{os.urandom(16).hex()}"


def remove_drafts(drafts: Path) -> None:
    """Delete a folder of drafts, first its name and then what is in it. Raises ``OSError``."""
    closed = drafts.rename(drafts.with_name(_new_name()))
    for draft in closed.iterdir():
        draft.unlink()
    closed.rmdir()


def _new_name() -> str:
    return f"merge-{os.urandom(16).hex()}{PART_SUFFIX}"
