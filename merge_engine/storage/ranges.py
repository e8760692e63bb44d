"""Ranges of a file's bytes: read past the page cache, mapped from it, or copied out of it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import merge_engine._native as native
from merge_engine.errors import CheckpointError
from merge_engine.storage.direct import read_direct, read_pages
from merge_engine.storage.files import File, OpenFiles
from merge_engine.storage.memory import PAGE, aligned

if TYPE_CHECKING:
    from merge_engine._native import Mapping as NativeMapping

Way = Literal["cached", "direct"]
"""``cached``: through the page cache, where bytes can be used in place. ``direct``: past it."""

FAULT = 64 << 10
"""Bytes that one page fault maps: a range of at most so many is not loaded before its use."""


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes of a tensor in a file, from byte ``position`` of the file on.

    ``name`` is the tensor's, for messages. Bytes are used in place only if ``position`` is a multiple of
    ``alignment``, the size of an element.
    """

    file: File
    name: str
    position: int
    nbytes: int
    alignment: int = 1


class ByteRange(ABC):
    """Bytes of an input, to be brought into memory.

    ``length`` bytes must be read to get them. ``room`` is the number of bytes that they take in a ring.
    """

    length: int
    room: int

    @abstractmethod
    def view(self, memory: memoryview) -> memoryview:
        """The memory where the bytes are after ``read``: a part of ``memory``, or memory of their own.

        ``memory`` has at least ``room`` bytes and starts on a page.
        """

    @abstractmethod
    def read(self, memory: memoryview, first: int, last: int) -> None:
        """Read bytes [first, last) of ``length`` into ``memory``. Thread-safe.

        ``first`` and ``last`` are multiples of the page size, or ``last`` is the end. Raises ``CheckpointError``.
        """

    def verify(self) -> None:  # noqa: B027
        """Raise ``CheckpointError`` if bytes that were used so far are not those of the file."""

    def release(self) -> None:  # noqa: B027
        """The bytes are not needed any more."""


def open_range(files: OpenFiles, extent: Extent, way: Way, in_place: bool) -> ByteRange:
    """Bytes of a file, to be read in the given way, or copied through the page cache if that way does not work.

    ``in_place``: the reader can use bytes at any multiple of the alignment, not only from the start of a page. Raises
    ``CheckpointError`` if the file cannot be opened or has changed.
    """
    in_place = in_place and extent.position % extent.alignment == 0
    if way == "direct" and (direct := files.direct_descriptor(extent.file)) >= 0:
        return _DirectRange(direct, extent) if in_place else _BouncedRange(direct, extent)
    if in_place and (mapping := files.mapping(extent.file)) is not None:
        return _MappedRange(mapping, extent)
    return _CopiedRange(files.descriptor(extent.file), extent)


class RowRuns(NamedTuple):
    """Runs of rows: run i begins at row ``firsts[i]``, and comes from row ``starts[i]`` on of ``sources[i]``."""

    rows: int
    firsts: array[int]
    sources: array[int]
    starts: array[int]


def read_rows(
    files: OpenFiles,
    matrix: Extent,
    row_bytes: int,
    runs: RowRuns,
    source: int,
    begin: int,
    memory: memoryview,
) -> None:
    """Copy the rows of one source out of the page cache, to where they are in ``memory``.

    ``matrix`` has the source's rows. ``memory`` begins with byte ``begin`` of all runs. Raises ``CheckpointError``.
    """
    descriptor, (rows, firsts, sources, starts) = files.descriptor(matrix.file), runs
    try:
        ended = native.read_rows(
            descriptor, matrix.position, row_bytes, firsts, sources, starts, rows, source, begin, memory
        )
    except OSError as error:
        raise _unreadable(matrix, error.strerror) from error
    if ended:
        raise _became_shorter(matrix, ended)


class _CopiedRange(ByteRange):
    """A copy out of the page cache."""

    def __init__(self, descriptor: int, extent: Extent):
        self.length = self.room = extent.nbytes
        self._descriptor = descriptor
        self._extent = extent

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        view, position = memory[first:last], self._extent.position + first
        while view.nbytes:
            try:
                got = self._read_some(view, position)
            except OSError as error:
                raise _unreadable(self._extent, error.strerror) from error
            if got == 0:
                raise _became_shorter(self._extent, position)
            view, position = view[got:], position + got

    def _read_some(self, view: memoryview, position: int) -> int:
        return os.preadv(self._descriptor, [view], position)


class _BouncedRange(_CopiedRange):
    """Read past the page cache into a buffer of whole pages, and copied from there."""

    def _read_some(self, view: memoryview, position: int) -> int:
        return read_direct(self._descriptor, view, position)


class _DirectRange(ByteRange):
    """Whole pages read past the page cache, straight to where they are used."""

    def __init__(self, descriptor: int, extent: Extent):
        self._before = extent.position % PAGE
        self._needed = self._before + extent.nbytes
        self.length = self.room = aligned(self._needed)
        self._descriptor = descriptor
        self._extent = extent

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
            raise _unreadable(self._extent, error.strerror) from error
        if got < needed:
            raise _became_shorter(self._extent, position + got)


class _MappedRange(ByteRange):
    """Used in place: the page cache's own memory, read-only."""

    room = 0

    def __init__(self, mapping: NativeMapping, extent: Extent):
        self.length = extent.nbytes if extent.nbytes > FAULT else 0
        self._mapping = mapping
        self._extent = extent

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return self._mapping.view(self._extent.position, self._extent.position + self._extent.nbytes)

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        try:
            self._mapping.load(self._extent.position + first, self._extent.position + last)
        except OSError as error:
            raise self._lost() from error

    def verify(self) -> None:
        """See ``ByteRange.verify``."""
        if self._mapping.torn:
            raise self._lost()

    def release(self) -> None:
        """See ``ByteRange.release``."""
        self._mapping.release(self._extent.position, self._extent.position + self._extent.nbytes)

    def _lost(self) -> CheckpointError:
        """The error for pages that are missing: the file ends before them, or the disk fails."""
        size = File.of(self._extent.file.path).size
        if size < self._extent.file.size:
            return _became_shorter(self._extent, size)
        return _unreadable(self._extent, "the disk failed")


def _unreadable(extent: Extent, reason: str | None) -> CheckpointError:
    return CheckpointError(f"{extent.file.path}: tensor {extent.name!r}: cannot be read: {reason}")


def _became_shorter(extent: Extent, position: int) -> CheckpointError:
    return CheckpointError(
        f"{extent.file.path}: tensor {extent.name!r}: the file ended at byte {position}; it became shorter while it "
        "was read"
    )
