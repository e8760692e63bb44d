"""Operands that are a tensor with a LoRA put into it, computed while they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import merge_engine._native as native
from merge_engine.dtypes import DType
from merge_engine.operands.base import Access, Operand
from merge_engine.storage import ByteRange, File, OpenFiles

_PIECE = 1 << 20
"""Bytes of the base, or of the factors of its rows, at a time: they stay in the processor's cache."""

_ROWS = 32
"""Rows that are computed at a time at least: the factors of the columns are widened anew for each such piece."""

_KERNELS = native.Kernels(native.instruction_set(), 1)


@dataclass(frozen=True, slots=True)
class LowRank(Operand):
    """``base + scale * (b @ a)``, rounded once to the base's dtype (docs/arithmetic.md, "LoRA adapters").

    ``base`` is a matrix [out, in], ``a`` [rank, in], ``b`` [out, rank]. ``transposed``: the base is [in, out], and the
    product is transposed. All have dtypes that can be merged. A range is computed by the thread that reads it, in the
    memory where it is used, at 2 * rank operations for each element. Of the factors, those of the range's rows and all
    of its columns are read each time: in place, or as copies where their file cannot be mapped.
    """

    base: Operand
    a: Operand
    b: Operand
    scale: float
    owner: str
    transposed: bool = False
    dtype: DType = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.base.dtype)
        object.__setattr__(self, "shape", self.base.shape)

    @property
    def label(self) -> str:
        """See ``Operand.label``."""
        return f"{self.base.label} with the LoRA of {self.a.owner}"

    @property
    def files(self) -> tuple[File, ...]:
        """See ``Operand.files``."""
        return tuple(dict.fromkeys((*self.base.files, *self.a.files, *self.b.files)))

    @property
    def stored_bytes(self) -> int:
        """Those of the base: the factors are small, and stay in the page cache."""
        return self.base.stored_bytes

    @property
    def reads_parts(self) -> bool:
        """See ``Operand.reads_parts``."""
        return self.base.reads_parts and self.a.reads_parts and self.b.reads_parts

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """See ``Operand.range``."""
        return _Sum(self, start, count, access)


class _Sum(ByteRange):
    """Elements of the base, read to where they are used, and the product added to them there."""

    def __init__(self, operand: LowRank, start: int, count: int, access: Access):
        self._operand = operand
        self._start = start
        self._access = access
        self.length = self.room = count * operand.dtype.itemsize

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        operand, access = self._operand, self._access
        size, width, rank = operand.dtype.itemsize, operand.shape[1], operand.a.shape[0]
        factors = _Factors(operand, access.files)
        step = max(_PIECE // (size * max(width, rank)), _ROWS) * width
        for at in range(first // size, last // size, step):
            piece = memory[at * size : min((at + step) * size, last)]
            operand.base.read_into(piece, self._start + at, access.files, access.way)
            factors.add_to(piece, self._start + at)
        factors.verify()


class _Factors:
    """The factors of an operand: those of all columns, and those of the rows that are asked for."""

    def __init__(self, operand: LowRank, files: OpenFiles):
        self._operand = operand
        self._files = files
        self._read: list[ByteRange] = []
        self._rows, self._columns = (operand.a, operand.b) if operand.transposed else (operand.b, operand.a)
        self._of_columns = _array(self._load(self._columns, 0, self._columns.count), self._columns.dtype)

    def add_to(self, values: memoryview, start: int) -> None:
        """Add the product to elements of the base, from ``start`` on, in place."""
        operand, width = self._operand, self._operand.shape[1]
        last = start + len(values) // operand.dtype.itemsize - 1
        row = start // width
        _KERNELS.add_low_rank(
            values=_array(values, operand.dtype),
            rows=_array(self._of_rows(row, last // width + 1 - row), self._rows.dtype),
            columns=self._of_columns,
            rank=operand.a.shape[0],
            width=width,
            first=start - row * width,
            transposed=operand.transposed,
            scale=operand.scale,
        )

    def verify(self) -> None:
        """Raise ``CheckpointError`` if the factors were not those of their files."""
        for each in self._read:
            each.verify()

    def _of_rows(self, row: int, count: int) -> memoryview:
        rank = self._operand.a.shape[0]
        if not self._operand.transposed:
            return self._load(self._rows, row * rank, count * rank)
        every = self._rows.shape[1]
        return memoryview(b"".join(self._load(self._rows, k * every + row, count) for k in range(rank)))

    def _load(self, factor: Operand, start: int, count: int) -> memoryview:
        """Elements of a factor: in place, or a copy where its file cannot be mapped."""
        found = factor.range(start, count, Access(self._files, "cached", in_place=True))
        memory = memoryview(bytearray(found.room))
        if found.length:
            found.read(memory, 0, found.length)
        self._read.append(found)
        return found.view(memory)


def _array(memory: memoryview, dtype: DType) -> native.HostArray:
    return native.HostArray(memory, getattr(native.DType, dtype.code))
