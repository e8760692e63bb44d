"""Operands that are tensors in safetensors files."""

from __future__ import annotations

from dataclasses import dataclass

from merge_engine.dtypes import DType
from merge_engine.operands.base import Access, Operand
from merge_engine.storage import ByteRange, Extent, File, open_range

_SMALL = 1 << 20
"""Tensors of fewer bytes are read through the page cache, which reads ahead: each alone would be a slow request."""


@dataclass(frozen=True, slots=True)
class Stored(Operand):
    """The tensor ``name`` of a safetensors file. ``position`` is its first byte in the file.

    ``owner`` is the checkpoint's path.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: File
    position: int
    owner: str

    @property
    def label(self) -> str:
        """See ``Operand.label``."""
        return f"{self.file.path}: tensor {self.name}"

    @property
    def files(self) -> tuple[File, ...]:
        """See ``Operand.files``."""
        return (self.file,)

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """See ``Operand.range``."""
        way = "cached" if self.stored_bytes < _SMALL else access.way
        return open_range(access.files, self._extent(start, count), way, access.in_place)

    def maps(self, access: Access) -> bool:
        """See ``Operand.maps``."""
        aligned = self.position % max(self.dtype.bits // 8, 1) == 0
        return (
            access.in_place
            and access.way == "cached"
            and aligned
            and access.files.mapping(self.file) is not None
        )

    def _extent(self, start: int, count: int) -> Extent:
        bits = self.dtype.bits
        first = self.position + bits * start // 8
        return Extent(self.file, self.name, first, bits * count // 8, max(bits // 8, 1))


@dataclass(frozen=True, slots=True)
class Unwritten(Stored):
    """A tensor whose file has only its header yet: an earlier merge is going to write its values.

    It is planned with, and equals no other tensor.
    """

    @property
    def reads_parts(self) -> bool:
        """There is nothing to read."""
        return False
