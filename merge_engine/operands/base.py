"""The interface of an operand: dtype, shape, and a way to bring any range of its elements into memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

from merge_engine.dtypes import DType
from merge_engine.storage import ByteRange, File, OpenFiles, Way, as_bytes


class Access(NamedTuple):
    """How a run reads: its open files, and the way, through the page cache or past it.

    ``in_place`` says that the reader can use bytes in the page cache, without a copy.
    """

    files: OpenFiles
    way: Way
    in_place: bool


class Operand(ABC):
    """An input tensor in a plan: frozen, hashable and picklable, with no open file.

    ``dtype`` and ``shape`` are those of the tensor that the method gets. ``label`` names it in messages, and
    ``owner`` the checkpoint or model that it belongs to. A range starts at a multiple of ``granule`` elements, and
    ends at a multiple or with the tensor.
    """

    dtype: DType
    shape: tuple[int, ...]
    owner: str
    granule: int = 1

    @property
    @abstractmethod
    def label(self) -> str:
        """A name of the tensor for messages, such as the file and the name in it."""

    @property
    def files(self) -> tuple[File, ...]:
        """The files that hold its bytes."""
        return ()

    @property
    def reads_parts(self) -> bool:
        """Whether a few elements can be read without loading a whole file."""
        return True

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes that are moved to read the whole tensor once."""
        return self.count * self.dtype.bits // 8

    @abstractmethod
    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """The bytes of elements [start, start + count), in row-major order, to be read or used in place.

        Raises ``CheckpointError`` when a file cannot be opened or has changed.
        """

    def read_into(self, memory: memoryview, start: int, files: OpenFiles, way: Way = "cached") -> None:
        """Fill C-contiguous ``memory`` with elements from ``start`` on, in row-major order, read in the given way.

        Raises ``CheckpointError`` when they cannot be read. Raises ``ValueError`` if the memory does not hold a whole
        number of elements, or holds more than there are.
        """
        memory = as_bytes(memory)
        count, rest = divmod(memory.nbytes * 8, self.dtype.bits)
        if rest:
            raise ValueError(f"{memory.nbytes} bytes hold no whole number of {self.dtype} elements")
        if start < 0 or start + count > self.count:
            raise ValueError(f"{self.label}: has {self.count} elements, not {count} from {start} on")
        elements = self.range(start, count, Access(files, way, in_place=False))
        if elements.length:
            elements.read(memory, 0, elements.length)
        elif count:  # they are in memory
            memory[:] = elements.view(memory)

    def maps(self, access: Access) -> bool:
        """Whether ``range`` needs no memory of the run: it uses memory that exists or that the system can take back."""
        return False
