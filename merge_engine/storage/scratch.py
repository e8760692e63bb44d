"""Folders for files that only one process needs, and only until it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merge_engine.storage.machine import available_memory
from merge_engine.storage.mounts import mount_of

RAM_DISK = Path("/dev/shm")

_PREFIX = "merge_engine-scratch-"
_NEW = "merge_engine-new-"


def room_in_memory(nbytes: int) -> bool:
    """Whether files of so many bytes go to the RAM disk: they fit, and take at most half of the available memory."""
    if not (RAM_DISK.is_dir() and os.access(RAM_DISK, os.W_OK) and mount_of(RAM_DISK).in_memory):
        return False
    return nbytes <= min(available_memory() // 2, shutil.disk_usage(RAM_DISK).free)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, which is removed at the end with all that is in it.

    Also removes the folders there that killed processes of this user have left. Each process locks its own. Raises
    ``OSError``.
    """
    _remove_left(parent)
    made = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # file systems without locks: nothing is removed there later
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Others look at it only under this name, when it is locked.
        made = made.rename(made.with_name(_PREFIX + made.name.removeprefix(_NEW)))
        yield made
    finally:
        os.close(descriptor)
        shutil.rmtree(made, ignore_errors=True)


def _remove_left(parent: Path) -> None:
    for folder in parent.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):  # of another user, in use, or removed by another process
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)
