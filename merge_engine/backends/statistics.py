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
from merge_engine.backends.operations import Found
from merge_engine.dtypes import DType

SUM_BLOCK = 4096
"""Sums run over blocks of this many elements: chunks start at multiples of it."""

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


class Run(NamedTuple):
    """Sums of consecutive blocks, the first of which is block ``first``: [blocks, columns] float64 by rows."""

    first: int
    sums: array[float]


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Float64 sums over blocks of ``SUM_BLOCK`` elements of a tensor: ``columns`` sums for each block.

    ``runs`` ascend, do not overlap, and are never empty. Equal when they hold the same sums of the same blocks.
    """

    columns: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, start: int, columns: int, sums: array[float]) -> BlockSums:
        """The sums of a chunk that begins at element ``start``, [blocks, columns] by rows.

        Raises ``ValueError`` for a start inside a block.
        """
        first, inside = divmod(start, SUM_BLOCK)
        if inside:
            raise ValueError(f"sums of a chunk at element {start}, which is inside a block of {SUM_BLOCK}")
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


@dataclass(frozen=True)
class KeyPlaces:
    """How many elements of each piece of a tensor have a key: (flat index of the piece's first, count), ascending."""

    pieces: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, start: int, count: int) -> KeyPlaces:
        """Those of a piece that begins at element ``start``."""
        return cls(((start, count),))

    @property
    def total(self) -> int:
        """How many elements have the key."""
        return sum(count for _, count in self.pieces)

    def merge(self, other: KeyPlaces) -> KeyPlaces:
        """The pieces of both. Raises ``ValueError`` when both have the same."""
        pieces = sorted(self.pieces + other.pieces)
        for (start, _), (following, _) in pairwise(pieces):
            if start == following:
                raise ValueError(f"the piece at element {start} came twice")
        return KeyPlaces(tuple(pieces))

    def piece_of(self, nth: int) -> tuple[int, int]:
        """In which piece the ``nth`` element with the key is, from 0: its start, and the place among its own.

        Raises ``IndexError`` when there are not so many.
        """
        before = nth
        for start, count in self.pieces:
            if before < count:
                return start, before
            before -= count
        raise IndexError(f"{self.total} elements have the key, and none is number {nth}")
