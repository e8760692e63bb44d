"""The native CPU backend: vectorised C++ over blocks, on all cores, without torch."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import merge_engine._native as _native
from merge_engine.backends import structures
from merge_engine.backends.base import Backend
from merge_engine.backends.memory import address_of
from merge_engine.backends.operations import (
    Chunk,
    Combine,
    Consensus,
    Counts,
    Draw,
    Found,
    FoundBand,
    KeyColumn,
    Mask,
    Outcome,
    Rank,
    Ranked,
    SolvedBand,
    Sought,
)
from merge_engine.backends.statistics import (
    SUM_BLOCK,
    BlockSums,
    KeyPlaces,
    KeyTable,
    level_bins,
    level_bits,
    level_shift,
)
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


class HostCounts:
    """Counts of keys at a level: [slots, bins] uint64 in ``memory``, and for each slot what it looks into."""

    def __init__(self, level: int, within: Sequence[Any]):
        self.level = level
        self.within = within
        self.memory = array("Q", bytes(8 * len(within) * level_bins(level)))

    def of_slot(self, slot: int) -> memoryview:
        """The counts of a slot."""
        bins = level_bins(self.level)
        return memoryview(self.memory)[slot * bins : (slot + 1) * bins]

    def tables(self) -> list[KeyTable]:
        """A copy of the counts of each slot."""
        return [
            KeyTable(self.level, within.key if self.level else None, array("Q", self.of_slot(slot)))
            for slot, within in enumerate(self.within)
        ]


class _Noted(NamedTuple):
    """What a mask keeps of a model in a chunk, whole blocks of bits: where they are, and whose memory that is."""

    mask: Mask
    address: int
    memory: bytearray


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

    def fetch(self, value: Any) -> Any:
        """Look at a value (see ``Backend.fetch``)."""
        if isinstance(value, _native.Found):
            return Found(value.key, value.above, value.equal)
        return value.tables() if isinstance(value, HostCounts) else value

    def new_counts(self, level: int, within: Sequence[Any]) -> HostCounts:
        """Make empty counts (see ``Backend.new_counts``)."""
        return HostCounts(level, [_found(one) for one in within])

    def count(self, chunk: Chunk, columns: Sequence[KeyColumn], counts: HostCounts) -> None:
        """Count magnitude keys (see ``Backend.count``)."""
        structures.check(chunk)
        models = chunk.models
        _native.count_keys(
            instruction_set=self.instruction_set,
            base=chunk.base.native,
            columns=[(models[model].native, counts.within[slot].key, slot) for slot, model in columns],
            working=structures.dtype(_native, chunk.working),
            shift=level_shift(chunk.working, counts.level),
            count=chunk.count,
            threads=self.threads,
            bits=level_bits(counts.level),
            slots=len(counts.within),
            counts=counts.memory,
        )

    def find(self, counts: HostCounts, ranks: Sequence[Rank]) -> list[Any]:
        """Find keys by rank (see ``Backend.find``)."""
        bits = level_bits(counts.level)
        return [
            _native.find_in_counts(
                counts=counts.of_slot(slot), bits=bits, within=counts.within[slot], rank=rank
            )
            for slot, rank in ranks
        ]

    def find_all(self, chunk: Chunk, level: int, sought: Sequence[Sought]) -> list[list[Any]]:
        """Find keys by rank, mostly without counting all keys (see ``Backend.find_all``)."""
        structures.check(chunk)
        models = chunk.models
        found: list[list[Any]] = _native.find_all(
            instruction_set=self.instruction_set,
            base=chunk.base.native,
            sought=[
                _native.Sought(model=models[model].native, within=_found(within), ranks=ranks)
                for model, ranks, within in sought
            ],
            working=structures.dtype(_native, chunk.working),
            shift=level_shift(chunk.working, level),
            count=chunk.count,
            threads=self.threads,
        )
        return found

    def bands(self, bands: Sequence[FoundBand], working: DType) -> list[SolvedBand]:
        """Turn ranks into masks (see ``Backend.bands``)."""
        result = []
        for band in bands:
            solved = _native.solve_band(
                structures.rank_band(_native, band),
                _found(band.low),
                _found(band.high),
                structures.dtype(_native, working),
            )
            kept = solved.kept_without_slack if band.mask.slack > 0 else None
            result.append(SolvedBand(solved.mask, kept))
        return result

    def locate(self, chunk: Chunk, model: int, key: int, nth: int) -> tuple[KeyPlaces, int | None]:
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
        return KeyPlaces.of(chunk.start, found), offset if offset >= 0 else None

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


def _found(found: Any) -> Any:
    """What was found, as native code takes it: zeros for what need not be looked for."""
    return found if isinstance(found, _native.Found) else _native.Found(*(found or ()))


def _host_array(address: int, count: int, dtype: DType, owner: Any) -> HostArray:
    return HostArray(structures.array(_native, address, dtype), address, count, dtype, owner)
