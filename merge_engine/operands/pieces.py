"""Operands that are pieces of other tensors, or several tensors as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from merge_engine.dtypes import DType
from merge_engine.operands.base import Access, Operand
from merge_engine.storage import ByteRange, File


@dataclass(frozen=True)
class Part(Operand):
    """Elements of ``whole`` from the flat index ``first`` on, as a tensor of ``shape``."""

    whole: Operand
    first: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        """That of the whole."""
        return self.whole.dtype

    @property
    def owner(self) -> str:  # type: ignore[override]
        """That of the whole."""
        return self.whole.owner

    @property
    def label(self) -> str:
        """See ``Operand.label``."""
        return f"{self.whole.label}, elements from {self.first} on"

    @property
    def files(self) -> tuple[File, ...]:
        """See ``Operand.files``."""
        return self.whole.files

    @property
    def reads_parts(self) -> bool:
        """See ``Operand.reads_parts``."""
        return self.whole.reads_parts

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """See ``Operand.range``."""
        return self.whole.range(self.first + start, count, access)

    def maps(self, access: Access) -> bool:
        """See ``Operand.maps``."""
        return self.whole.maps(access)


@dataclass(frozen=True)
class Joined(Operand):
    """Tensors of one dtype, with elements of whole bytes, one after the other, as a tensor of ``shape``."""

    parts: tuple[Operand, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        """That of all parts."""
        return self.parts[0].dtype

    @property
    def owner(self) -> str:  # type: ignore[override]
        """That of all parts."""
        return self.parts[0].owner

    @property
    def label(self) -> str:
        """See ``Operand.label``."""
        return f"{self.parts[0].label} and {len(self.parts) - 1} more"

    @cached_property
    def files(self) -> tuple[File, ...]:
        """See ``Operand.files``."""
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files))

    @property
    def reads_parts(self) -> bool:
        """See ``Operand.reads_parts``."""
        return all(part.reads_parts for part in self.parts)

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """See ``Operand.range``."""
        return _JoinedRange(self, start, count, access)

    def within(self, start: int, count: int) -> Iterator[tuple[Operand, int, int]]:
        """The parts that hold elements [start, start + count): each with its first one that counts, and how many do."""
        for part in self.parts:
            taken = min(part.count - start, count)
            if taken > 0:
                yield part, start, taken
                start, count = 0, count - taken
            else:
                start -= part.count
            if not count:
                return


class _JoinedRange(ByteRange):
    """Copies of the parts, side by side."""

    def __init__(self, joined: Joined, start: int, count: int, access: Access):
        self.length = self.room = count * joined.dtype.itemsize
        self._joined, self._start, self._access = joined, start, access

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        size = self._joined.dtype.itemsize
        at = first
        for part, start, count in self._joined.within(self._start + first // size, (last - first) // size):
            end = at + count * size
            part.read_into(memory[at:end], start, self._access.files, self._access.way)
            at = end
