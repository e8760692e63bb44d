"""Files beside the weights, such as config.json, until they get their names.

They are written to numbered files in one folder. So a name can be as long as the file system allows, and an
interrupted merge leaves one folder that the next one deletes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from xxhash import xxh3_128

from merge_engine.checkpoint.durable import sync_all
from merge_engine.checkpoint.output_folder import is_inside, naming
from merge_engine.checkpoint.unfinished import STAGING
from merge_engine.errors import CheckpointError, OutputError, way_out

_PIECE = 1 << 20


class StagedFiles:
    """The new files of an output folder. Their order is that in which they were added."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The names of the files in the output folder, relative to it."""
        return list(self._numbers)

    def add(self, name: str, pieces: Iterable[bytes]) -> tuple[int, str]:
        """Write a file that is to have this name. Returns its size and its XXH3-128 digest, hexadecimal.

        ``name`` may have a subfolder. Raises ``OutputError`` if it leads out of the folder, if its place is taken, or
        if it cannot be written.
        """
        target = self._folder / name
        if not is_inside(self._folder, name):
            raise OutputError(f"{name!r} is not the name of a file inside {self._folder}")
        with naming(target):
            refuse_taken(self._folder, name)
            staging = self._folder / STAGING
            staging.mkdir(exist_ok=True)
            number = self._numbers.setdefault(target.relative_to(self._folder).as_posix(), len(self._numbers))
            digest, size = xxh3_128(), 0
            with (staging / staged_name(number)).open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
                    size += len(piece)
        return size, digest.hexdigest()

    def sync(self) -> None:
        """Wait until all files are on the disk. Raises ``OSError``."""
        staging = self._folder / STAGING
        sync_all([staging / staged_name(number) for number in self._numbers.values()])


def staged_name(number: int) -> str:
    """The name of the staged file with this number."""
    return f"new-{number}"


def refuse_taken(folder: Path, name: str) -> None:
    """Raise ``OutputError`` if a folder has the name of the new file ``name``, or a file that of a folder it is in."""
    target = folder / name
    if target.is_dir() and not target.is_symlink():
        raise OutputError(f"{target}: is a folder, but a file needs this name; move it away")
    for level in target.relative_to(folder).parents:
        if (folder / level).exists() and not (folder / level).is_dir():
            raise OutputError(f"{folder / level}: is a file, but a folder needs this name; move it away")


def pieces_of(source: Path) -> Iterator[bytes]:
    """The content of a regular file, in pieces of at most 1 MiB. Raises ``CheckpointError``."""
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is not waited for
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"{source}: is not a regular file, so it is not copied; remove it")
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}{way_out(error)}") from error
