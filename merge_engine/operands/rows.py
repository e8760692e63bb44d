"""Operands whose rows are gathered from others: embeddings and heads of models with different vocabularies."""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, TypeAlias

import merge_engine._native as native
from merge_engine.dtypes import DType, promote
from merge_engine.operands.base import Access, Operand
from merge_engine.operands.stored import Stored
from merge_engine.storage import ByteRange, File, OpenFiles, RowRuns, Way, read_rows

ZERO, MEAN, AVERAGE = -1, -2, -3
"""In place of an operand: a row of zeros, the mean of all rows of an operand, the mean of single rows of operands."""

RowSource: TypeAlias = "tuple[int, int | tuple[tuple[int, int], ...]]"
"""Where a row comes from: an operand's number with a row of it, ``ZERO`` with 0, ``MEAN`` with an operand's number, or
``AVERAGE`` with pairs of an operand's number and a row."""

_SMALL = 1 << 20
"""Bytes of a run that is long enough to be read like a whole tensor, past the page cache where the run does so."""

_PIECE = 1 << 16
"""Elements that are computed at a time."""


@dataclass(frozen=True, eq=False)
class RowMap:
    """The source of each of ``rows`` rows, as runs of rows that lie one after the other in their sources too.

    Run i begins at row ``firsts[i]``. Its source is ``sources[i]`` from ``starts[i]`` on: a row of an operand, or what
    stands for one (see ``RowSource``); for ``AVERAGE`` ``starts[i]`` is the place in ``averages``. ``stepwise`` rounds
    averages to the dtype after each step, as mergekit does.
    """

    rows: int
    firsts: array[int]
    sources: array[int]
    starts: array[int]
    averages: tuple[tuple[tuple[int, int], ...], ...] = ()
    stepwise: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowMap) and (self is other or self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def of(cls, own: Sequence[int], others: Mapping[int, RowSource], stepwise: bool = False) -> RowMap:
        """The map in which row i is row ``own[i]`` of the first operand, or comes from ``others[i]``."""
        firsts, kinds, starts = array("q"), array("q"), array("q")
        averages: list[tuple[tuple[int, int], ...]] = []
        next_own, last = -1, None
        for row, there in enumerate(own):
            source = others.get(row) if others else None
            if source is None:
                if there != next_own:
                    firsts.append(row)
                    kinds.append(0)
                    starts.append(there)
                next_own, last = there + 1, None
                continue
            if source != last:
                kind, start = source
                if isinstance(start, tuple):
                    averages.append(start)
                    start = len(averages) - 1
                firsts.append(row)
                kinds.append(kind)
                starts.append(start)
            next_own, last = -1, _next(source)
        return cls(len(own), firsts, kinds, starts, tuple(averages), stepwise)

    @classmethod
    def of_runs(cls, rows: int, runs: Sequence[tuple[int, int, int]]) -> RowMap:
        """The map for runs, each as its first row, its source and where it begins there."""
        firsts, sources, starts = (array("q", numbers) for numbers in zip(*runs, strict=True))
        return cls(rows, firsts, sources, starts)

    @property
    def is_identity(self) -> bool:
        """Whether all rows are the first ones of the first operand, in order."""
        return len(self.firsts) == 1 and self.sources[0] == 0 and self.starts[0] == 0

    @cached_property
    def used(self) -> frozenset[int]:
        """The numbers of the operands that rows come from."""
        kinds = list(zip(self.sources, self.starts, strict=True))
        means = (start for kind, start in kinds if kind == MEAN)
        return frozenset(
            (*means, *(k for k, _ in kinds if k >= 0), *(k for a in self.averages for k, _ in a))
        )

    @property
    def runs(self) -> RowRuns:
        """The runs for native code."""
        return RowRuns(self.rows, self.firsts, self.sources, self.starts)

    @cached_property
    def numbers(self) -> frozenset[int]:
        """All sources: numbers of operands, and what stands for one."""
        return frozenset(self.sources)

    @cached_property
    def digest(self) -> str:
        """BLAKE2b (hex) over the whole map."""
        held = (self.firsts.tobytes(), self.sources.tobytes(), self.starts.tobytes())
        described = repr((self.rows, self.averages, self.stepwise)).encode()
        return hashlib.blake2b(b"".join((*held, described)), digest_size=16).hexdigest()


class _Run(NamedTuple):
    """A part of a run, in elements: where it begins in the result, how many there are, and where in the source."""

    first: int
    elements: int
    source: int
    start: int
    skipped: int


@dataclass(frozen=True)
class Rows(Operand):
    """A tensor whose rows along dimension 0 come from ``operands``, the first of which is the model's own.

    All operands have the same shape but for the number of rows, and mergeable dtypes. The dtype is the promoted one of
    all operands that rows come from. Means are computed in float64, in order, and rounded once (docs/arithmetic.md,
    step 26).
    """

    operands: tuple[Operand, ...]
    map: RowMap
    dtype: DType
    shape: tuple[int, ...]
    owner: str

    @classmethod
    def of(cls, operands: Sequence[Operand], rows: RowMap) -> Rows:
        """The operand for a map over these operands."""
        own = operands[0]
        dtype = promote(*(operands[i].dtype for i in rows.used)) if rows.used else own.dtype
        return cls(tuple(operands), rows, dtype, (rows.rows, *own.shape[1:]), own.owner)

    @property
    def label(self) -> str:
        """See ``Operand.label``."""
        return self.operands[0].label

    @cached_property
    def identity(self) -> str:
        """See ``Operand.identity``."""
        others = (self.operands[k].identity for k in sorted(self.map.used))
        return f"{self.label} rows {self.map.digest} of {list(others)}"

    @property
    def reads_parts(self) -> bool:
        """See ``Operand.reads_parts``."""
        return all(each.reads_parts for each in self._used)

    @property
    def files(self) -> tuple[File, ...]:
        """See ``Operand.files``."""
        return tuple(dict.fromkeys(file for operand in self._used for file in operand.files))

    def range(self, start: int, count: int, access: Access) -> ByteRange:
        """See ``Operand.range``."""
        return _Gathered(self, start, count, access)

    def fill(self, memory: memoryview, start: int, files: OpenFiles, way: Way) -> None:
        """Fill C-contiguous ``memory`` with elements from ``start`` on. Raises ``CheckpointError``."""
        size = self.dtype.itemsize
        gathered = self._gathered
        for source in gathered:
            operand = self.operands[source]
            assert isinstance(operand, Stored)
            extent = operand.extent(0, operand.count)
            read_rows(files, extent, self._width * size, self.map.runs, source, start * size, memory)
        if gathered == self.map.numbers:
            return
        for first, count, source, at, skipped in self._runs(start, len(memory) // size):
            target = memory[(first - start) * size : (first - start + count) * size]
            if source in gathered:
                continue
            if source >= 0:
                operand, begin = self.operands[source], at * self._width + skipped
                if operand.dtype == self.dtype:
                    operand.read_into(target, begin, files, way)
                else:
                    self._average(((source, begin),), target, files, way)
            elif source == ZERO:
                target[:] = bytes(len(target))
            elif source == MEAN:
                self._repeat(self._mean(self.operands[at], files, way), skipped, target)
            else:
                of = tuple((k, row * self._width + skipped) for k, row in self.map.averages[at])
                self._average(of, target, files, way)

    @cached_property
    def _gathered(self) -> frozenset[int]:
        """The operands whose rows are in many short runs, which one call gathers through the page cache."""
        if self.count * self.dtype.itemsize >= len(self.map.firsts) * _SMALL or not self._width:
            return frozenset()
        return frozenset(
            k
            for k in self.map.numbers
            if k >= 0 and isinstance(self.operands[k], Stored) and self.operands[k].dtype == self.dtype
        )

    @property
    def _used(self) -> list[Operand]:
        return [self.operands[i] for i in sorted(self.map.used | {0})]

    @cached_property
    def _width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    def _runs(self, start: int, count: int) -> Iterator[_Run]:
        """The runs that elements [start, start + count) are in, each cut to that."""
        width, firsts = self._width, self.map.firsts
        i = bisect_right(firsts, start // width) - 1 if count else len(firsts)
        end = start + count
        while i < len(firsts) and firsts[i] * width < end:
            following = firsts[i + 1] if i + 1 < len(firsts) else self.map.rows
            first, last = max(firsts[i] * width, start), min(following * width, end)
            yield _Run(
                first, last - first, self.map.sources[i], self.map.starts[i], first - firsts[i] * width
            )
            i += 1

    def _repeat(self, row: bytes, skipped: int, target: memoryview) -> None:
        """Fill memory with the same row again and again, from element ``skipped`` of it on."""
        at = skipped * self.dtype.itemsize % len(row)
        done = 0
        while done < len(target):
            part = row[at : at + len(target) - done]
            target[done : done + len(part)] = part
            done, at = done + len(part), 0

    def _mean(self, operand: Operand, files: OpenFiles, way: Way) -> bytes:
        """The mean of all rows of an operand, which is computed once for all threads that read."""
        made: bytes = files.remembered(
            ("mean row", operand, self.dtype), partial(self._mean_row, operand, files, way)
        )
        return made

    def _mean_row(self, operand: Operand, files: OpenFiles, way: Way) -> bytes:
        sums, rows = array("d", [-0.0]) * self._width, operand.shape[0]
        step = max(_SMALL // (self._width * operand.dtype.itemsize), 1)
        memory = memoryview(bytearray(min(step, rows) * self._width * operand.dtype.itemsize))
        for first in range(0, rows, step):
            held = memory[: min(step, rows - first) * self._width * operand.dtype.itemsize]
            operand.read_into(held, first * self._width, files, way)
            native.add_rows(native.HostArray(held, _native(operand.dtype)), sums)
        mean = memoryview(bytearray(self._width * self.dtype.itemsize))
        native.store_means(sums, float(rows), native.HostArray(mean, _native(self.dtype)))
        return bytes(mean)

    def _average(self, of: Sequence[tuple[int, int]], target: memoryview, files: OpenFiles, way: Way) -> None:
        """Fill memory with the mean of operands, each from one of its elements on; of one, with its values."""
        size, stepwise = self.dtype.itemsize, self.map.stepwise and len(of) > 1
        for done in range(0, len(target) // size, _PIECE):
            out = target[done * size : (done + _PIECE) * size]
            rounded = native.HostArray(out, _native(self.dtype))
            sums = array("d", [0.0 if stepwise else -0.0]) * rounded.count
            for k, start in of:
                operand = self.operands[k]
                held = memoryview(bytearray(rounded.count * operand.dtype.itemsize))
                operand.read_into(held, start + done, files, way)
                native.add_rows(native.HostArray(held, _native(operand.dtype)), sums)
                if stepwise:
                    native.store_means(sums, 1.0, rounded)
                    sums = array("d", [-0.0]) * rounded.count
                    native.add_rows(rounded, sums)
            native.store_means(sums, float(len(of)), rounded)


class _Gathered(ByteRange):
    """Elements of ``Rows``, copied to where they are used."""

    def __init__(self, rows: Rows, start: int, count: int, access: Access):
        self.length = self.room = count * rows.dtype.itemsize
        self._rows, self._start, self._access = rows, start, access

    def view(self, memory: memoryview) -> memoryview:
        """See ``ByteRange.view``."""
        return memory[: self.room]

    def read(self, memory: memoryview, first: int, last: int) -> None:
        """See ``ByteRange.read``."""
        start = self._start + first // self._rows.dtype.itemsize
        self._rows.fill(memory[first:last], start, self._access.files, self._access.way)


def _next(source: RowSource) -> RowSource:
    """The source of the row after one from this source, if it belongs to the same run."""
    kind, start = source
    if isinstance(start, tuple):
        return kind, tuple((operand, row + 1) for operand, row in start)
    return kind, start + 1 if kind >= 0 else start


def _native(dtype: DType) -> native.DType:
    found: native.DType = getattr(native.DType, dtype.code)
    return found
