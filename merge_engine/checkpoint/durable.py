"""Files and folders that survive a power failure."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from pathlib import Path

_AT_ONCE = 16


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries (new, renamed, deleted files), are on the disk.

    Raises ``OSError``.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(paths: Collection[Path]) -> None:
    """``sync`` many, several at a time. Raises ``OSError``.

    A journaling file system puts syncs of the same time together: 300 files took 0.08 s in 16 threads, and 0.6 to
    1.1 s one after the other (ext4 on a virtual disk).
    """
    waiting = iter(list(paths))
    failures: list[OSError] = []
    lock = threading.Lock()

    def work() -> None:
        while not failures:
            with lock:
                path = next(waiting, None)
            if path is None:
                return
            try:
                sync(path)
            except OSError as error:
                failures.append(error)

    helpers: list[threading.Thread] = []
    try:
        for _ in range(min(_AT_ONCE, len(paths)) - 1):
            helper = threading.Thread(target=work, name="fsync")
            helper.start()
            helpers.append(helper)
    except RuntimeError:  # no more threads: this one does the rest
        pass
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
