"""The native CPU backend: vectorised C++ over blocks, on all cores, without torch."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import merge_engine._native as _native
from merge_engine.backends.base import Backend
from merge_engine.backends.memory import address_of
from merge_engine.backends.operations import (
    Chunk,
    Combine,
    Consensus,
    Counts,
    Divergence,
    Draw,
    Found,
    FoundBand,
    KeyColumn,
    Line,
    Mask,
    Nearswap,
    Outcome,
    Overlap,
    Rank,
    Ranked,
    Score,
    Scored,
    SolvedBand,
    Sought,
    Subject,
    key_dtype,
)
from merge_engine.backends.statistics import (
    SUM_BLOCK,
    WHOLE,
    BlockSums,
    KeyTable,
    gram_columns,
    level_bins,
    sum_block,
)
from merge_engine.backends.structures import Structures
from merge_engine.dtypes import DType, of_torch
from merge_engine.errors import BackendError
from merge_engine.storage.machine import cores

if TYPE_CHECKING:
    import torch

_STRUCTURES = Structures(_native)
_cores = cache(cores)  # reading the limits of control groups takes a fifth of the time of a small merge


class HostCounts:
    """Counts of keys at a level: [slots, bins] uint64 in ``memory``, and for each slot what it looks into."""

    def __init__(self, level: int, within: Sequence[Any]):
        self.level = level
        self.within = within
        self.memory = array("Q", (0,)) * (len(within) * level_bins(level))

    def of_slot(self, slot: int) -> memoryview:
        """The counts of a slot."""
        bins = level_bins(self.level)
        return memoryview(self.memory)[slot * bins : (slot + 1) * bins]

    def prefix(self, slot: int) -> int:
        """The bits above the level's of the keys that a slot counts."""
        within = self.within[slot]
        return 0 if within is None else int(within.key)

    def tables(self) -> list[KeyTable]:
        """A copy of the counts of each slot."""
        bins = level_bins(self.level)
        return [
            KeyTable(
                self.level,
                self.prefix(slot) if self.level else None,
                self.memory[
                    slot * bins : (slot + 1) * bins
                ],  # of an array, which takes a hundredth of a view's time
            )
            for slot in range(len(self.within))
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
        self.threads = threads or _cores()
        self.instruction_set = instruction_set or _native.instruction_set()
        if not _native.runs(self.instruction_set):
            raise BackendError(f"this processor cannot run {self.instruction_set} code")
        self._kernels = _native.Kernels(self.instruction_set, self.threads)
        self._thresholds: dict[int, memoryview] = {}

    def array(self, memory: memoryview, dtype: DType) -> _native.HostArray:
        """Wrap host memory (see ``Backend.array``)."""
        return _native.HostArray(memory, _STRUCTURES.dtype(dtype))

    def tensor(self, tensor: torch.Tensor) -> _native.HostArray:
        """Wrap a contiguous CPU tensor (see ``Backend.tensor``)."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise BackendError(f"the cpu backend needs a contiguous CPU tensor, got one on {tensor.device}")
        dtype = of_torch(tensor.dtype)
        assert dtype is not None, "operands have types of checkpoints"
        return _native.HostArray(
            address=tensor.data_ptr(), count=tensor.numel(), dtype=_STRUCTURES.dtype(dtype), owner=tensor
        )

    def fetch(self, value: Any) -> Any:
        """Look at a value (see ``Backend.fetch``)."""
        if isinstance(value, _native.Found):
            return Found(value.key, value.above, value.equal)
        return value.tables() if isinstance(value, HostCounts) else value

    def new_counts(self, level: int, within: Sequence[Any]) -> HostCounts:
        """Make empty counts (see ``Backend.new_counts``)."""
        return HostCounts(level, within)

    def count(self, chunk: Chunk, columns: Sequence[KeyColumn], counts: HostCounts) -> None:
        """Count keys (see ``Backend.count``)."""
        for score in {column.model for column in columns if not isinstance(column.model, int)}:
            of_score = [KeyColumn(slot, 0) for slot, model in columns if model == score]
            self.count(self._scores(chunk, score), of_score, counts)
        of_models = [(model, counts.prefix(slot), slot) for slot, model in columns if isinstance(model, int)]
        if not of_models:
            return
        self._kernels.count_keys(
            inputs=chunk.inputs,
            columns=of_models,
            working=_STRUCTURES.dtype(chunk.working),
            level=counts.level,
            count=chunk.count,
            slots=len(counts.within),
            counts=counts.memory,
        )

    def find(self, counts: HostCounts, ranks: Sequence[Rank]) -> list[Any]:
        """Find keys by rank (see ``Backend.find``)."""
        return [
            _native.find_in_counts(
                counts=counts.of_slot(slot), level=counts.level, within=counts.within[slot], rank=rank
            )
            for slot, rank in ranks
        ]

    def find_all(self, chunk: Chunk, level: int, sought: Sequence[Sought]) -> list[list[Any]]:
        """Find keys by rank, whole, mostly without counting all keys (see ``Backend.find_all``)."""
        if all(isinstance(one.within, _native.WholeFound) for one in sought):
            return [[one.within] * len(one.ranks) for one in sought]
        if any(not isinstance(one.model, int) for one in sought):
            return [found for one in sought for found in self._find_score(chunk, level, one)]
        if level:
            return super().find_all(chunk, level, sought)
        found: list[list[Any]] = self._kernels.find_all(
            inputs=chunk.inputs,
            sought=[(cast(int, model), ranks) for model, ranks, _ in sought],
            working=_STRUCTURES.dtype(chunk.working),
            count=chunk.count,
        )
        return found

    def _find_score(self, chunk: Chunk, level: int, sought: Sought) -> list[list[Any]]:
        of, model = (
            (chunk, sought.model) if isinstance(sought.model, int) else (self._scores(chunk, sought.model), 0)
        )
        return self.find_all(of, level, [sought._replace(model=model)])

    def bands(self, bands: Sequence[FoundBand], working: DType) -> list[SolvedBand]:
        """Turn ranks into masks (see ``Backend.bands``)."""
        dtype, solved = _STRUCTURES.dtype(working), []
        for band in bands:
            mask, kept = _native.solve_band(
                band=_STRUCTURES.rank_band(band), low=band.low, high=band.high, working=dtype
            )
            solved.append(SolvedBand(mask, kept if band.mask.slack > 0 else None))
        return solved

    def locate(self, chunk: Chunk, model: Subject, key: int, nth: int) -> tuple[int, int | None]:
        """Find the n-th occurrence of a key (see ``Backend.locate``)."""
        if not isinstance(model, int):
            return self.locate(self._scores(chunk, model), 0, key, nth)
        found, offset = self._kernels.locate(
            inputs=chunk.inputs,
            model=model,
            working=_STRUCTURES.dtype(chunk.working),
            key=key,
            nth=nth,
            count=chunk.count,
        )
        return found, offset if offset >= 0 else None

    def l1_norms(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> BlockSums:
        """Sum magnitudes before and after the masks (see ``Backend.l1_norms``)."""
        return self._sums(self._kernels.l1_norms, chunk, masks, storage_rounding)

    def squares(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> BlockSums:
        """Sum squares before and after the masks (see ``Backend.squares``)."""
        return self._sums(self._kernels.squares, chunk, masks, storage_rounding)

    def _sums(
        self, kernel: Callable[..., None], chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool
    ) -> BlockSums:
        natives = self._masks(chunk, masks)
        sums = _room_for_sums(chunk, 2 * len(masks))
        kernel(
            inputs=chunk.inputs,
            masks=natives,
            notes=[self._notes(chunk, model, mask) for model, mask in enumerate(masks)],
            working=_STRUCTURES.dtype(chunk.working),
            storage_rounding=storage_rounding,
            start=chunk.start,
            count=chunk.count,
            sums=sums,
        )
        return BlockSums.of(chunk.start, 2 * len(masks), sums)

    def overlaps(self, chunk: Chunk, masks: Sequence[Mask]) -> tuple[Overlap, ...]:
        """Count what models keep alone and together (see ``Backend.overlaps``)."""
        counts = self._kernels.overlaps(
            inputs=chunk.inputs,
            masks=self._masks(chunk, masks),
            working=_STRUCTURES.dtype(chunk.working),
            start=chunk.start,
            count=chunk.count,
        )
        return tuple(Overlap(*of_model) for of_model in counts)

    def gram(self, chunk: Chunk, of_deltas: bool = False, line: Line | None = None) -> BlockSums:
        """Sum inner products of all inputs or task vectors (see ``Backend.gram``)."""
        columns, block = gram_columns(chunk, of_deltas, line), sum_block(line)
        sums = _room_for_sums(chunk, columns, block)
        self._kernels.gram(
            inputs=chunk.inputs,
            working=_STRUCTURES.dtype(chunk.working),
            of_deltas=of_deltas,
            line=line or WHOLE,
            start=chunk.start,
            count=chunk.count,
            sums=sums,
        )
        return BlockSums.of(chunk.start, columns, sums, block)

    def consensus(self, chunk: Chunk, operation: Consensus, output: _native.HostArray) -> Outcome:
        """Merge task vectors (see ``Backend.consensus``)."""
        entries = operation.entries
        counts, non_finite = self._kernels.consensus(
            inputs=chunk.inputs,
            output=output,
            masks=self._masks(chunk, [entry.mask for entry in entries]),
            entries=[(one.weight, one.rescale, one.vote_slack, one.retain_slack) for one in entries],
            working=_STRUCTURES.dtype(chunk.working),
            election=_STRUCTURES.election(operation.election),
            normalize=operation.normalize,
            storage_rounding=operation.storage_rounding,
            scale=operation.scale,
            divisor=operation.divisor,
            wide=operation.wide,
            start=chunk.start,
            count=chunk.count,
        )
        return Outcome(tuple([Counts(*row) for row in counts]), tuple(non_finite[:-1]), non_finite[-1])

    def combine(self, chunk: Chunk, operation: Combine, output: _native.HostArray) -> Outcome:
        """Write a linear combination (see ``Backend.combine``)."""
        non_finite = self._kernels.combine(
            inputs=chunk.inputs,
            output=output,
            coefficients=operation.coefficients,
            divisor=operation.divisor,
            fused=operation.fused,
            rounded=operation.rounded,
            stepwise=operation.stepwise,
            on_base=operation.on_base,
            line=operation.lines.line if operation.lines else WHOLE,
            of_lines=operation.lines.values if operation.lines else None,
            working=_STRUCTURES.dtype(chunk.working),
            start=chunk.start,
            count=chunk.count,
        )
        return Outcome((), tuple(non_finite[:-1]), non_finite[-1])

    def nearswap(self, chunk: Chunk, operation: Nearswap, output: _native.HostArray) -> Outcome:
        """Move the base to the model where they are near (see ``Backend.nearswap``)."""
        non_finite = self._kernels.nearswap(
            inputs=chunk.inputs,
            output=output,
            threshold=operation.threshold,
            storage_rounding=operation.storage_rounding,
            working=_STRUCTURES.dtype(chunk.working),
            count=chunk.count,
        )
        return Outcome((), tuple(non_finite[:-1]), non_finite[-1])

    def _score(self, chunk: Chunk, score: Score) -> _native.Score:
        """A score of a chunk. Divergences of lines are remembered from measuring to merging it."""
        if not isinstance(score, Divergence):
            return _native.Score.variance(score.storage_rounding)
        of = chunk
        while of.part_of is not None:
            of = of.part_of
        noted: dict[Any, Any] = of.noted or {}
        found = noted.get(score)
        if found is None:
            found = array("d", bytes(8 * (of.count // score.length)))
            self._kernels.divergences(
                inputs=of.inputs,
                working=_STRUCTURES.dtype(of.working),
                length=score.length,
                count=of.count,
                found=found,
            )
            of.noted = {**noted, score: found}
        skipped = (chunk.start - of.start) // score.length
        return _native.Score.divergence(score.length, found.buffer_info()[0] + 8 * skipped)

    def _scores(self, chunk: Chunk, score: Score) -> Chunk:
        """The scores of a chunk as a model over a base of zeros. They are computed whenever they are read."""
        inputs = self._kernels.scores(
            inputs=chunk.inputs,
            score=self._score(chunk, score),
            working=_STRUCTURES.dtype(chunk.working),
            count=chunk.count,
        )
        return Chunk(inputs, True, key_dtype(score, chunk.working), chunk.start, chunk.count)

    def _masks(self, chunk: Chunk, masks: Sequence[Any]) -> list[_native.Mask]:
        """What a chunk keeps whose norms were summed before it is merged is decided once for both."""
        return [self._mask(chunk, model, mask) for model, mask in enumerate(masks)]

    def _mask(self, chunk: Chunk, model: int, mask: Any) -> _native.Mask:
        subject = mask if isinstance(mask, Scored) else model
        if known := _known(chunk, subject, mask):
            return _native.Mask.noted(known)
        if isinstance(mask, Scored):
            notes = _room_for_notes(chunk, mask, mask)
            scores = self._scores(chunk, mask.score)
            self._kernels.note_band(
                inputs=scores.inputs,
                mask=_STRUCTURES.mask(mask.mask),
                working=_STRUCTURES.dtype(scores.working),
                start=chunk.start,
                count=chunk.count,
                notes=notes,
            )
            return _native.Mask.noted(notes)
        if not isinstance(mask, Ranked):
            return _STRUCTURES.mask(mask)
        working = _STRUCTURES.dtype(chunk.working)
        if mask.inverse_probability:
            thresholds = self._threshold_room(chunk, model)
            self._kernels.rank_thresholds(
                inputs=chunk.inputs,
                model=model,
                working=working,
                line=chunk.line,
                density=mask.density,
                epsilon=mask.epsilon,
                count=chunk.count,
                thresholds=thresholds,
            )
            return _STRUCTURES.mask(mask, thresholds)
        notes = _room_for_notes(chunk, model, mask)
        self._kernels.note_ranks(
            inputs=chunk.inputs,
            model=model,
            working=working,
            line=chunk.line,
            density=mask.density,
            epsilon=mask.epsilon,
            random_key=mask.random_key,
            start=chunk.start,
            count=chunk.count,
            notes=notes,
        )
        return _native.Mask.noted(notes)

    def _notes(self, chunk: Chunk, model: int, mask: Any) -> int:
        """Where to note what a mask keeps of a model: 0 where it costs little to decide, or is known already."""
        decides = isinstance(mask, Draw | _native.Mask) and not _known(chunk, model, mask)
        return _room_for_notes(chunk, model, mask) if decides else 0

    def _threshold_room(self, chunk: Chunk, model: int) -> int:
        """The address of 32 bits for each element, in memory that is used again for every chunk."""
        if len(self._thresholds.get(model, b"")) < 4 * chunk.count:
            self._thresholds[model] = memoryview(mmap.mmap(-1, 4 * chunk.count))
        return address_of(self._thresholds[model]) if chunk.count else 0


def _known(chunk: Chunk, subject: int | Scored, mask: Any) -> int:
    """Where it is noted what a mask keeps of a model, or of all; 0 where it is not."""
    for of in (chunk, chunk.part_of):
        noted: dict[Any, _Noted] = (of.noted if of is not None else None) or {}
        if of is not None and subject in noted and noted[subject].mask == mask:
            return noted[subject].address + (chunk.start - of.start) // 8
    return 0


def _room_for_notes(chunk: Chunk, subject: int | Scored, mask: Mask) -> int:
    """The address of room for what a mask keeps of a model, or of all, for as long as there is the chunk."""
    memory = bytearray(-(-chunk.count // SUM_BLOCK) * SUM_BLOCK // 8)
    address = address_of(memoryview(memory)) if memory else 0
    chunk.noted = {**(chunk.noted or {}), subject: _Noted(mask, address, memory)}
    return address


def _room_for_sums(chunk: Chunk, columns: int, block: int = SUM_BLOCK) -> array[float]:
    """[blocks, columns] sums, to be written."""
    return array("d", bytes(8 * columns * -(-chunk.count // block)))
