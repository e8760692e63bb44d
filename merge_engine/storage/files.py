"""Input files: what shows that they are still those whose headers were read, and the open descriptors of a run."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import merge_engine._native as native
from merge_engine.errors import CheckpointError, way_out
from merge_engine.storage.direct import open_direct
from merge_engine.storage.mounts import mount_of


@dataclass(frozen=True, slots=True)
class File:
    """A file when its header was read: ``size`` in bytes, ``mtime_ns`` of the last change in nanoseconds, ``inode``.

    A write within the resolution of the file system's times (4 ms on ext4, seconds on some network file systems) after
    the header was read, or one whose writer sets the time back, cannot be seen if the size stays the same. The
    attributes that a network file system shows may be as old as its client's cache, mostly a minute.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> File:
        """The file as it is now. Raises ``CheckpointError`` if it is missing or not accessible."""
        try:
            found = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}{way_out(error)}") from error
        return cls._from(path, found)

    def difference(self, descriptor: int) -> str | None:
        """The difference between the file and the open one, for a message; None if it is still the same."""
        found = self._from(self.path, os.fstat(descriptor))
        if found.size != self.size:
            return "its size has changed"
        if found.mtime_ns != self.mtime_ns:
            return "it has been written to"
        # Other file systems may make up numbers. The number of the device differs between machines that see the file.
        if found.inode != self.inode and mount_of(self.path).local:
            return "another file has taken its place"
        return None

    @classmethod
    def _from(cls, path: Path, found: os.stat_result) -> File:
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ino)


class OpenFiles:
    """Files, each opened once, on first use, from any thread. Close it when no read is under way."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, File], Any] = {}
        self._remembered: dict[Hashable, Any] = {}
        self._lock = threading.RLock()

    def descriptor(self, file: File) -> int:
        """A descriptor for reading. Raises ``CheckpointError`` when the file cannot be opened or has changed."""
        descriptor: int = self._once("descriptor", file, _open)
        return descriptor

    def direct_descriptor(self, file: File) -> int:
        """A descriptor for reading whole pages past the page cache; -1 if the file system refuses that.

        Raises ``CheckpointError`` when the file has changed.
        """
        descriptor: int = self._once("direct", file, _open_direct)
        return descriptor

    def mapping(self, file: File) -> native.Mapping | None:
        """The file in memory; None if it cannot be mapped, and on file systems that may be on a network.

        Raises ``CheckpointError`` as ``descriptor`` does.
        """
        mapping: native.Mapping | None = self._once("mapping", file, self._map)
        return mapping

    def kept(self, file: File, load: Callable[[Path], Any]) -> Any:
        """The result of ``load(file.path)``, which is called once.

        Raises ``CheckpointError`` as ``descriptor`` does, and when another file has taken its place meanwhile.
        """
        self.descriptor(file)
        return self._once("kept", file, partial(_load, load=load))

    def remembered(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The result of ``make()``, which is called once for this key. It may read from these files."""
        if key not in self._remembered:
            with self._lock:
                if key not in self._remembered:
                    self._remembered[key] = make()
        return self._remembered[key]

    def check_unchanged(self) -> None:
        """Raise ``CheckpointError`` if a file that is open has been written to since its header was read.

        A file that was removed or replaced is still the same where it is open.
        """
        with self._lock:
            opened = {
                file: descriptor
                for (kind, file), descriptor in self._kept.items()
                if kind in ("descriptor", "direct") and descriptor >= 0
            }
        changed = [
            f"{file.path}: {difference} while it was merged; run the merge again once nothing writes to it"
            for file, descriptor in opened.items()
            if (difference := file.difference(descriptor))
        ]
        if changed:
            raise CheckpointError(changed)

    def close(self) -> None:
        """Close everything."""
        with self._lock:
            for (kind, _), value in self._kept.items():
                if kind in ("descriptor", "direct") and value >= 0:
                    os.close(value)
            self._kept = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _once(self, kind: str, file: File, make: Callable[[File], Any]) -> Any:
        key = kind, file
        if key not in self._kept:
            with self._lock:
                if key not in self._kept:
                    if not self._kept:
                        allow_many_files()
                    self._kept[key] = make(file)
        return self._kept[key]

    def _map(self, file: File) -> native.Mapping | None:
        if not mount_of(file.path).local:
            return None
        try:
            return native.Mapping(self.descriptor(file), file.size)
        except OSError:  # a file system without mappings, or no address space
            return None


def allow_many_files() -> None:
    """Raise this process's soft limit of open files to the hard limit, which the administrator sets.

    Every shard of every input is open at once, and so are many of the outputs. Common soft limits (1024, 256) are
    meant for programs that use ``select``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems refuse "unlimited"
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open(file: File) -> int:
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{file.path}: cannot be read: {error.strerror}{way_out(error)}") from error
    return _unchanged(file, descriptor)


def _open_direct(file: File) -> int:
    try:
        descriptor = open_direct(file.path)
    except OSError:
        return -1
    return _unchanged(file, descriptor)


def _load(file: File, load: Callable[[Path], Any]) -> Any:
    loaded = load(file.path)
    os.close(_open(file))  # raises if the path leads to another file by now
    return loaded


def _unchanged(file: File, descriptor: int) -> int:
    """The descriptor. Closes it and raises ``CheckpointError`` if the file has changed."""
    if difference := file.difference(descriptor):
        os.close(descriptor)
        raise CheckpointError(f"{file.path}: {difference} since its header was read; run the merge again")
    return descriptor
