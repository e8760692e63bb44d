"""Files that are read: what is known of one, and descriptors and mappings of many."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from dataclasses import dataclass
from pathlib import Path

import merge_engine._native as native
from merge_engine.errors import CheckpointError
from merge_engine.storage.direct import open_direct
from merge_engine.storage.mounts import mount_of


@dataclass(frozen=True)
class File:
    """A file as it was when its header was read: ``size`` in bytes, and when it was last modified."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> File:
        """The file as it is now. Raises ``CheckpointError`` when the system does not say."""
        try:
            found = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        return cls(path, found.st_size, found.st_mtime_ns)


class OpenFiles:
    """Files that are open for reading. Each is opened when it is first used, and only once. Thread-safe.

    Use it as a context manager, or call ``close``.
    """

    def __init__(self) -> None:
        """Raises this process's limit of open files as far as it may."""
        allow_many_files()
        self._lock = threading.RLock()
        self._descriptors: dict[File, int] = {}
        self._direct: dict[File, int] = {}
        self._mappings: dict[File, native.Mapping | None] = {}
        self._local: dict[Path, bool] = {}  # by folder

    def descriptor(self, file: File) -> int:
        """A descriptor that reads through the page cache.

        Raises ``CheckpointError`` when the file cannot be opened, or has another size than it had.
        """
        with self._lock:
            if file not in self._descriptors:
                try:
                    opened = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise _unreadable(file.path, error) from error
                self._descriptors[file] = _of_same_size(file, opened)
            return self._descriptors[file]

    def direct_descriptor(self, file: File) -> int:
        """A descriptor that reads whole pages past the page cache, -1 where the file system has none.

        Raises ``CheckpointError`` when the file has another size than it had.
        """
        with self._lock:
            if file not in self._direct:
                try:
                    opened = open_direct(file.path)
                except OSError:
                    self._direct[file] = -1
                else:
                    self._direct[file] = _of_same_size(file, opened)
            return self._direct[file]

    def mapping(self, file: File) -> native.Mapping | None:
        """The whole file in memory, None where it cannot be mapped or may lie on a network's file system.

        Raises ``CheckpointError`` as ``descriptor`` does.
        """
        with self._lock:
            if file not in self._mappings:
                self._mappings[file] = self._map(file)
            return self._mappings[file]

    def close(self) -> None:
        """Close all files. No read may be under way; views of mappings stay valid as long as they are held."""
        with self._lock:
            self._mappings.clear()
            for descriptors in (self._descriptors, self._direct):
                while descriptors:
                    if (descriptor := descriptors.popitem()[1]) >= 0:
                        os.close(descriptor)

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map(self, file: File) -> native.Mapping | None:
        folder = file.path.resolve().parent
        try:
            if folder not in self._local:
                self._local[folder] = mount_of(folder).local
            return native.Mapping(self.descriptor(file), file.size) if self._local[folder] else None
        except OSError:  # no such thing on this file system, or no address space
            return None


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as it may.

    Every shard of every input and of the output is open at once, and common soft limits (1024, 256) are
    meant for programs that use ``select``; the hard limit is what the administrator allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # systems where "unlimited" cannot be asked for
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _of_same_size(file: File, descriptor: int) -> int:
    """The descriptor, closed if the file's size has changed."""
    if os.fstat(descriptor).st_size != file.size:
        os.close(descriptor)
        raise CheckpointError(f"{file.path}: its size has changed since its header was read")
    return descriptor


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror}")
