"""What the Triton backend hands out for things in device memory. Small numbers are copied to the host meanwhile."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch

from merge_engine.backends.operations import Counts, Found, Outcome, Overlap
from merge_engine.backends.statistics import BlockSums, KeyTable
from merge_engine.backends.triton.link import Copy
from merge_engine.dtypes import DType
from merge_engine.kernels import masks


@dataclass
class TorchArray:
    """Elements in device memory, as unsigned integers."""

    bits: torch.Tensor
    dtype: DType

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.bits.numel()


@dataclass(frozen=True)
class TorchCounts:
    """Counts of keys at a level, [slots, COPIES, bins] int64, to be added over the copies.

    ``within``: [slots, 3] int64, what was found one level above, zeros at level 0.
    """

    level: int
    within: torch.Tensor
    of_bins: torch.Tensor

    def fetch(self) -> list[KeyTable]:
        """Wait for all that was counted."""
        counts = self.of_bins.sum(1).tolist()
        return [
            KeyTable(self.level, key if self.level else None, array("Q", of_bins))
            for (key, _, _), of_bins in zip(self.within.tolist(), counts, strict=True)
        ]


@dataclass(frozen=True)
class FoundRow:
    """A ``Found`` in device memory."""

    row: torch.Tensor
    copy: Copy
    place: int

    def fetch(self) -> Found:
        """Wait for the numbers. Raises ``IndexError`` when nothing was found."""
        found = Found(*self.copy.wait()[self.place].tolist())
        if not found.equal:
            raise IndexError("no key of this rank was counted")
        return found


@dataclass(frozen=True)
class SolvedRow:
    """A band in device memory. ``kind`` is its kind in kernels/masks.py."""

    row: torch.Tensor
    copy: Copy
    place: int
    kind: int


@dataclass(frozen=True)
class SumRows:
    """Sums of the blocks, of so many elements, of a chunk that begins at element ``start``, on their way.

    They are [blocks, columns] float64.
    """

    copy: Copy
    start: int
    block: int

    def fetch(self) -> BlockSums:
        """Wait for the sums."""
        rows = self.copy.wait()
        sums = array("d", bytes(8 * rows.numel()))
        if sums:
            torch.frombuffer(sums, dtype=torch.float64).copy_(rows.reshape(-1))
        return BlockSums.of(self.start, rows.shape[1], sums, self.block)


@dataclass(frozen=True)
class KeptWithoutSlack:
    """How many entries a solved band would keep without slack."""

    mask: SolvedRow

    def fetch(self) -> int:
        """Wait for the number."""
        return int(self.mask.copy.wait()[self.mask.place, masks.KEPT_WITHOUT_SLACK.value])


@dataclass(frozen=True)
class OverlapRows:
    """Counts of what models keep alone and together, on their way."""

    copy: Copy

    def fetch(self) -> tuple[Overlap, ...]:
        """Wait for the counts."""
        return tuple(Overlap(*row) for row in self.copy.wait().tolist())


@dataclass(frozen=True)
class PendingRows:
    """An ``Outcome`` whose counts are on their way. ``counted`` says how many models have counts."""

    copy: Copy
    counted: int

    def fetch(self) -> Outcome:
        """Wait for the operation and for its output to be written."""
        rows = self.copy.wait().tolist()
        non_finite = [row[-1] for row in rows]
        counts = tuple(Counts(*row[:3]) for row in rows[1 : 1 + self.counted])
        return Outcome(counts, tuple(non_finite[:-1]), non_finite[-1])
