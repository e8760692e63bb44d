"""What an input of a method is: its dtype and shape, and how any run of its elements comes into memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

from merge_engine.dtypes import DType
from merge_engine.storage import ByteRange, File, OpenFiles, Way, as_bytes


class Access(NamedTuple):
    """How a run reads: its open files, the way past or through the page cache, and whether the reader can use bytes
    where the system has them instead of a copy.
    """

    files: OpenFiles
    way: Way
    in_place: bool


class Operand(ABC):
    """An input tensor, as a plan holds it: frozen, hashable and picklable; nothing is open.

    ``dtype`` and ``shape`` are what the method gets. ``label`` names it in messages, ``owner`` the checkpoint or model
    that it belongs to. ``granule`` elements can only be
    had together: a range starts at a multiple of it and ends at one, or with the tensor.
    """

    dtype: DType
    shape: tuple[int, ...]
    owner: str
    granule: int = 1

    @property
    @abstractmethod
    def label(self) -> str:
        """The file and the name in it, or what else tells a user which tensor this is."""

    @property
    def files(self) -> tuple[File, ...]:
        """The files that reading it takes."""
        return ()

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes that one reading of all of it moves."""
        return self.count * self.dtype.bits // 8

    @abstractmethod
    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """Elements [start, start + count) on their way into memory, in row-major order.

        Raises ``CheckpointError`` when a file cannot be opened or has changed.
        """

    def read_into(self, memory: memoryview, start: int, files: OpenFiles) -> None:
        """Fill C-contiguous ``memory`` with elements from ``start`` on.

        Raises ``CheckpointError``, and ``ValueError`` for memory that does not hold whole elements or more of them than
        there are.
        """
        memory = as_bytes(memory)
        count, rest = divmod(memory.nbytes * 8, self.dtype.bits)
        if rest:
            raise ValueError(f"{memory.nbytes} bytes hold no whole number of {self.dtype} elements")
        if start < 0 or start + count > self.count:
            raise ValueError(f"{self.label}: has {self.count} elements, not {count} from {start} on")
        elements = self.range(start, count, Access(files, "cached", in_place=False))
        if elements.length:
            elements.read(memory, 0, elements.length)
        elif count:  # they are in memory
            memory[:] = elements.view(memory)

    def maps(self, access: Access) -> bool:
        """Whether ``range`` answers with memory that is there, or that the system can take back."""
        return False
