"""Ranges of a file's bytes on their way into memory: mapped, copied out of the page cache, or read past it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from merge_engine._native import Mapping
from merge_engine.errors import CheckpointError
from merge_engine.storage.direct import read_direct, read_pages
from merge_engine.storage.files import File, OpenFiles
from merge_engine.storage.memory import PAGE, aligned

Way = Literal["cached", "direct"]
"""Through the page cache (mapped where the reader can use it in place, else copied), or past it."""

_FAULT = 64 << 10  # bytes that a page fault maps at once: fewer are not worth a call of their own


@dataclass(frozen=True)
class Extent:
    """``nbytes`` bytes of a file from byte ``position`` on, which belong to the tensor ``name``.

    Its elements have ``alignment`` bytes: to be used in place they must lie at a multiple of it.
    """

    file: File
    name: str
    position: int
    nbytes: int
    alignment: int

    def unreadable(self, reason: str | None) -> CheckpointError:
        """The error to raise when the bytes cannot be read."""
        return CheckpointError(f"{self.file.path}: tensor {self.name!r}: cannot be read: {reason}")

    def cut_off(self, end: int) -> CheckpointError:
        """The error to raise when the file ends at byte ``end``, before it should."""
        return CheckpointError(
            f"{self.file.path}: tensor {self.name!r}: the file ended at byte {end}; "
            "it became shorter while it was read"
        )


def open_range(files: OpenFiles, extent: Extent, way: Way, in_place: bool) -> ByteRange:
    """Bytes of a file, to be read in a way, or copied out of the page cache where that way does not work.

    ``in_place``: the reader takes them at any multiple of their alignment, so that nothing need be copied; otherwise
    they lie at the start of the memory. Raises ``CheckpointError`` when the file cannot be opened or has another
    size than it had.
    """
    in_place = in_place and _is_aligned(extent)
    if way == "direct" and (descriptor := files.direct_descriptor(extent.file)) >= 0:
        return DirectRange(extent, descriptor) if in_place else CopiedRange(extent, descriptor, past=True)
    if way == "cached" and in_place and (mapping := files.mapping(extent.file)) is not None:
        return MappedRange(extent, mapping)
    return CopiedRange(extent, files.descriptor(extent.file), past=False)


def maps(files: OpenFiles, extent: Extent) -> bool:
    """Whether ``open_range`` would map the bytes for a reader that can use them in place.

    Raises ``CheckpointError`` as ``open_range`` does.
    """
    return _is_aligned(extent) and files.mapping(extent.file) is not None


class ByteRange(ABC):
    """Bytes of a tensor. ``length`` bytes must be read for it, which takes ``room`` bytes of a ring's memory."""

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
        """Raise ``CheckpointError`` if bytes that were used are not those that the file had."""

    def release(self) -> None:  # noqa: B027
        """Say that the bytes are not needed any more."""


class CopiedRange(ByteRange):
    """Copied out of the page cache, or ``past`` it through a buffer of whole pages."""

    def __init__(self, extent: Extent, descriptor: int, past: bool):
        self.length = self.room = extent.nbytes
        self._extent = extent
        self._descriptor = descriptor
        self._past = past

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        view, position = memory[first:last], self._extent.position + first
        try:
            while view.nbytes:
                if self._past:
                    got = read_direct(self._descriptor, view, position)
                else:
                    got = os.preadv(self._descriptor, [view], position)
                if got == 0:
                    raise self._extent.cut_off(position)
                view, position = view[got:], position + got
        except OSError as error:
            raise self._extent.unreadable(error.strerror) from error


class DirectRange(ByteRange):
    """Whole pages read past the page cache, straight to where they are used."""

    def __init__(self, extent: Extent, descriptor: int):
        self._extent = extent
        self._descriptor = descriptor
        self._before = extent.position % PAGE
        self._needed = self._before + extent.nbytes
        self.length = self.room = aligned(self._needed)

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[self._before : self._needed]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        position = self._extent.position - self._before + first
        needed = min(last, self._needed) - first  # the last page may reach beyond the file
        try:
            got = read_pages(self._descriptor, memory[first:last], position, needed)
        except OSError as error:
            raise self._extent.unreadable(error.strerror) from error
        if got < needed:
            raise self._extent.cut_off(position + got)


class MappedRange(ByteRange):
    """In place: the page cache's own memory, read-only.

    Its pages are asked for before they are used, whether they are there or not: for those that are, this takes as
    long as the page faults that it saves.
    """

    room = 0

    def __init__(self, extent: Extent, mapping: Mapping):
        self.length = extent.nbytes if extent.nbytes > _FAULT else 0
        self._extent = extent
        self._mapping = mapping
        self._end = extent.position + extent.nbytes

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return self._mapping.view(self._extent.position, self._end)

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        try:
            self._mapping.load(self._extent.position + first, self._extent.position + last)
        except OSError as error:
            raise self._lost() from error

    def verify(self) -> None:
        """See ``ByteRange.verify``."""
        if self._mapping.truncated:
            raise self._lost()

    def release(self) -> None:
        """See ``ByteRange.release``."""
        self._mapping.release(self._extent.position, self._end)

    def _lost(self) -> CheckpointError:
        """Why pages cannot be had: the file ends before them, or the disk fails."""
        size = File.of(self._extent.file.path).size
        return (
            self._extent.cut_off(size)
            if size < self._extent.file.size
            else self._extent.unreadable("the disk failed")
        )


def _is_aligned(extent: Extent) -> bool:
    return extent.position % extent.alignment == 0
