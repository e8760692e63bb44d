"""One file of a checkpoint while it is written."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future
from pathlib import Path

from merge_engine.checkpoint.shards import ShardLayout
from merge_engine.storage.memory import PAGE

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)


class ShardFile:
    """The new file ``part``. ``missing`` bytes of its data are still to come; ``synced`` once they are."""

    def __init__(self, layout: ShardLayout, part: Path):
        """Creates the file. Raises ``OSError``, as all methods do."""
        self.layout = layout
        self.part = part
        self.missing = layout.size - len(layout.header)
        self.synced: Future[None] | None = None
        self._descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct: int | None = None  # a second descriptor: None until needed, -1 if there can be none
        self._lock = threading.Lock()

    def prepare(self, reserve: bool) -> None:
        """Write the header, and take the disk space: a disk too small is known before the work, not after it."""
        try:
            if reserve:
                os.posix_fallocate(self._descriptor, 0, self.layout.size)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        os.ftruncate(self._descriptor, self.layout.size)
        self._write_all(memoryview(self.layout.header), 0, direct=-1)

    def write(self, data: memoryview, position: int) -> None:
        """Write everything, whole pages past the page cache where that works. Thread-safe.

        Filling the cache with what nobody reads again took several times the processor time on a virtual
        disk, and pushed the inputs out of it.
        """
        whole_pages = data.nbytes >= PAGE and position % PAGE == 0
        self._write_all(data, position, self._open_direct() if whole_pages else -1)

    def sync(self) -> None:
        """Wait until the data is on the disk."""
        os.fsync(self._descriptor)

    def sync_and_close(self) -> None:
        """Sync, and close at once, since the shards may outnumber the limit of open files."""
        try:
            self.sync()
        finally:
            self.close()

    def close(self) -> None:
        """Close what is open. No write may be under way: a closed descriptor may become another file's."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct = -1

    def _open_direct(self) -> int:
        with self._lock:
            if self._direct is None:
                try:
                    flags = os.O_WRONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0)
                    self._direct = os.open(self.part, flags)
                except OSError as error:
                    if error.errno not in _UNSUPPORTED + _TOO_MANY_OPEN:
                        raise
                    self._direct = -1
            return self._direct

    def _write_all(self, data: memoryview, position: int, direct: int) -> None:
        while data.nbytes:
            whole = data.nbytes // PAGE * PAGE if direct >= 0 and position % PAGE == 0 else 0
            try:
                if whole:
                    written = os.pwrite(direct, data[:whole], position)
                else:
                    written = os.pwrite(self._descriptor, data, position)
            except OSError as error:
                if not whole or error.errno not in _UNSUPPORTED:
                    raise
                direct = -1  # memory that is not aligned, or a file system that has second thoughts
                continue
            data, position = data[written:], position + written
