"""What backends measure, as data: answers can be merged in any order, kept, and sent to another process.

Counts are integers, and floats are summed over fixed blocks in a fixed order, so an answer depends neither on how
a tensor was cut into chunks nor on which device, process or machine measured each of them.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import pairwise
from operator import add, attrgetter
from typing import NamedTuple

import merge_engine._native as _native
from merge_engine.backends.operations import Chunk, Found, Line
from merge_engine.dtypes import DType

SUM_BLOCK = 4096
"""Sums run over blocks of this many elements: chunks start at multiples of it."""

WHOLE = Line(0, 1)
"""What stands for the whole tensor in native code where it takes a line."""
SUM_LANES = 64
"""Running sums of a block."""

FIRST_BITS, NEXT_BITS = 15, 16
"""Bits of a key that the first and each following level of counting resolve."""


def levels(working: DType) -> int:
    """Passes of counting that find a key exactly: 1 for 16-bit dtypes, 2 for float32, 4 for float64."""
    return working.bits // NEXT_BITS


def level_shift(working: DType, level: int) -> int:
    """How far a key is shifted right to give its bin (and the prefix above the bin) at a level."""
    return working.bits - 1 - FIRST_BITS - level * NEXT_BITS


def level_bins(level: int) -> int:
    """Bins of a table of counts at a level."""
    return 1 << (NEXT_BITS if level else FIRST_BITS)


def sum_block(line: Line | None) -> int:
    """Elements of a block that sums of such lines run over (docs/arithmetic.md, step 11); None: of a whole tensor."""
    return _native.sum_block(line or WHOLE)


def lines_of_block(line: Line | None) -> int:
    """The largest number of lines that a block has elements of."""
    return _native.lines_of_block(line or WHOLE)


def gram_columns(chunk: Chunk, of_deltas: bool, line: Line | None) -> int:
    """Sums of each block of a Gram matrix: those of all pairs, for each line that a block has elements of."""
    vectors = len(chunk.models) if of_deltas else len(chunk.inputs)
    return lines_of_block(line) * (vectors * (vectors + 1) // 2)


class Run(NamedTuple):
    """Sums of consecutive blocks, the first of which is block ``first``: [blocks, columns] float64 by rows."""

    first: int
    sums: array[float]


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Float64 sums over blocks of elements of a tensor (see ``sum_block``): ``columns`` sums for each block.

    Sums of lines have ``lines_of_block`` groups of columns: those of the lines that the block has elements of, in
    order.

    ``runs`` ascend, do not overlap, and are never empty. Equal when they hold the same sums of the same blocks.
    """

    columns: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, start: int, columns: int, sums: array[float], block: int = SUM_BLOCK) -> BlockSums:
        """The sums of a chunk that begins at element ``start``, [blocks, columns] by rows; blocks of so many elements.

        Raises ``ValueError`` for a start inside a block.
        """
        first, inside = divmod(start, block)
        if inside:
            raise ValueError(f"sums of a chunk at element {start}, which is inside a block of {block}")
        return cls(columns, (Run(first, sums),) if sums else ())

    def merge(self, other: BlockSums) -> BlockSums:
        """The sums of both. Raises ``ValueError`` when both have the same block, or other columns."""
        if self.columns != other.columns:
            raise ValueError(f"{self.columns} columns of sums cannot be merged with {other.columns}")
        runs = sorted(self.runs + other.runs, key=attrgetter("first"))
        for run, following in pairwise(runs):
            if self._end(run) > following.first:
                raise ValueError(f"block {following.first} of a sum came twice")
        return BlockSums(self.columns, tuple(runs))

    def totals(self) -> list[float]:
        """One total for each column: its block sums added in order (docs/arithmetic.md, step 11).

        Raises ``ValueError`` when blocks between the first and the last are missing.
        """
        totals = array("d", bytes(8 * self.columns))
        for i, run in enumerate(self.runs):
            if i and self._end(self.runs[i - 1]) != run.first:
                raise ValueError(f"the blocks of a sum before block {run.first} are missing")
            _native.add_in_order(sums=run.sums, totals=totals)
        return totals.tolist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockSums):
            return NotImplemented
        return self.columns == other.columns and self._joined() == other._joined()

    def _end(self, run: Run) -> int:
        return run.first + len(run.sums) // self.columns

    def _joined(self) -> list[Run]:
        """The runs, adjacent ones made one."""
        joined: list[Run] = []
        for run in self.runs:
            if joined and self._end(joined[-1]) == run.first:
                joined[-1] = Run(joined[-1].first, joined[-1].sums + run.sums)
            else:
                joined.append(run)
        return joined


class LineTotals:
    """Totals of the lines of a tensor of ``count`` elements: the sums of their parts in each block, added in order.

    ``values``: [lines, columns] float64 by rows. Only the totals are kept, so the blocks must come in order.
    """

    def __init__(self, line: Line, count: int, columns: int):
        self.values = array("d", bytes(8 * columns * (count // line.length)))
        self._line = line
        self._columns = columns
        self._next = 0  # block

    def add(self, sums: BlockSums) -> None:
        """Add the sums of the blocks that follow those that were added.

        Raises ``ValueError`` for other blocks.
        """
        for run in sums.runs:
            if run.first != self._next:
                raise ValueError(f"block {run.first} of a sum came where block {self._next} was expected")
            self._next += len(run.sums) // sums.columns
            if self._line.stride > 1:
                _native.add_in_order(sums=run.sums, totals=self.values)
            else:
                _native.add_to_lines(
                    sums=run.sums,
                    first_block=run.first,
                    line=self._line,
                    columns=self._columns,
                    totals=self.values,
                )


@dataclass(frozen=True)
class KeyTable:
    """How often the magnitude keys of a level occur, by their bits that the level resolves.

    ``counts``: [level_bins(level)] uint64. Below level 0 only keys were counted whose bits above are ``within``,
    which is None at level 0.
    """

    level: int
    within: int | None
    counts: array[int]

    def merge(self, other: KeyTable) -> KeyTable:
        """The counts of both. Raises ``ValueError`` when they are about different keys."""
        if (self.level, self.within) != (other.level, other.within):
            raise ValueError("tables of different keys cannot be merged")
        return KeyTable(self.level, self.within, array("Q", map(add, self.counts, other.counts)))

    def find(self, rank: int, within: Found | None = None) -> Found:
        """The ``rank``-th largest key, from 1; ``within`` is what was found for it one level above.

        Raises ``IndexError`` for a rank that no key has.
        """
        if (None if within is None else within.key) != self.within:
            raise ValueError("this table counts other keys than those that the rank lies among")
        found = _native.find_in_counts(counts=self.counts, level=self.level, within=within, rank=rank)
        return Found(found.key, found.above, found.equal)
