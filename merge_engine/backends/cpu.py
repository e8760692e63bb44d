"""The native CPU backend: vectorised C++ over blocks, on all cores, without torch."""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import merge_engine._native as _native
from merge_engine.backends import structures
from merge_engine.backends.base import Backend
from merge_engine.backends.operations import (
    Chunk,
    Column,
    Combine,
    Consensus,
    Counts,
    Draw,
    Found,
    Mask,
    Outcome,
    Rank,
    RankBand,
    Ranked,
    SolvedBand,
)
from merge_engine.backends.statistics import NEXT_BITS, SUM_BLOCK, BlockSums, level_bins, level_shift
from merge_engine.dtypes import BY_NAME, DType
from merge_engine.errors import BackendError
from merge_engine.storage.machine import cores

if TYPE_CHECKING:
    import torch


@dataclass
class HostArray:
    """Elements in host memory. ``owner`` keeps the memory alive."""

    native: Any
    address: int
    count: int
    dtype: DType
    owner: Any


class _Noted(NamedTuple):
    """What a mask keeps of a model in a chunk, whole blocks of bits: where they are, and whose memory that is."""

    mask: Mask
    address: int
    memory: bytearray


def address_of(memory: memoryview) -> int:
    """Where a buffer lies."""
    return _native.address_of(memory)


class CpuBackend(Backend):
    """Runs the primitives of ``csrc/cpu`` on ``threads`` threads (default: all that this process may use).

    ``instruction_set`` forces one of ``avx512``, ``avx2`` and ``baseline``; the default is the best that the
    processor has. All give the same bytes.
    """

    name = "cpu"
    reads_in_place = True

    def __init__(self, threads: int | None = None, instruction_set: str | None = None):
        self.threads = threads or cores()
        self.instruction_set = instruction_set or _native.instruction_set()
        if not _native.runs(self.instruction_set):
            raise BackendError(f"this processor cannot run {self.instruction_set} code")
        self._thresholds: dict[int, memoryview] = {}

    def array(self, memory: memoryview, dtype: DType) -> HostArray:
        """Wrap host memory (see ``Backend.array``)."""
        address = address_of(memory)
        return _host_array(address, len(memory) // dtype.itemsize, dtype, memory)

    def tensor(self, tensor: torch.Tensor) -> HostArray:
        """Wrap a contiguous CPU tensor (see ``Backend.tensor``)."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise BackendError(f"the cpu backend needs a contiguous CPU tensor, got one on {tensor.device}")
        dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
        return _host_array(tensor.data_ptr(), tensor.numel(), dtype, tensor)

    def new_histograms(self, level: int, slots: int) -> Any:
        """Make empty histograms (see ``Backend.new_histograms``)."""
        return (ctypes.c_uint64 * (level_bins(level) * slots))()

    def histogram(self, chunk: Chunk, level: int, columns: Sequence[Column], histograms: Any) -> None:
        """Count magnitude keys (see ``Backend.histogram``)."""
        structures.check(chunk)
        _native.histogram(
            self.instruction_set,
            chunk.base.native,
            [
                _native.Column(
                    chunk.models[column.model].native,
                    column.within.key if column.within is not None else 0,
                    _slot(histograms, level, column.slot),
                    column.ranks,
                )
                for column in columns
            ],
            structures.dtype(_native, chunk.working),
            level_shift(chunk.working, level),
            chunk.count,
            self.threads,
        )

    def select(self, histograms: Any, level: int, ranks: Sequence[Rank]) -> list[Found]:
        """Find keys by rank (see ``Backend.select``)."""
        found = []
        for slot, rank, within in ranks:
            key, above, _ = within or Found(0, 0, 0)
            bin_, more, equal = _native.select(
                _slot(histograms, level, slot), level_bins(level), rank - above
            )
            found.append(Found(key << NEXT_BITS | bin_, above + more, equal))
        return found

    def bands(self, bands: Sequence[RankBand], working: DType) -> list[SolvedBand]:
        """Turn ranks into masks (see ``Backend.bands``)."""
        result = []
        for band in bands:
            low, high = (_native.Found(*(found or (0, 0, 0))) for found in (band.low, band.high))
            solved = _native.solve_band(
                structures.rank_band(_native, band), low, high, structures.dtype(_native, working)
            )
            kept = solved.kept_without_slack if band.slack > 0 else None
            result.append(SolvedBand(solved.mask, kept))
        return result

    def locate(self, chunk: Chunk, model: int, key: int, nth: int) -> tuple[int, int | None]:
        """Find the n-th occurrence of a key (see ``Backend.locate``)."""
        structures.check(chunk)
        found, offset = _native.locate(
            self.instruction_set,
            chunk.base.native,
            chunk.models[model].native,
            structures.dtype(_native, chunk.working),
            key,
            nth,
            chunk.count,
            self.threads,
        )
        return found, offset if offset >= 0 else None

    def l1_norms(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> BlockSums:
        """Sum magnitudes before and after the masks (see ``Backend.l1_norms``)."""
        structures.check(chunk)
        natives = self._masks(chunk, masks)
        notes = [
            _note(chunk, model, mask) if isinstance(mask, (Draw, _native.Mask)) and not known else 0
            for model, (mask, known) in enumerate(zip(masks, self._known(chunk, masks), strict=True))
        ]
        sums = _room_for_sums(chunk, 2 * len(masks))
        _native.l1_norms(
            self.instruction_set,
            chunk.base.native,
            [model.native for model in chunk.models],
            natives,
            notes,
            structures.dtype(_native, chunk.working),
            storage_rounding,
            chunk.start,
            chunk.count,
            self.threads,
            sums,
        )
        return BlockSums.of(chunk.start, 2 * len(masks), sums)

    def gram(self, chunk: Chunk) -> BlockSums:
        """Sum inner products of all inputs (see ``Backend.gram``)."""
        structures.check(chunk)
        columns = len(chunk.inputs) * (len(chunk.inputs) + 1) // 2
        sums = _room_for_sums(chunk, columns)
        _native.gram(
            self.instruction_set,
            [array.native for array in chunk.inputs],
            structures.dtype(_native, chunk.working),
            chunk.count,
            self.threads,
            sums,
        )
        return BlockSums.of(chunk.start, columns, sums)

    def consensus(self, chunk: Chunk, operation: Consensus, output: HostArray) -> Outcome:
        """Merge task vectors (see ``Backend.consensus``)."""
        structures.check(chunk, output)
        masks = self._masks(chunk, [entry.mask for entry in operation.entries])
        native = structures.consensus(_native, chunk, operation, output, masks)
        counts, non_finite = _native.consensus(
            self.instruction_set, native, chunk.start, chunk.count, self.threads
        )
        return Outcome(tuple(Counts(*row) for row in counts), tuple(non_finite[:-1]), non_finite[-1])

    def combine(self, chunk: Chunk, operation: Combine, output: HostArray) -> Outcome:
        """Write a linear combination (see ``Backend.combine``)."""
        structures.check_combination(chunk, operation, output)
        native = structures.combine(_native, chunk, operation, output)
        non_finite = _native.combine(self.instruction_set, native, chunk.count, self.threads)
        return Outcome((), tuple(non_finite[:-1]), non_finite[-1])

    def _masks(self, chunk: Chunk, masks: Sequence[Any]) -> list[Any]:
        """What a chunk keeps whose norms were summed before it is merged is decided once for both."""
        result = []
        for model, (mask, known) in enumerate(zip(masks, self._known(chunk, masks), strict=True)):
            if known:
                result.append(structures.noted(_native, known))
            elif isinstance(mask, Ranked):
                result.append(self._rank(chunk, model, mask))
            else:
                result.append(structures.mask(_native, mask))
        return result

    def _known(self, chunk: Chunk, masks: Sequence[Any]) -> list[int]:
        """For each mask, where is noted what it keeps of its model; 0 where nothing is."""
        of = chunk.part_of or chunk
        noted: dict[int, _Noted] = of.noted or {}
        skipped = (chunk.start - of.start) // 8
        return [
            noted[model].address + skipped if model in noted and noted[model].mask == mask else 0
            for model, mask in enumerate(masks)
        ]

    def _threshold_room(self, chunk: Chunk, model: int) -> int:
        """The address of 32 bits for each element, in memory that is used again for every chunk."""
        if len(self._thresholds.get(model, b"")) < 4 * chunk.count:
            self._thresholds[model] = memoryview(mmap.mmap(-1, 4 * chunk.count))
        return address_of(self._thresholds[model]) if chunk.count else 0

    def _rank(self, chunk: Chunk, model: int, mask: Ranked) -> Any:
        """What the ranks keep; with the thresholds, if kept elements are divided by their probabilities."""
        inputs = self.instruction_set, chunk.base.native, chunk.models[model].native
        lines = structures.dtype(_native, chunk.working), chunk.line.length, chunk.line.stride
        if mask.inverse_probability:
            thresholds = self._threshold_room(chunk, model)
            _native.rank_thresholds(
                *inputs, *lines, mask.density, mask.epsilon, chunk.count, self.threads, thresholds
            )
            native = structures.mask(_native, mask)
            native.set_thresholds(thresholds)
            return native
        notes = _note(chunk, model, mask)
        _native.note_ranks(
            *inputs,
            *lines,
            mask.density,
            mask.epsilon,
            mask.random_key,
            chunk.start,
            chunk.count,
            self.threads,
            notes,
        )
        return structures.noted(_native, notes)


def _room_for_sums(chunk: Chunk, columns: int) -> array[float]:
    """[blocks, columns] sums, to be written."""
    return array("d", bytes(8 * columns * -(-chunk.count // SUM_BLOCK)))


def _note(chunk: Chunk, model: int, mask: Mask) -> int:
    """The address of room for what a mask keeps of a model, for as long as there is the chunk."""
    memory = bytearray(-(-chunk.count // SUM_BLOCK) * SUM_BLOCK // 8)
    address = address_of(memoryview(memory)) if memory else 0
    chunk.noted = {**(chunk.noted or {}), model: _Noted(mask, address, memory)}
    return address


def identical(memories: Sequence[memoryview], dtype: DType | None) -> bool:
    """Whether all buffers hold the same bytes and, if they are floats of ``dtype``, no negative zero."""
    size = len(memories[0])
    if any(len(memory) != size for memory in memories):
        return False
    itemsize = dtype.itemsize if dtype is not None else 0
    return bool(_native.identical([address_of(memory) for memory in memories], size, itemsize))


def _slot(histograms: Any, level: int, slot: int) -> int:
    return ctypes.addressof(histograms) + 8 * level_bins(level) * slot


def _host_array(address: int, count: int, dtype: DType, owner: Any) -> HostArray:
    return HostArray(structures.array(_native, address, dtype), address, count, dtype, owner)
