"""What the CUDA backend hands out for things in device memory. Some are there only once a batch is launched."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_engine.backends.operations import Counts, Found, Outcome, Overlap
from merge_engine.backends.statistics import BlockSums, level_bins
from merge_engine.dtypes import DType

if TYPE_CHECKING:
    from merge_engine._cuda import Array, DeviceMemory, Event, Native, Queue


@dataclass
class DeviceArray:
    """Elements in device memory: a piece of what is attached, or a tensor's, which ``owner`` keeps alive."""

    native: Array
    address: int
    count: int
    dtype: DType
    owner: Any = None


class DeviceCounts:
    """Counts of keys at a level, a slot for each of ``within``: they begin ``offset`` bytes into ``memory``.

    The memory is there once they are launched. ``within`` is what was found one level above, None at level 0.
    """

    def __init__(self, level: int, within: Sequence[PendingFound | None]):
        self.level = level
        self.within = within
        self.memory: DeviceMemory | None = None
        self.offset = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return 8 * level_bins(self.level) * len(self.within)

    def address(self, slot: int) -> int:
        """Where the counts of a slot are."""
        assert self.memory is not None, "counts are launched before what is found in them"
        return self.memory.address + self.offset + 8 * level_bins(self.level) * slot

    def within_address(self, slot: int) -> int:
        """Where that is which was found one level above, 0 at level 0."""
        within = self.within[slot]
        return 0 if within is None else within.piece.address


class Results:
    """The numbers that the kernels of a batch leave: keys that were found, bands that were solved, counters.

    ``memory`` and ``ready``, the event after the kernels, are there once the batch is launched.
    """

    def __init__(self) -> None:
        self.pieces = self.nbytes = 0
        self.memory: DeviceMemory | None = None
        self.ready: Event | None = None
        self._data: bytes | None = None

    def piece(self, nbytes: int) -> Piece:
        """Room for some more of them."""
        piece = Piece(self, self.nbytes, nbytes)
        self.pieces += 1
        self.nbytes += nbytes
        return piece

    def tell(self, memory: DeviceMemory, data: bytes) -> None:
        """These numbers came from the host, and are in memory of the device."""
        self.memory, self._data = memory, data

    def data(self, native: Native, aside: Queue) -> bytes:
        """Wait for the numbers. They are copied once, on the stream ``aside``: not behind what was asked for since."""
        if self._data is None:
            assert self.ready is not None and self.memory is not None, "what is looked at was launched"
            self.ready.wait()
            self._data = native.read(aside, self.memory, at=0, nbytes=self.nbytes)
        return self._data


@dataclass(frozen=True)
class Piece:
    """Some of the numbers of a batch."""

    results: Results
    offset: int
    nbytes: int

    @property
    def address(self) -> int:
        """Where they are on the device."""
        assert self.results.memory is not None, "memory for results is there before they are asked for"
        return self.results.memory.address + self.offset

    def part(self, offset: int, nbytes: int) -> Piece:
        """Some of these."""
        return Piece(self.results, self.offset + offset, nbytes)

    def numbers(self, data: bytes) -> tuple[int, ...]:
        """Whole numbers, from the data of all results."""
        return struct.unpack_from(f"<{self.nbytes // 8}Q", data, self.offset)


@dataclass(frozen=True)
class PendingFound:
    """A ``Found``."""

    piece: Piece

    def value(self, data: bytes) -> Found:
        """The numbers, from the data of all results. Raises ``IndexError`` when nothing was found."""
        found = Found(*self.piece.numbers(data))
        if not found.equal:
            raise IndexError("no key of this rank was counted")
        return found


@dataclass(frozen=True)
class PendingNumber:
    """A whole number."""

    piece: Piece

    def value(self, data: bytes) -> int:
        """The number, from the data of all results."""
        return self.piece.numbers(data)[0]


@dataclass(frozen=True)
class PendingSums:
    """Sums of the blocks, of so many elements, of a chunk that begins at element ``start``."""

    piece: Piece
    start: int
    columns: int
    block: int

    def value(self, data: bytes) -> BlockSums:
        """The sums, from the data of all results."""
        sums = array("d", data[self.piece.offset : self.piece.offset + self.piece.nbytes])
        return BlockSums.of(self.start, self.columns, sums, self.block)


@dataclass(frozen=True)
class PendingOutcome:
    """The outcome of a merge. ``counted`` says how many models have counts."""

    piece: Piece
    counted: int

    def value(self, data: bytes) -> Outcome:
        """The counts, from the data of all results."""
        numbers = self.piece.numbers(data)
        n = self.counted
        counts = tuple(Counts(*numbers[3 * i : 3 * i + 3]) for i in range(n))
        return Outcome(counts, numbers[3 * n : -1], numbers[-1])


@dataclass(frozen=True)
class PendingOverlaps:
    """Counts of what models keep alone and together."""

    piece: Piece

    def value(self, data: bytes) -> tuple[Overlap, ...]:
        """The counts, from the data of all results."""
        numbers = self.piece.numbers(data)
        return tuple(Overlap(*numbers[i : i + 2]) for i in range(0, len(numbers), 2))


@dataclass(frozen=True)
class SolvedMask:
    """A mask that the device solves itself."""

    piece: Piece


Pending = PendingFound | PendingNumber | PendingSums | PendingOutcome | PendingOverlaps
