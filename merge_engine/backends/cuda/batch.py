"""Work for a CUDA device that is written down for many tensors and then launched together.

Each kind of work builds on kinds before it only: keys are found in histograms, the next level's histograms look into
what was found, bands follow from that, and norms and merges from bands. So it is launched kind by kind, for all
tensors at once, whatever the order in which they asked for it.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from merge_engine.backends.cuda.handles import (
    DeviceArray,
    DeviceCounts,
    PendingFound,
    PendingNumber,
    PendingOutcome,
    PendingOverlaps,
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
    Line,
    Nearswap,
    Rank,
    Ranked,
    Score,
    Scored,
    SolvedBand,
    Sought,
    Variance,
)
from merge_engine.backends.statistics import SUM_BLOCK, WHOLE, gram_columns, level_bins, sum_block
from merge_engine.backends.structures import Structures, coefficients_of
from merge_engine.dtypes import DType

if TYPE_CHECKING:
    from merge_engine._cuda import (
        BandQuery,
        CombineCall,
        ConsensusCall,
        DeviceMemory,
        FindCall,
        HistogramCall,
        Mask,
        Native,
        NearswapCall,
        NoteCall,
        OverlapCall,
        Queue,
        RankQuery,
        ScoreCall,
    )


COUNTS_BYTES = 128 << 20
"""Counts that are launched together take no more than this: the tensors that they are for are launched, and others
follow."""


class Batch:
    """What was asked for since the last launch. Handles that it gives stand for what is there after its own."""

    def __init__(self, native: Native, structures: Structures):
        self._native = native
        self._structures = structures
        self.results = Results()
        self.counts: list[DeviceCounts] = []
        self._told: list[
            Found
        ] = []  # by the host, of what was found elsewhere: the device keeps it in ``_given``
        self._given = Results()
        self._counted: dict[int, list[tuple[Chunk, Sequence[KeyColumn], DeviceCounts]]] = defaultdict(list)
        self._sought: dict[int, list[tuple[DeviceCounts, Rank, Piece]]] = defaultdict(list)
        self._sought_at_once: dict[
            int,
            list[
                tuple[
                    Chunk, Sequence[Sought], Sequence[PendingFound | None], Sequence[Sequence[PendingFound]]
                ]
            ],
        ] = defaultdict(list)
        self._banded: list[tuple[FoundBand, DType, Piece]] = []  # low and high are on the device
        self._scored: list[tuple[Chunk, Score, DeviceArray]] = []
        self._overlapped: list[tuple[Chunk, Sequence[Any], Piece]] = []
        self._summed: list[tuple[Chunk, Sequence[Any], bool, bool, PendingSums]] = []
        self._multiplied: list[tuple[Chunk, bool, Line | None, PendingSums]] = []
        self._merged: list[tuple[Chunk, Consensus, DeviceArray, Piece]] = []
        self._combined: list[tuple[Chunk, Combine, DeviceArray, Piece]] = []
        self._swapped: list[tuple[Chunk, Nearswap, DeviceArray, Piece]] = []

    def has_room_for(self, level: int, slots: int) -> bool:
        """Whether so many more slots of counts may be launched with the others."""
        held = sum(counts.nbytes for counts in self.counts)
        return held + 8 * level_bins(level) * slots <= COUNTS_BYTES

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

    def find_all(self, chunk: Chunk, level: int, sought: Sequence[Sought]) -> list[list[PendingFound]]:
        """See ``Backend.find_all``."""
        found = [
            [PendingFound(self.results.piece(self._native.FOUND_BYTES)) for _ in one.ranks] for one in sought
        ]
        within = [self._on_device(one.within) for one in sought]
        self._sought_at_once[level].append((chunk, sought, within, found))
        return found

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

    def score(self, chunk: Chunk, score: Score, scores: DeviceArray) -> None:
        """Write the scores of a chunk's positions, before anything else."""
        self._scored.append((chunk, score, scores))

    def overlaps(self, chunk: Chunk, masks: Sequence[Any]) -> PendingOverlaps:
        """See ``Backend.overlaps``."""
        piece = self.results.piece(16 * len(masks))
        self._overlapped.append((chunk, masks, piece))
        return PendingOverlaps(piece)

    def sums(self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool, squared: bool) -> PendingSums:
        """See ``Backend.l1_norms``, or with ``squared`` ``Backend.squares``."""
        sums = self._sums(chunk, 2 * len(masks))
        self._summed.append((chunk, masks, storage_rounding, squared, sums))
        return sums

    def gram(self, chunk: Chunk, of_deltas: bool, line: Line | None) -> PendingSums:
        """See ``Backend.gram``."""
        sums = self._sums(chunk, gram_columns(chunk, of_deltas, line), sum_block(line))
        self._multiplied.append((chunk, of_deltas, line, sums))
        return sums

    def _sums(self, chunk: Chunk, columns: int, block: int = SUM_BLOCK) -> PendingSums:
        blocks = -(-chunk.count // block)
        return PendingSums(self.results.piece(8 * columns * blocks), chunk.start, columns, block)

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

    def nearswap(self, chunk: Chunk, operation: Nearswap, output: DeviceArray) -> PendingOutcome:
        """See ``Backend.nearswap``."""
        piece = self.results.piece(8 * 3)
        self._swapped.append((chunk, operation, output, piece))
        return PendingOutcome(piece, 0)

    def launch(self, queue: Queue) -> None:
        """Hand everything to the device."""
        native = self._native
        if self.results.pieces:
            self.results.memory = native.DeviceMemory(queue, nbytes=self.results.nbytes, zero=True)
        if self._told:
            numbers = [number for found in self._told for number in found]
            data = struct.pack(f"<{len(numbers)}Q", *numbers)
            self._given.tell(native.DeviceMemory(queue, contents=data), data)
        self._make_counts(queue)
        native.scores(queue, [self._score_call(*asked) for asked in self._scored])
        for level in sorted(self._counted.keys() | self._sought.keys() | self._sought_at_once.keys()):
            native.histogram(queue, [self._histogram_call(*asked) for asked in self._counted[level]])
            native.select(queue, [self._rank_query(*asked) for asked in self._sought[level]], level)
            calls = [self._find_call(*asked) for asked in self._sought_at_once[level]]
            native.find_all(queue, calls, level, counts_bytes=COUNTS_BYTES)
        native.solve_bands(queue, [self._band_query(*asked) for asked in self._banded])
        self._sum(queue)
        self._merge(queue)

    def _make_counts(self, queue: Queue) -> None:
        nbytes = 0
        for counts in self.counts:
            counts.offset = nbytes
            nbytes += counts.nbytes
        if nbytes:
            memory = self._native.DeviceMemory(queue, nbytes=nbytes, zero=True)
            for counts in self.counts:
                counts.memory = memory

    def _histogram_call(
        self, chunk: Chunk, columns: Sequence[KeyColumn], counts: DeviceCounts
    ) -> HistogramCall:
        models = chunk.models
        filled = [
            self._native.HistogramColumn(
                model=models[cast(int, model)].native,
                within=counts.within_address(slot),
                counts=counts.address(slot),
            )
            for slot, model in columns
        ]
        return self._native.HistogramCall(
            base=chunk.base.native,
            columns=filled,
            working=self._structures.dtype(chunk.working),
            level=counts.level,
            count=chunk.count,
        )

    def _rank_query(self, counts: DeviceCounts, rank: Rank, found: Piece) -> RankQuery:
        return self._native.RankQuery(
            counts=counts.address(rank.slot),
            within=counts.within_address(rank.slot),
            rank=rank.rank,
            found=found.address,
        )

    def _find_call(
        self,
        chunk: Chunk,
        sought: Sequence[Sought],
        within: Sequence[PendingFound | None],
        found: Sequence[Sequence[PendingFound]],
    ) -> FindCall:
        columns = [
            self._native.SoughtColumn(
                model=chunk.models[cast(int, one.model)].native,
                within=0 if above is None else above.piece.address,
                ranks=[(rank, key.piece.address) for rank, key in zip(one.ranks, keys, strict=True)],
            )
            for one, above, keys in zip(sought, within, found, strict=True)
        ]
        return self._native.FindCall(
            base=chunk.base.native,
            columns=columns,
            working=self._structures.dtype(chunk.working),
            count=chunk.count,
        )

    def _band_query(self, band: FoundBand, working: DType, solved: Piece) -> BandQuery:
        return self._native.BandQuery(
            band=self._structures.rank_band(band),
            working=self._structures.dtype(working),
            low=band.low.piece.address,
            high=0 if band.high is None else band.high.piece.address,
            solved=solved.address,
        )

    def _sum(self, queue: Queue) -> None:
        native, structures = self._native, self._structures
        masks, _held = self._masks(queue, [(chunk, kept) for chunk, kept, *_ in self._summed])
        norms = [
            native.NormCall(
                base=chunk.base.native,
                models=[model.native for model in chunk.models],
                masks=of_models,
                working=structures.dtype(chunk.working),
                storage_rounding=storage_rounding,
                squared=squared,
                start=chunk.start,
                count=chunk.count,
                sums=sums.piece.address,
            )
            for (chunk, _, storage_rounding, squared, sums), of_models in zip(
                self._summed, masks, strict=True
            )
        ]
        native.l1_norms(queue, norms)
        products = [
            native.GramCall(
                inputs=[array.native for array in chunk.inputs],
                working=structures.dtype(chunk.working),
                of_deltas=of_deltas,
                line=line or WHOLE,
                start=chunk.start,
                count=chunk.count,
                sums=sums.piece.address,
            )
            for chunk, of_deltas, line, sums in self._multiplied
        ]
        native.gram(queue, products)
        native.overlaps(queue, [self._overlap_call(*asked) for asked in self._overlapped])

    def _overlap_call(self, chunk: Chunk, masks: Sequence[Any], counts: Piece) -> OverlapCall:
        return self._native.OverlapCall(
            base=chunk.base.native,
            models=[model.native for model in chunk.models],
            masks=[self._structures.mask(mask) for mask in masks],
            working=self._structures.dtype(chunk.working),
            start=chunk.start,
            count=chunk.count,
            counts=counts.address,
        )

    def _score_call(self, chunk: Chunk, score: Score, scores: DeviceArray) -> ScoreCall:
        inputs = [array.native for array in chunk.inputs]
        working = self._structures.dtype(chunk.working)
        if isinstance(score, Variance):
            return self._native.ScoreCall.variance(
                inputs=inputs,
                storage_rounding=score.storage_rounding,
                working=working,
                count=chunk.count,
                scores=scores.address,
            )
        return self._native.ScoreCall.divergence(
            inputs=inputs, length=score.length, working=working, count=chunk.count, scores=scores.address
        )

    def _merge(self, queue: Queue) -> None:
        asked = [(chunk, [e.mask for e in operation.entries]) for chunk, operation, _, _ in self._merged]
        masks, _held = self._masks(queue, asked)
        merges = [self._consensus_call(*asked, of) for asked, of in zip(self._merged, masks, strict=True)]
        self._native.consensus(queue, merges)
        tables = [self._table(queue, chunk, operation) for chunk, operation, _, _ in self._combined]
        combinations = [
            self._combine_call(*asked, table) for asked, table in zip(self._combined, tables, strict=True)
        ]
        self._native.combine(queue, combinations)
        self._native.nearswap(queue, [self._nearswap_call(*asked) for asked in self._swapped])

    def _table(self, queue: Queue, chunk: Chunk, operation: Combine) -> DeviceMemory | None:
        """The coefficients of the lines that a chunk has elements of, on the device."""
        if operation.lines is None or not chunk.count:
            return None
        return self._native.DeviceMemory(queue, contents=coefficients_of(chunk, operation).tobytes())

    def _nearswap_call(
        self, chunk: Chunk, operation: Nearswap, output: DeviceArray, counters: Piece
    ) -> NearswapCall:
        return self._native.NearswapCall(
            base=chunk.base.native,
            model=chunk.models[0].native,
            output=output.native,
            threshold=operation.threshold,
            storage_rounding=operation.storage_rounding,
            working=self._structures.dtype(chunk.working),
            count=chunk.count,
            non_finite=counters.address,
        )

    def _consensus_call(
        self, chunk: Chunk, operation: Consensus, output: DeviceArray, counters: Piece, masks: Sequence[Mask]
    ) -> ConsensusCall:
        native, structures = self._native, self._structures
        entries = [
            native.Entry(
                model=model.native,
                mask=mask,
                weight=entry.weight,
                rescale=entry.rescale,
                vote_slack=entry.vote_slack,
                retain_slack=entry.retain_slack,
            )
            for model, mask, entry in zip(chunk.models, masks, operation.entries, strict=True)
        ]
        return native.ConsensusCall(
            base=chunk.base.native,
            output=output.native,
            working=structures.dtype(chunk.working),
            entries=entries,
            election=structures.election(operation.election),
            normalize=operation.normalize,
            storage_rounding=operation.storage_rounding,
            scale=operation.scale,
            divisor=operation.divisor,
            wide=operation.wide,
            start=chunk.start,
            count=chunk.count,
            counts=counters.address,
            non_finite=counters.address + 8 * 3 * len(entries),
        )

    def _combine_call(
        self,
        chunk: Chunk,
        operation: Combine,
        output: DeviceArray,
        counters: Piece,
        table: DeviceMemory | None,
    ) -> CombineCall:
        return self._native.CombineCall(
            inputs=[array.native for array in chunk.inputs],
            output=output.native,
            coefficients=operation.coefficients,
            divisor=operation.divisor,
            fused=operation.fused,
            rounded=operation.rounded,
            stepwise=operation.stepwise,
            on_base=operation.on_base,
            line=operation.lines.line if operation.lines else WHOLE,
            of_lines=0 if table is None else table.address,
            working=self._structures.dtype(chunk.working),
            start=chunk.start,
            count=chunk.count,
            non_finite=counters.address,
        )

    def _masks(
        self, queue: Queue, asked: Sequence[tuple[Chunk, Sequence[Any]]]
    ) -> tuple[list[list[Mask]], list[DeviceMemory]]:
        """Native masks for the models of each chunk, and memory that they need until they were launched."""
        native, structures = self._native, self._structures
        nbytes = sum(4 * chunk.count for chunk, masks in asked for mask in masks if isinstance(mask, Ranked))
        held = [native.DeviceMemory(queue, nbytes=nbytes, zero=False)] if nbytes else []
        place = held[0].address if held else 0
        result, ranked, noted = [], [], []
        for chunk, masks in asked:
            made: list[Mask] = []
            notes: dict[Scored, Mask] = {}  # one for all models
            for model, mask in zip(chunk.models, masks, strict=True):
                if isinstance(mask, Scored):
                    if mask not in notes:
                        held.append(
                            native.DeviceMemory(queue, nbytes=8 * -(-max(chunk.count, 1) // 64), zero=False)
                        )
                        noted.append(self._note_call(chunk, mask, held[-1].address))
                        notes[mask] = native.Mask.noted(notes=held[-1].address)
                    made.append(notes[mask])
                    continue
                if isinstance(mask, SolvedMask):
                    made.append(native.Mask.solved(address=mask.piece.address))
                    continue
                made.append(structures.mask(mask, thresholds=place))
                if isinstance(mask, Ranked) and chunk.count:
                    ranked.append(
                        native.RankCall(
                            base=chunk.base.native,
                            model=model.native,
                            working=structures.dtype(chunk.working),
                            line=chunk.line,
                            density=mask.density,
                            epsilon=mask.epsilon,
                            count=chunk.count,
                            thresholds=place,
                        )
                    )
                    place += 4 * chunk.count
            result.append(made)
        native.rank_thresholds(queue, ranked)
        native.note_scores(queue, noted)
        return result, held

    def _note_call(self, chunk: Chunk, mask: Scored, notes: int) -> NoteCall:
        band = mask.mask
        return self._native.NoteCall(
            scores=chunk.noted[mask.score].models[0].native,
            mask=self._native.Mask.solved(address=band.piece.address)
            if isinstance(band, SolvedMask)
            else self._structures.mask(band),
            start=chunk.start,
            count=chunk.count,
            notes=notes,
        )
