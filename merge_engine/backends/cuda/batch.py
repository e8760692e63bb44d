"""Work for a CUDA device that is written down for many tensors and then launched together.

Each kind of work builds on kinds before it only: keys are found in histograms, the next level's histograms look into
what was found, bands follow from that, and norms and merges from bands. So it is launched kind by kind, for all
tensors at once, whatever the order in which they asked for it.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from merge_engine.backends import structures
from merge_engine.backends.cuda.handles import (
    DeviceArray,
    DeviceCounts,
    PendingFound,
    PendingNumber,
    PendingOutcome,
    PendingSums,
    Piece,
    Results,
    SolvedMask,
)
from merge_engine.backends.operations import (
    Chunk,
    Combine,
    Consensus,
    Found,
    FoundBand,
    KeyColumn,
    Rank,
    Ranked,
    SolvedBand,
)
from merge_engine.backends.statistics import SUM_BLOCK, level_bins, level_shift
from merge_engine.dtypes import DType


class Batch:
    """What was asked for since the last launch. Handles that it gives stand for what is there after its own.

    ``uploads`` and ``downloads`` are for its owner to copy before and after.
    """

    def __init__(self, native: Any):
        self._native = native
        self.results = Results()
        self.uploads: list[DeviceArray] = []
        self.downloads: list[DeviceArray] = []
        self.counts: list[DeviceCounts] = []
        self._told: list[
            Found
        ] = []  # by the host, of what was found elsewhere: the device keeps it in ``_given``
        self._given = Results()
        self._counted: dict[int, list[tuple[Chunk, Sequence[KeyColumn], DeviceCounts]]] = defaultdict(list)
        self._sought: dict[int, list[tuple[DeviceCounts, Rank, Piece]]] = defaultdict(list)
        self._banded: list[tuple[FoundBand, DType, Piece]] = []  # low and high are on the device
        self._summed: list[tuple[Chunk, Sequence[Any], bool, PendingSums]] = []
        self._multiplied: list[tuple[Chunk, PendingSums]] = []
        self._merged: list[tuple[Chunk, Consensus, DeviceArray, Piece]] = []
        self._combined: list[tuple[Chunk, Combine, DeviceArray, Piece]] = []

    def new_counts(self, level: int, within: Sequence[PendingFound | Found | None]) -> DeviceCounts:
        """See ``Backend.new_counts``."""
        counts = DeviceCounts(level, [self._on_device(found) for found in within])
        self.counts.append(counts)
        return counts

    def count(self, chunk: Chunk, columns: Sequence[KeyColumn], counts: DeviceCounts) -> None:
        """See ``Backend.count``."""
        self._counted[counts.level].append((chunk, columns, counts))

    def find(self, counts: DeviceCounts, ranks: Sequence[Rank]) -> list[PendingFound]:
        """See ``Backend.find``."""
        pieces = [self.results.piece(self._native.FOUND_BYTES) for _ in ranks]
        self._sought[counts.level] += [
            (counts, rank, piece) for rank, piece in zip(ranks, pieces, strict=True)
        ]
        return [PendingFound(piece) for piece in pieces]

    def bands(self, bands: Sequence[FoundBand], working: DType) -> list[SolvedBand]:
        """See ``Backend.bands``."""
        solved = []
        for band in bands:
            piece = self.results.piece(self._native.SOLVED_BYTES)
            low, high = self._on_device(band.low), self._on_device(band.high)
            self._banded.append((band._replace(low=low, high=high), working, piece))
            kept = PendingNumber(piece.part(self._native.KEPT_OFFSET, 8)) if band.mask.slack > 0 else None
            solved.append(SolvedBand(SolvedMask(piece), kept))
        return solved

    def _on_device(self, found: PendingFound | Found | None) -> PendingFound | None:
        if not isinstance(found, Found):
            return found
        self._told.append(found)
        return PendingFound(self._given.piece(self._native.FOUND_BYTES))

    def l1_norms(self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool) -> PendingSums:
        """See ``Backend.l1_norms``."""
        sums = self._sums(chunk, 2 * len(masks))
        self._summed.append((chunk, masks, storage_rounding, sums))
        return sums

    def gram(self, chunk: Chunk) -> PendingSums:
        """See ``Backend.gram``."""
        sums = self._sums(chunk, len(chunk.inputs) * (len(chunk.inputs) + 1) // 2)
        self._multiplied.append((chunk, sums))
        return sums

    def _sums(self, chunk: Chunk, columns: int) -> PendingSums:
        blocks = -(-chunk.count // SUM_BLOCK)
        return PendingSums(self.results.piece(8 * columns * blocks), chunk.start, columns)

    def consensus(self, chunk: Chunk, operation: Consensus, output: DeviceArray) -> PendingOutcome:
        """See ``Backend.consensus``."""
        models = len(chunk.models)
        piece = self.results.piece(8 * (4 * models + 2))
        self._merged.append((chunk, operation, output, piece))
        return PendingOutcome(piece, models)

    def combine(self, chunk: Chunk, operation: Combine, output: DeviceArray) -> PendingOutcome:
        """See ``Backend.combine``."""
        piece = self.results.piece(8 * (len(chunk.inputs) + 1))
        self._combined.append((chunk, operation, output, piece))
        return PendingOutcome(piece, 0)

    def launch(self, queue: Any) -> None:
        """Hand everything to the device."""
        native = self._native
        if self.results.pieces:
            self.results.memory = native.DeviceMemory(queue, self.results.nbytes, True)
        if self._told:
            numbers = [number for found in self._told for number in found]
            data = struct.pack(f"<{len(numbers)}Q", *numbers)
            self._given.tell(native.DeviceMemory(queue, data), data)
        self._make_counts(queue)
        for level in sorted(self._counted.keys() | self._sought.keys()):
            native.histogram(queue, [self._histogram_call(*asked) for asked in self._counted[level]])
            queries = [
                native.RankQuery(
                    counts.address(rank.slot), _address(counts.within[rank.slot]), rank.rank, piece.address
                )
                for counts, rank, piece in self._sought[level]
            ]
            native.select(queue, queries, level_bins(level))
        native.solve_bands(queue, [self._band_query(*asked) for asked in self._banded])
        self._sum(queue)
        self._multiply(queue)
        self._merge(queue)

    def _make_counts(self, queue: Any) -> None:
        nbytes = 0
        for counts in self.counts:
            counts.offset = nbytes
            nbytes += counts.nbytes
        if nbytes:
            memory = self._native.DeviceMemory(queue, nbytes, True)
            for counts in self.counts:
                counts.memory = memory

    def _histogram_call(self, chunk: Chunk, columns: Sequence[KeyColumn], counts: DeviceCounts) -> Any:
        native = self._native
        models = chunk.models
        filled = [
            native.HistogramColumn(models[model].native, _address(counts.within[slot]), counts.address(slot))
            for slot, model in columns
        ]
        working = structures.dtype(native, chunk.working)
        shift = level_shift(chunk.working, counts.level)
        return native.HistogramCall(chunk.base.native, filled, working, shift, chunk.count)

    def _band_query(self, band: FoundBand, working: DType, solved: Piece) -> Any:
        native = self._native
        return native.BandQuery(
            structures.rank_band(native, band),
            structures.dtype(native, working),
            _address(band.low),
            _address(band.high),
            solved.address,
        )

    def _sum(self, queue: Any) -> None:
        native = self._native
        masks, _thresholds = native_masks(native, queue, [(chunk, kept) for chunk, kept, *_ in self._summed])
        calls = []
        for (chunk, _, storage_rounding, sums), of_models in zip(self._summed, masks, strict=True):
            models = [model.native for model in chunk.models]
            working = structures.dtype(native, chunk.working)
            where = chunk.start, chunk.count, sums.piece.address
            calls.append(
                native.NormCall(chunk.base.native, models, of_models, working, storage_rounding, *where)
            )
        native.l1_norms(queue, calls)

    def _multiply(self, queue: Any) -> None:
        native = self._native
        calls = []
        for chunk, sums in self._multiplied:
            inputs = [array.native for array in chunk.inputs]
            working = structures.dtype(native, chunk.working)
            calls.append(native.GramCall(inputs, working, chunk.count, sums.piece.address))
        native.gram(queue, calls)

    def _merge(self, queue: Any) -> None:
        native = self._native
        asked = [(chunk, [e.mask for e in operation.entries]) for chunk, operation, _, _ in self._merged]
        masks, _thresholds = native_masks(native, queue, asked)
        calls = []
        for (chunk, operation, output, counters), of_entries in zip(self._merged, masks, strict=True):
            consensus = structures.consensus(native, chunk, operation, output, of_entries)
            non_finite = counters.address + 8 * 3 * len(chunk.models)
            calls.append(
                native.ConsensusCall(consensus, chunk.start, chunk.count, counters.address, non_finite)
            )
        native.consensus(queue, calls)
        native.combine(
            queue,
            [
                native.CombineCall(
                    structures.combine(native, chunk, operation, output), chunk.count, counters.address
                )
                for chunk, operation, output, counters in self._combined
            ],
        )


def native_masks(
    native: Any, queue: Any, asked: Sequence[tuple[Chunk, Sequence[Any]]]
) -> tuple[list[list[Any]], Any]:
    """Native masks for the models of each chunk, and memory that they point to, which must outlive the launch."""
    nbytes = sum(4 * chunk.count for chunk, masks in asked for mask in masks if isinstance(mask, Ranked))
    thresholds = native.DeviceMemory(queue, nbytes, False) if nbytes else None
    place = thresholds.address if thresholds is not None else 0
    result, ranked = [], []
    for chunk, masks in asked:
        made = []
        for model, mask in zip(chunk.models, masks, strict=True):
            if isinstance(mask, SolvedMask):
                made.append(native.Mask())
                made[-1].set_solved(mask.piece.address)
                continue
            made.append(structures.mask(native, mask))
            if isinstance(mask, Ranked) and chunk.count:
                made[-1].set_thresholds(place)
                ranked.append(
                    native.RankCall(
                        chunk.base.native,
                        model.native,
                        structures.dtype(native, chunk.working),
                        *chunk.line,
                        mask.density,
                        mask.epsilon,
                        chunk.count,
                        place,
                    )
                )
                place += 4 * chunk.count
        result.append(made)
    native.rank_thresholds(queue, ranked)
    return result, thresholds


def _address(pending: PendingFound | None) -> int:
    return 0 if pending is None else pending.piece.address
