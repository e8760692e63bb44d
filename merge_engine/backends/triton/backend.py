"""The Triton backend: kernels written in Python, compiled for the GPU that is there, or interpreted for tests.

Statistics, what is found in them and what is solved from it stay in device memory; only ``fetch`` waits. Three streams
keep both directions of the link and the kernels busy at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch

from merge_engine.backends.base import Backend
from merge_engine.backends.operations import (
    NEAREST,
    Band,
    Chunk,
    Combine,
    Consensus,
    FoundBand,
    KeyColumn,
    Line,
    Mask,
    Nearswap,
    Rank,
    Ranked,
    Score,
    Scored,
    SolvedBand,
    Sought,
    Subject,
    Variance,
    key_dtype,
)
from merge_engine.backends.statistics import (
    NEXT_BITS,
    SUM_BLOCK,
    gram_columns,
    level_bins,
    level_shift,
    sum_block,
)
from merge_engine.backends.structures import check, check_combination, check_lines, coefficients_of
from merge_engine.backends.triton.handles import (
    FoundRow,
    KeptWithoutSlack,
    OverlapRows,
    PendingRows,
    SolvedRow,
    SumRows,
    TorchArray,
    TorchCounts,
)
from merge_engine.backends.triton.link import Copy, TorchLink, free_memory
from merge_engine.backends.triton.rows import band_kind, described_band, found_row, kind_of, mask_row
from merge_engine.dtypes import F64, DType, of_torch
from merge_engine.errors import BackendError, DeviceMemoryError
from merge_engine.kernels import bands as bands_kernels
from merge_engine.kernels import combine as combine_kernels
from merge_engine.kernels import consensus as consensus_kernels
from merge_engine.kernels import exponentials, gram, launching, locate, masks, norms, pairs, ranks
from merge_engine.kernels import histogram as histogram_kernels
from merge_engine.kernels import scores as score_kernels
from merge_engine.kernels import search as search_kernels
from merge_engine.kernels import select as select_kernels

BITS = {16: torch.uint16, 32: torch.uint32, 64: torch.uint64}


class TritonBackend(Backend):
    """Runs the primitives of ``merge_engine.kernels`` on GPU ``device``, by default the current one.

    With TRITON_INTERPRET=1 it is the CPU. Raises ``BackendError`` when there is no such GPU.
    """

    name = "triton"
    depth = 3
    has_link = True

    def __init__(self, device: int | None = None):
        if launching.INTERPRETED:
            self.device = torch.device("cpu")
        elif not torch.cuda.is_available():
            raise BackendError(
                "the triton backend needs a GPU that torch can use, and there is none; choose cpu (or set "
                "TRITON_INTERPRET=1 to have its kernels interpreted on the CPU, a thousand times as slowly)"
            )
        else:
            index = torch.cuda.current_device() if device is None else device
            if index >= torch.cuda.device_count():
                raise BackendError(f"there is no GPU {index}, only 0 to {torch.cuda.device_count() - 1}")
            self.device = torch.device("cuda", index)
        self.tensors_on = str(self.device)
        if launching.INTERPRETED:
            self.depth, self.has_link = 1, False
        self._link: TorchLink | None = None
        self._table: torch.Tensor | None = None

    def attach(self, nbytes: int, scratch: int, staging: memoryview) -> memoryview:
        """Take memory of the device; interpreted, of the host (see ``Backend.attach``)."""
        if not self.has_link:
            return super().attach(nbytes, scratch, staging)
        self._link = TorchLink(nbytes, scratch, staging, self.device)
        return self._link.memory

    def detach(self) -> None:
        """Wait for all work and release the memory (see ``Backend.detach``)."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def upload(self, source: memoryview, target: memoryview) -> None:
        """Copy to the device (see ``Backend.upload``)."""
        assert self._link is not None, "memory is attached before it is filled"
        self._link.upload(source, target)

    def download(self, source: memoryview, target: memoryview) -> None:
        """Copy from the device (see ``Backend.download``)."""
        assert self._link is not None, "memory is attached before it is read"
        self._link.download(source, target)

    def free_memory(self) -> int | None:
        """Bytes that nobody has taken, other processes included (see ``Backend.free_memory``)."""
        return free_memory(self.device) if self.has_link else None

    def fetch(self, value: Any) -> Any:
        """Wait for a value (see ``Backend.fetch``)."""
        if isinstance(value, TorchCounts):
            with self._working():
                return value.fetch()
        if isinstance(value, FoundRow | KeptWithoutSlack | OverlapRows | PendingRows | SumRows):
            return value.fetch()
        if isinstance(value, Copy):
            value.wait()
            return None
        return value

    def mark(self) -> Any:
        """Mark what was asked for so far (see ``Backend.mark``)."""
        with self._working():
            return Copy.of(torch.empty(0, dtype=torch.int64, device=self.device))

    def array(self, memory: memoryview, dtype: DType) -> TorchArray:
        """Take a piece of the attached memory; interpreted, of the host's (see ``Backend.array``)."""
        elements = self._wrapped(memory) if self._link is None else self._link.piece(memory)
        return TorchArray(elements.view(BITS[dtype.bits]), dtype)

    def tensor(self, tensor: torch.Tensor) -> TorchArray:
        """Wrap a contiguous tensor on the device (see ``Backend.tensor``)."""
        if tensor.device != self.device or not tensor.is_contiguous():
            raise BackendError(
                f"the triton backend on {self.device} needs contiguous tensors there, got one on {tensor.device}"
            )
        dtype = of_torch(tensor.dtype)
        assert dtype is not None, "operands have types of checkpoints"
        return TorchArray(tensor.detach().view(-1).view(BITS[dtype.bits]), dtype)

    def new_counts(self, level: int, within: Sequence[Any]) -> TorchCounts:
        """Make empty counts (see ``Backend.new_counts``)."""
        shape = (len(within), histogram_kernels.COPIES, level_bins(level))
        with self._working():
            found = self._rows([found_row(one) for one in within]).view(-1, 3)
            counts = torch.zeros(shape, dtype=torch.int64, device=self.device)
            return TorchCounts(level, found, counts)

    def count(self, chunk: Chunk, columns: Sequence[KeyColumn], counts: TorchCounts) -> None:
        """Count magnitude keys (see ``Backend.count``)."""
        check(chunk)
        for subject in dict.fromkeys(column.model for column in columns if not isinstance(column.model, int)):
            own = [KeyColumn(slot, 0) for slot, model in columns if model == subject]
            self.count(self._scores(chunk, subject), own, counts)
        columns = [column for column in columns if isinstance(column.model, int)]
        if not columns:
            return
        models = [chunk.models[cast(int, column.model)] for column in columns]
        with self._working():
            slots = self._integers([column.slot for column in columns])
            histogram_kernels.histogram(
                chunk.base.bits,
                [model.bits for model in models],
                _codes(chunk.base, *models),
                chunk.working.code,
                level_shift(chunk.working, counts.level),
                slots,
                counts.within[slots] if counts.level else None,
                counts.of_bins,
            )

    def find(self, counts: TorchCounts, ranks: Sequence[Rank]) -> list[FoundRow]:
        """Find keys by rank (see ``Backend.find``)."""
        with self._working():
            asked = self._integers(ranks).view(-1, 2)
            above = counts.within[asked[:, 0]]
            found = torch.empty_like(above)
            select_kernels.select(counts.of_bins, torch.cat([asked, above], 1), found, NEXT_BITS)
            copy = Copy.of(found)
        return [FoundRow(found[i], copy, i) for i in range(len(ranks))]

    def find_all(self, chunk: Chunk, level: int, sought: Sequence[Sought]) -> list[list[FoundRow]]:
        """Find keys by rank, mostly without counting all keys (see ``Backend.find_all``)."""
        if any(not isinstance(one.model, int) for one in sought):
            return [
                found
                for one in sought
                for found in (
                    super().find_all(chunk, level, [one])
                    if isinstance(one.model, int)
                    else self.find_all(self._scores(chunk, one.model), level, [one._replace(model=0)])
                )
            ]
        if level or chunk.count < search_kernels.WORTH_SEARCHING:
            return super().find_all(chunk, level, sought)
        check(chunk)
        models = [chunk.models[cast(int, one.model)] for one in sought]
        asked = [(place, rank) for place, one in enumerate(sought) for rank in one.ranks]
        with self._working():
            queries = [(place, search_kernels.sampled_rank(rank, chunk.count), rank) for place, rank in asked]
            found = torch.empty((len(asked), 3), dtype=torch.int64, device=self.device)
            search_kernels.search(
                chunk.base.bits,
                [model.bits for model in models],
                _codes(chunk.base, *models),
                chunk.working.code,
                level_shift(chunk.working, 0),
                self._integers(queries),
                [place for place, _ in asked],
                found,
            )
            copy = Copy.of(found)
        rows = iter([FoundRow(found[i], copy, i) for i in range(len(asked))])
        return [[next(rows) for _ in one.ranks] for one in sought]

    def bands(self, bands: Sequence[FoundBand], working: DType) -> list[SolvedBand]:
        """Turn ranks into masks (see ``Backend.bands``)."""
        if not bands:
            return []
        with self._working():
            described = self._integers([described_band(band) for band in bands])
            low, high = (
                self._rows([found_row(found) for found in side])
                for side in ([band.low for band in bands], [band.high for band in bands])
            )
            rows = torch.empty((len(bands), masks.ROW.value), dtype=torch.int64, device=self.device)
            factors = self._doubles([1.0 - band.mask.slack for band in bands])
            bands_kernels.bands(torch.cat([described, low, high], 1), factors, rows, working.code)
            copy = Copy.of(rows)
        solved = []
        for i, band in enumerate(bands):
            has_top = band.high is not None
            # With slack every tie at the lower end stays, and none of them is drawn for.
            by_draw = band.mask.ties == "spread" and (has_top or band.mask.slack == 0)
            mask = SolvedRow(rows[i], copy, i, band_kind(by_draw, has_top))
            solved.append(SolvedBand(mask, KeptWithoutSlack(mask) if band.mask.slack > 0 else None))
        return solved

    def locate(self, chunk: Chunk, model: Subject, key: int, nth: int) -> tuple[int, int | None]:
        """Find the n-th occurrence of a key (see ``Backend.locate``)."""
        check(chunk)
        if not isinstance(model, int):
            chunk, model = self._scores(chunk, model), 0
        tuned = chunk.models[model]
        with self._working():
            found, offset = locate.locate(
                chunk.base.bits, tuned.bits, _codes(chunk.base, tuned), chunk.working.code, key, nth
            )
        return found, offset

    def l1_norms(self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool) -> SumRows:
        """Sum magnitudes before and after the masks (see ``Backend.l1_norms``)."""
        return self._masked_sums(chunk, masks, storage_rounding, squared=False)

    def squares(self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool) -> SumRows:
        """Sum squares before and after the masks (see ``Backend.squares``)."""
        return self._masked_sums(chunk, masks, storage_rounding, squared=True)

    def _masked_sums(
        self, chunk: Chunk, masks: Sequence[Any], storage_rounding: bool, squared: bool
    ) -> SumRows:
        check(chunk)
        with self._working():
            sums = norms.block_sums(chunk.count, 2 * len(masks), self.device)
            rows = self._masks(masks, chunk.working)
            for i, (model, mask) in enumerate(zip(chunk.models, masks, strict=True)):
                norms.l1_norms(
                    chunk.base.bits,
                    model.bits,
                    _codes(chunk.base, model),
                    chunk.working.code,
                    chunk.start,
                    kind_of(mask),
                    rows[i],
                    self._thresholds(chunk, model, mask),
                    storage_rounding,
                    squared,
                    sums[:, 2 * i :],
                )
            return _sum_rows(sums, chunk)

    def overlaps(self, chunk: Chunk, masks: Sequence[Any]) -> OverlapRows:
        """Count what models keep alone and together (see ``Backend.overlaps``)."""
        check(chunk)
        with self._working():
            counts = torch.zeros((len(masks), 2), dtype=torch.int64, device=self.device)
            pairs.overlaps(
                chunk.base.bits,
                [model.bits for model in chunk.models],
                _codes(chunk.base, *chunk.models),
                chunk.working.code,
                chunk.start,
                [kind_of(mask) for mask in masks],
                self._masks(masks, chunk.working),
                counts,
            )
            return OverlapRows(Copy.of(counts))

    def gram(self, chunk: Chunk, of_deltas: bool = False, line: Line | None = None) -> SumRows:
        """Sum inner products of all inputs or task vectors (see ``Backend.gram``)."""
        check_lines(chunk, line)
        columns, block = gram_columns(chunk, of_deltas, line), sum_block(line)
        with self._working():
            if line is None:
                sums = norms.block_sums(chunk.count, columns, self.device)
            else:
                blocks = -(-chunk.count // block)
                sums = torch.zeros((blocks, columns), dtype=torch.float64, device=self.device)
            bits = [array.bits for array in chunk.inputs]
            codes = _codes(*chunk.inputs)
            gram.gram(bits, codes, chunk.working.code, of_deltas, chunk.start, line, block, sums)
            return _sum_rows(sums, chunk, block)

    def consensus(self, chunk: Chunk, operation: Consensus, output: TorchArray) -> PendingRows:
        """Merge task vectors (see ``Backend.consensus``)."""
        check(chunk, output)
        entries = operation.entries
        numbers = [
            number
            for entry in entries
            for number in (entry.rescale, entry.weight, 1.0 + entry.vote_slack, entry.retain_slack)
        ]
        weights = tuple([entry.weight for entry in entries])
        reciprocals = consensus_kernels.reciprocals_of(
            weights, chunk.working.code, operation.storage_rounding
        )
        with self._working():
            counts = self._new_counts(len(chunk.inputs))
            consensus_kernels.consensus(
                chunk.base.bits,
                [model.bits for model in chunk.models],
                output.bits,
                _codes(chunk.base, *chunk.models, output),
                chunk.working.code,
                chunk.start,
                [kind_of(entry.mask) for entry in entries],
                self._masks([entry.mask for entry in entries], chunk.working),
                [
                    self._thresholds(chunk, model, entry.mask)
                    for model, entry in zip(chunk.models, entries, strict=True)
                ],
                self._reals([*numbers, operation.scale, operation.divisor], chunk.working),
                self._doubles(reciprocals),
                counts,
                election=operation.election,
                normalize=operation.normalize,
                storage_rounding=operation.storage_rounding,
                wide=operation.wide,
                vote_slack=any(entry.vote_slack != 0 for entry in entries),
                retain_slack=any(entry.retain_slack != 0 for entry in entries),
            )
            return PendingRows(Copy.of(counts), len(entries))

    def combine(self, chunk: Chunk, operation: Combine, output: TorchArray) -> PendingRows:
        """Write a linear combination (see ``Backend.combine``)."""
        check_combination(chunk, operation, output)
        if operation.fused and chunk.working == F64:
            raise BackendError("the triton backend has no fused multiply-add in float64; choose cpu")
        with self._working():
            counts = self._new_counts(len(chunk.inputs))
            lines = operation.lines
            numbers = (
                [*operation.coefficients, operation.divisor or 1.0]
                if lines is None
                else coefficients_of(chunk, operation)
            )
            combine_kernels.combine(
                [array.bits for array in chunk.inputs],
                output.bits,
                _codes(*chunk.inputs, output),
                chunk.working.code,
                self._reals(numbers, chunk.working),
                counts,
                divides=operation.divisor is not None,
                fused=operation.fused,
                rounded=operation.rounded,
                stepwise=operation.stepwise,
                on_base=operation.on_base,
                start=chunk.start,
                line=None if lines is None else lines.line,
            )
            return PendingRows(Copy.of(counts), 0)

    def nearswap(self, chunk: Chunk, operation: Nearswap, output: TorchArray) -> PendingRows:
        """Move the base to the model where they are near (see ``Backend.nearswap``)."""
        check(chunk, output)
        with self._working():
            counts = self._new_counts(2)
            pairs.nearswap(
                *(array.bits for array in (*chunk.inputs, output)),
                _codes(*chunk.inputs, output),
                chunk.working.code,
                self._reals([operation.threshold, NEAREST, 1.0], chunk.working),
                counts,
                storage_rounding=operation.storage_rounding,
            )
            return PendingRows(Copy.of(counts), 0)

    def _scores(self, chunk: Chunk, score: Score) -> Chunk:
        """The scores of a chunk as the only model of another, over zeros. The chunk remembers them."""
        noted: dict[Any, Any] = chunk.noted or {}
        if score not in noted:
            real, working = key_dtype(score, chunk.working), chunk.working.code
            with self._working():
                zeros = torch.zeros(
                    chunk.count, dtype={32: torch.int32, 64: torch.int64}[real.bits], device=self.device
                )
                found = torch.empty(chunk.count, dtype=BITS[real.bits], device=self.device)
                if isinstance(score, Variance):
                    bits = [array.bits for array in chunk.inputs]
                    score_kernels.variances(
                        bits, _codes(*chunk.inputs), working, score.storage_rounding, found
                    )
                else:
                    base, model = chunk.inputs
                    if self._table is None:
                        self._table = self._doubles(exponentials.TABLE)
                    score_kernels.importances(
                        base.bits,
                        model.bits,
                        _codes(base, model),
                        working,
                        score.length,
                        self._table,
                        found,
                    )
            inputs = [TorchArray(zeros.view(BITS[real.bits]), real), TorchArray(found, real)]
            noted = chunk.noted = {**noted, score: Chunk(inputs, True, real, chunk.start, chunk.count)}
        scored: Chunk = noted[score]
        return scored

    def _notes(self, chunk: Chunk, mask: Scored) -> torch.Tensor:
        """uint32 for each element, not 0 where the mask keeps its score. The chunk remembers them."""
        scored = self._scores(chunk, mask.score)
        noted: dict[Any, Any] = chunk.noted
        if mask not in noted:
            notes = torch.empty(chunk.count, dtype=torch.uint32, device=self.device)
            row = self._masks([mask.mask], scored.working)[0]
            score_kernels.note(
                scored.models[0].bits, scored.working.code, chunk.start, kind_of(mask.mask), row, notes
            )
            noted = chunk.noted = {**noted, mask: notes}
        found: torch.Tensor = noted[mask]
        return found

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Makes the stream current that kernels go to: the link's, or else torch's own.

        Raises ``DeviceMemoryError`` when there is too little memory for what masks and counts take.
        """
        streams: AbstractContextManager[Any] = nullcontext()
        if self._link is not None:
            streams = torch.cuda.stream(self._link.compute)
        elif not launching.INTERPRETED:
            streams = torch.cuda.device(self.device)
        try:
            with streams:
                yield
        except torch.cuda.OutOfMemoryError:
            raise DeviceMemoryError(
                f"GPU {self.device.index} ran out of memory; give the merge less of it (memory), end what else "
                "uses the GPU, or merge on the CPU"
            ) from None

    def _wrapped(self, memory: memoryview) -> torch.Tensor:
        if not launching.INTERPRETED:
            raise BackendError("the triton backend reaches host memory only once it is attached")
        return (
            torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(0, dtype=torch.uint8)
        )

    def _new_counts(self, inputs: int) -> torch.Tensor:
        """A row for each input and one for the output."""
        return torch.zeros((inputs + 1, 4), dtype=torch.int64, device=self.device)

    def _integers(self, values: Sequence[Any]) -> torch.Tensor:
        return self._sent(torch.tensor(values, dtype=torch.int64))

    def _doubles(self, values: Sequence[float]) -> torch.Tensor:
        return self._sent(torch.tensor(values, dtype=torch.float64))

    def _reals(self, values: Sequence[float], working: DType) -> torch.Tensor:
        """Numbers in the type of the arithmetic, which may be infinite in it."""
        exact = torch.tensor(values, dtype=torch.float64)
        return self._sent(exact if working == F64 else exact.to(torch.float32))

    def _sent(self, known: torch.Tensor) -> torch.Tensor:
        """A few numbers on the device. They come from pinned memory, so that nothing waits for the copy."""
        held = known if launching.INTERPRETED else known.pin_memory()
        return held.to(self.device, non_blocking=True)

    def _rows(self, rows: Sequence[Sequence[int] | torch.Tensor]) -> torch.Tensor:
        """A table of rows, some of which the host knows and some the device."""
        known = [row for row in rows if not isinstance(row, torch.Tensor)]
        if len(known) == len(rows):
            return self._integers(known)
        uploaded = iter(self._integers(known))
        return torch.stack([row if isinstance(row, torch.Tensor) else next(uploaded) for row in rows])

    def _masks(self, of_models: Sequence[Any], working: DType) -> torch.Tensor:
        """A table of masks (see kernels/masks.py)."""
        rows = self._rows([mask_row(mask) for mask in of_models])
        bands = [place for place, mask in enumerate(of_models) if isinstance(mask, Band)]
        if bands:
            places = self._integers(bands)
            known = rows[places]
            by_draw = self._integers([of_models[place].by_draw for place in bands])
            masks.resolve(known, by_draw, working.code)
            rows[places] = known
        return rows

    def _thresholds(self, chunk: Chunk, model: TorchArray, mask: Mask) -> torch.Tensor:
        """The thresholds of a ranked mask, what was noted of scores; for others, something to point at."""
        if isinstance(mask, Scored):
            return self._notes(chunk, mask)
        if not isinstance(mask, Ranked):
            unused: torch.Tensor = chunk.base.bits
            return unused
        result: torch.Tensor = torch.empty(chunk.count, dtype=torch.uint32, device=self.device)
        ranks.rank_thresholds(
            chunk.base.bits,
            model.bits,
            _codes(chunk.base, model),
            chunk.working.code,
            *chunk.line,
            self._doubles([mask.density - mask.epsilon, 2 * mask.epsilon]),
            result,
        )
        return result


def _sum_rows(sums: torch.Tensor, chunk: Chunk, block: int = SUM_BLOCK) -> SumRows:
    blocks = -(-chunk.count // block)
    return SumRows(Copy.of(sums[:blocks]), chunk.start, block)


def _codes(*arrays: TorchArray) -> tuple[str, ...]:
    return tuple(array.dtype.code for array in arrays)
