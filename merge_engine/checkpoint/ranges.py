"""Ranges of a tensor's bytes on their way into memory: copied out of the page cache, past it, or mapped from it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from merge_engine.checkpoint.header import TensorInfo
from merge_engine.errors import CheckpointError
from merge_engine.storage.direct import read_pages
from merge_engine.storage.memory import PAGE

if TYPE_CHECKING:
    from merge_engine._native import Mapping as NativeMapping
    from merge_engine.checkpoint.source import Checkpoint

Way = Literal["read", "direct", "mapped", "present"]
"""Copied out of the page cache; from storage past it; in place, brought into the page cache; in place, being there."""

_FAULT = 64 << 10  # bytes that a page fault maps at once: less is not worth a call of its own


def became_shorter(file: Path, name: str, position: int) -> CheckpointError:
    """What to say when a file has less than its header promised."""
    return CheckpointError(
        f"{file}: tensor {name!r}: the file ended at byte {position}; it became shorter while it was read"
    )


class TensorRange(ABC):
    """Bytes [offset, offset + nbytes) of a tensor.

    ``length`` bytes must be read for it, and ``room`` is what it takes of a ring, which is whole pages.
    """

    length: int
    room: int

    @abstractmethod
    def view(self, memory: memoryview) -> memoryview:
        """Where the bytes will be, given ``room`` bytes of memory from the start of a page on."""

    @abstractmethod
    def read(self, memory: memoryview, first: int, last: int) -> None:
        """Bring bytes [first, last) of the length there; both are whole pages, or the end. Thread-safe.

        Raises ``CheckpointError``.
        """

    def verify(self) -> None:  # noqa: B027
        """Raise ``CheckpointError`` if what was used so far turned out not to be what the file holds."""

    def release(self) -> None:  # noqa: B027
        """The bytes are not needed any more."""


class CopiedRange(TensorRange):
    """Read into memory by ``Checkpoint.read_into``."""

    def __init__(self, checkpoint: Checkpoint, name: str, offset: int, nbytes: int, past: bool = False):
        self.length = self.room = nbytes
        self._checkpoint = checkpoint
        self._name = name
        self._offset = offset
        self._past = past

    def view(self, memory: memoryview) -> memoryview:
        """See ``TensorRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``TensorRange.read``."""
        self._checkpoint.read_into(self._name, self._offset + first, memory[first:last], self._past)


class DirectRange(TensorRange):
    """Whole pages read past the page cache, straight to where they are used."""

    def __init__(self, descriptor: int, file: Path, info: TensorInfo, offset: int, nbytes: int):
        position = info.start + offset
        self._before = position % PAGE
        self.length = self.room = -(-(self._before + nbytes) // PAGE) * PAGE
        self._first = position - self._before
        self._nbytes = nbytes
        self._descriptor = descriptor
        self._file = file
        self._name = info.name

    def view(self, memory: memoryview) -> memoryview:
        """See ``TensorRange.view``."""
        return memory[self._before : self._before + self._nbytes]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``TensorRange.read``."""
        needed = min(last, self._before + self._nbytes) - first  # the last page may reach beyond the file
        try:
            got = read_pages(self._descriptor, memory[first:last], self._first + first, needed)
        except OSError as error:
            raise CheckpointError(
                f"{self._file}: tensor {self._name!r}: cannot be read: {error.strerror}"
            ) from error
        if got < needed:
            raise became_shorter(self._file, self._name, self._first + first + got)


class MappedRange(TensorRange):
    """In place: the page cache's own memory, read-only."""

    room = 0

    def __init__(
        self, mapping: NativeMapping, file: Path, info: TensorInfo, offset: int, nbytes: int, present: bool
    ):
        self.length = nbytes if nbytes > _FAULT and not present else 0
        self._nbytes = nbytes
        self._mapping = mapping
        self._file = file
        self._info = info
        self._first = info.start + offset

    def view(self, memory: memoryview) -> memoryview:
        """See ``TensorRange.view``."""
        return self._mapping.view(self._first, self._first + self._nbytes)

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``TensorRange.read``."""
        try:
            self._mapping.load(self._first + first, self._first + last)
        except OSError as error:
            raise self._lost() from error

    def verify(self) -> None:
        """See ``TensorRange.verify``."""
        if self._mapping.torn:
            raise self._lost()

    def release(self) -> None:
        """See ``TensorRange.release``."""
        self._mapping.release(self._first, self._first + self._nbytes)

    def _lost(self) -> CheckpointError:
        """Why pages cannot be had: the file ends before them, or the disk fails."""
        size = os.stat(self._file).st_size  # noqa: PTH116
        if size < self._info.start + self._info.nbytes:
            return became_shorter(self._file, self._info.name, size)
        return CheckpointError(f"{self._file}: tensor {self._info.name!r}: cannot be read: the disk failed")
