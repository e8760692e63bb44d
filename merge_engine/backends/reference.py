"""The reference backend: every primitive in plain torch operations, one line for one line of the formulas.

Slow and meant to be obviously right; every other backend is tested against it, byte for byte. Runs on any
torch device.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch

from merge_engine.backends.base import Backend
from merge_engine.backends.operations import (
    EVERY_POSITION,
    NEAREST,
    NO_POSITION,
    NOTHING,
    Band,
    Chunk,
    Combine,
    Consensus,
    Counts,
    Dense,
    Draw,
    Found,
    FoundBand,
    KeyColumn,
    Line,
    LineCoefficients,
    Mask,
    Nearswap,
    Outcome,
    Overlap,
    Positions,
    Rank,
    Ranked,
    Score,
    Scored,
    SolvedBand,
    Subject,
    Variance,
    key_dtype,
)
from merge_engine.backends.scores import divergences, variances
from merge_engine.backends.statistics import (
    NEXT_BITS,
    SUM_BLOCK,
    SUM_LANES,
    BlockSums,
    KeyTable,
    level_bins,
    level_shift,
    lines_of_block,
    sum_block,
)
from merge_engine.dtypes import BY_NAME, DType
from merge_engine.errors import BackendError

Rounding = Callable[[torch.Tensor], torch.Tensor]


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch type of the same name."""
    result: torch.dtype = getattr(torch, dtype.name)
    return result


def real_dtype(working: DType) -> torch.dtype:
    """What arithmetic runs in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if working.name == "float64" else torch.float32


def to_odd(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Float32 between ``exact`` (float64) and zero, with a set last bit where the two differ.

    Rounding such a value once more gives what rounding ``exact`` once would have given.
    """
    bits = rounded.view(torch.int32)
    toward_zero = torch.where(rounded.double().abs() > exact.abs(), bits - 1, bits)
    inexact = (rounded.double() != exact) & ~exact.isnan()
    return torch.where(inexact, toward_zero | 1, bits).view(torch.float32)


def round_to(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """RN to ``dtype``, ties to even, in one rounding, with one NaN for all."""
    target = torch_dtype(dtype)
    if values.dtype == torch.float64 and dtype.bits == 16:
        values = to_odd(values, values.float())
    rounded = values.to(target)
    return torch.where(
        rounded.isnan(), torch.tensor(float("nan"), dtype=target, device=rounded.device), rounded
    )


def keys_of(delta: torch.Tensor, working: DType) -> torch.Tensor:
    """The bits of RN(|delta|) in the working dtype as int64."""
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[working.bits]
    bits: torch.Tensor = round_to(delta.abs(), working).view(integer).long()
    return torch.bitwise_and(bits, 2 ** (working.bits - 1) - 1)


def _multiply(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of 32-bit numbers held in int64, which itself would overflow."""
    high, low = a * (constant >> 16), a * (constant & 0xFFFF)
    top = (high + (low >> 16)) >> 16
    bottom = ((high & 0xFFFF) << 16) + low
    return top, bottom & 0xFFFFFFFF


def philox(key: int, counter: torch.Tensor, stream: int) -> list[torch.Tensor]:
    """Four 32-bit words of Philox 4x32-10, as int64, for counters with these low 64 bits and a stream above them."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    c0, c1 = counter & 0xFFFFFFFF, counter >> 32 & 0xFFFFFFFF
    c2, c3 = (torch.full_like(counter, word) for word in (stream & 0xFFFFFFFF, stream >> 32))
    for _ in range(10):
        even_high, even_low = _multiply(c0, 0xD2511F53)
        odd_high, odd_low = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = odd_high ^ c1 ^ k0, odd_low, even_high ^ c3 ^ k1, even_low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def draws(key: int, index: torch.Tensor) -> torch.Tensor:
    """The 32-bit draw of each flat index: a byte of a block of stream 0 above 24 bits of a word of stream 1."""
    top = _word(key, index // 16, 0, index % 16 // 4) >> (8 * (index % 4)) & 0xFF
    lower = _word(key, index // 4, 1, index % 4) & 0xFFFFFF
    return top << 24 | lower


def _word(key: int, block: torch.Tensor, stream: int, word: torch.Tensor) -> torch.Tensor:
    """One word of each block."""
    words = torch.stack(philox(key, block, stream))
    return torch.gather(words, 0, word.unsqueeze(0)).squeeze(0)


def sums_of_blocks(values: torch.Tensor) -> list[float]:
    """The sums of blocks of 4096 float64 values, each as 64 interleaved running sums that are then halved."""
    sums = []
    for block in torch.split(values, SUM_BLOCK) if len(values) else ():
        rows = torch.nn.functional.pad(block, (0, -len(block) % SUM_LANES)).view(-1, SUM_LANES)
        lanes = torch.zeros(SUM_LANES, dtype=torch.float64, device=values.device)
        for row in rows:
            lanes = lanes + row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        sums.append(lanes.item())
    return sums


def add_in_order(sums: Sequence[float], columns: int) -> list[float]:
    """The totals of the columns of [blocks, columns] sums: blocks are added in order."""
    totals = [0.0] * columns
    for i, value in enumerate(sums):
        totals[i % columns] += value
    return totals


def rank_thresholds(keys: torch.Tensor, line: Line, density: float, epsilon: float) -> torch.Tensor:
    """floor(2^32 * p) of every element: p from its mean rank among the keys of its line, scaled to 0..1."""
    lines = keys.view(-1, line.length, line.stride).transpose(1, 2).contiguous()
    ordered = lines.sort(dim=-1).values
    smaller = torch.searchsorted(ordered, lines, side="left")
    equal = torch.searchsorted(ordered, lines, side="right") - smaller
    if line.length > 1:
        scaled = (2 * smaller + equal - 1).double() / float(2 * (line.length - 1))
    else:
        scaled = torch.full_like(smaller, 0.5, dtype=torch.float64)
    probability = (density - epsilon) + (2 * epsilon) * scaled
    thresholds = (probability * 2.0**32).clamp(
        max=2.0**32 - 1
    )  # rounding may lift a probability to exactly 1
    return thresholds.long().transpose(1, 2).reshape(-1)


def relaxed_key(key: int, slack: float, working: DType) -> int:
    """The key of RN(float32(1 - slack) * magnitude(key)), in double for float64."""
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[working.bits]
    real = real_dtype(working)
    magnitude = torch.tensor([key], dtype=integer, device="cpu").view(torch_dtype(working)).to(real)
    return int(keys_of(torch.tensor(1.0 - slack, dtype=real, device="cpu") * magnitude, working))


def solve_band(band: FoundBand, working: DType) -> SolvedBand:
    """The keys that a trim keeps, and what becomes of the ties at its thresholds.

    A zero carries nothing, so zeros are never kept.
    """
    asked, low, high = band.mask, band.low, band.high
    low_kept = asked.last - low.above
    high_kept = 0 if high is None else high.equal - (asked.first - 1 - high.above)
    if high is not None and high.key == low.key and asked.slack == 0:
        low_kept = high_kept = asked.last - asked.first + 1

    low_key, kept_without_slack = low.key, None
    low_positions = _share(low_kept, low.equal) if asked.ties == "spread" else band.low_positions
    if asked.slack > 0:
        every = asked.ties == "all"
        top = high.above if high is not None and every else asked.first - 1
        bottom = low.above if low.key == 0 else low.above + low.equal if every else asked.last
        kept_without_slack = max(bottom - top, 0)  # 0: the band lies among the zeros
        low_key, low_positions = relaxed_key(low.key, asked.slack, working), EVERY_POSITION
    if low_key == 0:
        low_key, low_positions = 1, EVERY_POSITION
    by_draw = asked.ties == "spread"
    if high is None:
        mask: Mask = Band(low_key, low_positions=low_positions, by_draw=by_draw, random_key=asked.random_key)
        return SolvedBand(mask, kept_without_slack)
    if high.key < low_key:
        return SolvedBand(NOTHING, kept_without_slack)
    high_positions = _share(high_kept, high.equal) if by_draw else band.high_positions
    mask = Band(low_key, high.key, low_positions, high_positions, by_draw, asked.random_key)
    return SolvedBand(mask, kept_without_slack)


def _share(kept: int, equal: int) -> Positions:
    """The draws that let about ``kept`` of ``equal`` elements stay."""
    below = (kept << 32) // equal
    return (0, below - 1) if below else NO_POSITION


@dataclass
class _Counts:
    level: int
    within: list[Found | None]  # of each slot
    of_slots: list[torch.Tensor]  # [bins] each

    def tables(self) -> list[KeyTable]:
        return [
            KeyTable(self.level, None if within is None else within.key, array("Q", counts.tolist()))
            for within, counts in zip(self.within, self.of_slots, strict=True)
        ]


class ReferenceBackend(Backend):
    """Plain torch on the device of its inputs."""

    name = "reference"

    def array(self, memory: memoryview, dtype: DType) -> torch.Tensor:
        """Wrap host memory (see ``Backend.array``)."""
        if not len(memory):
            return torch.empty(0, dtype=torch_dtype(dtype), device="cpu")
        return torch.frombuffer(memory, dtype=torch_dtype(dtype))

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Wrap a tensor on any device (see ``Backend.tensor``)."""
        return tensor.detach().view(-1)

    def fetch(self, value: Any) -> Any:
        """Look at a value (see ``Backend.fetch``)."""
        return value.tables() if isinstance(value, _Counts) else value

    def new_counts(self, level: int, within: Sequence[Found | None]) -> _Counts:
        """Make empty counts (see ``Backend.new_counts``)."""
        tables = [torch.zeros(level_bins(level), dtype=torch.int64, device="cpu") for _ in within]
        return _Counts(level, list(within), tables)

    def count(self, chunk: Chunk, columns: Sequence[KeyColumn], counts: _Counts) -> None:
        """Count magnitude keys (see ``Backend.count``)."""
        bins = level_bins(counts.level)
        for slot, model in columns:
            keys = _keys(chunk, model) >> level_shift(key_dtype(model, chunk.working), counts.level)
            within = counts.within[slot]
            if within is not None:
                keys = keys[keys >> NEXT_BITS == within.key] & (bins - 1)
            counts.of_slots[slot] += torch.bincount(keys, minlength=bins).cpu()

    def find(self, counts: _Counts, ranks: Sequence[Rank]) -> list[Found]:
        """Find keys by rank (see ``Backend.find``)."""
        result = []
        for slot, rank in ranks:
            key, above, _ = counts.within[slot] or Found(0, 0, 0)
            of_bins = counts.of_slots[slot]
            at_least = of_bins.flip(0).cumsum(0).flip(0)  # at_least[b]: elements in bin b and above
            if not 0 < rank - above <= int(at_least[0]):
                raise IndexError("no key of this rank was counted")
            bin_ = int((at_least >= rank - above).nonzero().max())
            equal = int(of_bins[bin_])
            result.append(Found(key << NEXT_BITS | bin_, above + int(at_least[bin_]) - equal, equal))
        return result

    def bands(self, bands: Sequence[FoundBand], working: DType) -> list[SolvedBand]:
        """Turn ranks into masks (see ``Backend.bands``)."""
        return [solve_band(band, working) for band in bands]

    def locate(self, chunk: Chunk, model: Subject, key: int, nth: int) -> tuple[int, int | None]:
        """Find the n-th occurrence of a key (see ``Backend.locate``)."""
        places = (_keys(chunk, model) == key).nonzero().view(-1)
        offset = int(places[nth]) if nth < len(places) else None
        return len(places), offset

    def l1_norms(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> BlockSums:
        """Sum magnitudes before and after the masks (see ``Backend.l1_norms``)."""
        rounding = _rounding(chunk.working, storage_rounding)
        columns = []
        for model, mask in enumerate(masks):
            delta = rounding(_delta(chunk, model))
            magnitude = delta.abs().double()
            kept, _ = _mask(chunk, delta, mask)
            columns.append(sums_of_blocks(magnitude))
            columns.append(sums_of_blocks(torch.where(kept, magnitude, 0.0)))
        return _block_sums(chunk, columns)

    def squares(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> BlockSums:
        """Sum squares before and after the masks (see ``Backend.squares``)."""
        rounding = _rounding(chunk.working, storage_rounding)
        columns = []
        for model, mask in enumerate(masks):
            delta = rounding(_delta(chunk, model))
            kept, _ = _mask(chunk, delta, mask)
            square = rounding(delta * delta) if storage_rounding else delta.double() * delta.double()
            columns.append(sums_of_blocks(square.double()))
            columns.append(sums_of_blocks(torch.where(kept, square.double(), 0.0)))
        return _block_sums(chunk, columns)

    def overlaps(self, chunk: Chunk, masks: Sequence[Mask]) -> tuple[Overlap, ...]:
        """Count what models keep alone and together (see ``Backend.overlaps``)."""
        kept = torch.stack([_mask(chunk, _delta(chunk, model), mask)[0] for model, mask in enumerate(masks)])
        alone = kept.sum(0) == 1
        return tuple(Overlap(int((one & alone).sum()), int((one & ~alone).sum())) for one in kept)

    def gram(self, chunk: Chunk, of_deltas: bool = False, line: Line | None = None) -> BlockSums:
        """Sum inner products of all inputs or task vectors (see ``Backend.gram``)."""
        if of_deltas:
            vectors = [_delta(chunk, model).double() for model in range(len(chunk.models))]
        else:
            vectors = [_load(array, chunk.working).double() for array in chunk.inputs]
        products = [one * other for one, other in combinations_with_replacement(vectors, 2)]
        if line is None:
            return _block_sums(chunk, [sums_of_blocks(product) for product in products])
        sums: list[float] = []
        for first in range(0, chunk.count, sum_block(line)):
            block = slice(first, first + sum_block(line))
            sums += _sums_of_lines([product[block] for product in products], line, chunk.start + first)
        columns = lines_of_block(line) * len(products)
        return BlockSums.of(chunk.start, columns, array("d", sums), sum_block(line))

    def consensus(self, chunk: Chunk, operation: Consensus, output: torch.Tensor) -> Outcome:
        """Merge task vectors (see ``Backend.consensus``)."""
        rn = _rounding(chunk.working, operation.storage_rounding)
        base = _load(chunk.base, chunk.working)
        real, device = base.dtype, base.device

        def number(value: float) -> torch.Tensor:
            return torch.tensor(value, dtype=real, device=device)

        values, deltas, survivors, weights = [], [], [], []
        for model, entry in enumerate(operation.entries):
            delta = rn(_delta(chunk, model))
            kept, probability = _mask(chunk, delta, entry.mask)
            if probability is not None:
                delta = torch.where(kept, rn(delta * (1.0 / probability).to(real)), 0.0)
            else:
                delta = rn(delta * rn(self.rescaling(delta, kept, entry.rescale)))
            weight = number(entry.weight) if operation.wide else rn(number(entry.weight))
            values.append(torch.where(kept, rn(delta * weight), number(0.0)))
            deltas.append(torch.where(kept, delta, number(0.0)))
            survivors.append(kept & (delta != 0))
            weights.append(weight)
        if operation.election == "overlap":
            return self._overlap(chunk, operation, deltas, weights, output)

        votes = deltas if operation.election == "deltas" else values
        vote = plain_vote = spread = torch.zeros_like(base)
        for say, entry in zip(votes, operation.entries, strict=True):
            say = say.sign() if operation.election == "count" else say
            plain_vote = plain_vote + say
            vote = vote + say * number(1.0 + entry.vote_slack)
            spread = spread + say.abs()
        elected, plainly_elected = rn(vote) >= 0, rn(plain_vote) >= 0

        mean = divisor = torch.zeros_like(base)
        counts = []
        for i, (value, kept, weight, entry) in enumerate(
            zip(values, survivors, weights, operation.entries, strict=True)
        ):
            voted = votes[i] != 0
            if operation.election == "none":
                retained, lost, saved = voted, 0, 0
                divisor = number(operation.divisor).expand_as(base)
            else:
                agrees = (votes[i] > 0) == elected
                narrow = (rn(vote).abs() < number(entry.retain_slack) * spread) | (entry.retain_slack >= 1)
                retained = voted & (agrees | narrow)
                divisor = divisor + torch.where(retained, weight, number(0.0))
                lost = int((voted & ~retained).sum())
                saved = int((retained & ((votes[i] > 0) != plainly_elected)).sum())
            mean = mean + torch.where(retained, value, number(0.0))
            counts.append(Counts(int(kept.sum()), lost, saved))

        rn = _rounding(chunk.working, operation.storage_rounding and not operation.wide)
        mean, divisor = rn(mean), divisor if operation.election == "none" else rn(divisor)
        if operation.normalize:
            mean = rn(mean / torch.where(divisor == 0, number(1.0), divisor))
        if operation.scale != 1:
            mean = rn(mean * number(operation.scale))
        _store(rn(base + mean), output)
        return Outcome(tuple(counts), _non_finite(chunk), int((~output.isfinite()).sum()))

    def rescaling(self, delta: torch.Tensor, kept: torch.Tensor, factor: float) -> torch.Tensor:
        """The factor for the entries ``kept`` of a task vector, in its type."""
        return torch.tensor(factor, dtype=delta.dtype, device=delta.device)

    def _overlap(
        self,
        chunk: Chunk,
        operation: Consensus,
        deltas: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        output: torch.Tensor,
    ) -> Outcome:
        """Where one model keeps an element, its weight counts; where more do, their number."""
        rn = _rounding(chunk.working, operation.storage_rounding)
        rn_sum = _rounding(chunk.working, operation.storage_rounding and not operation.wide)
        base = _load(chunk.base, chunk.working)
        keeping = torch.zeros_like(base)
        for delta in deltas:
            keeping = keeping + (delta != 0)
        mean = torch.zeros_like(base)
        for delta, weight in zip(deltas, weights, strict=True):
            part = torch.where(keeping > 1, rn(delta / keeping), rn_sum(delta * weight))
            mean = mean + torch.where(delta != 0, part, 0.0)
        mean = rn_sum(mean)
        if operation.scale != 1:
            mean = rn_sum(mean * torch.tensor(operation.scale, dtype=base.dtype, device=base.device))
        _store(rn_sum(base + mean), output)
        counts = tuple(Counts(int((delta != 0).sum()), 0, 0) for delta in deltas)
        return Outcome(counts, _non_finite(chunk), int((~output.isfinite()).sum()))

    def combine(self, chunk: Chunk, operation: Combine, output: torch.Tensor) -> Outcome:
        """Write a linear combination (see ``Backend.combine``)."""
        inputs = [_load(array, chunk.working) for array in chunk.inputs]
        real, device = inputs[0].dtype, inputs[0].device
        rn = _rounding(chunk.working, operation.stepwise)
        terms = [rn(model - inputs[0]) for model in inputs[1:]] if operation.on_base else inputs
        coefficients: Sequence[torch.Tensor]
        if operation.lines is None:
            coefficients = [torch.tensor(c, dtype=real, device=device) for c in operation.coefficients]
        else:
            coefficients = _of_elements(chunk, operation.lines, len(terms), inputs[0])
        total = torch.zeros_like(inputs[0]) if operation.fused else -torch.zeros_like(inputs[0])
        for values, coefficient in zip(terms, coefficients, strict=True):
            total = (
                _fma(values, coefficient, total) if operation.fused else rn(total + rn(coefficient * values))
            )
        if operation.divisor is not None:
            total = rn(total / torch.tensor(operation.divisor, dtype=real, device=device))
        if operation.on_base:
            total = inputs[0] + total
        once_more = operation.fused or operation.rounded or operation.stepwise
        _store(_rounding(chunk.working, once_more)(total), output)
        return Outcome((), _non_finite(chunk), int((~output.isfinite()).sum()))

    def nearswap(self, chunk: Chunk, operation: Nearswap, output: torch.Tensor) -> Outcome:
        """Move the base to the model where they are near (see ``Backend.nearswap``)."""
        rn = _rounding(chunk.working, operation.storage_rounding)
        base, model = _load(chunk.base, chunk.working), _load(chunk.models[0], chunk.working)

        def number(value: float) -> torch.Tensor:
            return torch.tensor(value, dtype=base.dtype, device=base.device)

        distance = rn((model - base).abs())
        smallest = rn(number(NEAREST))
        divisor = torch.where(distance < smallest, smallest, distance)
        threshold = number(operation.threshold)
        weight = rn(rn(1.0 / divisor) * threshold) if operation.storage_rounding else threshold / divisor
        weight = torch.where(weight > 1, number(1.0), weight)
        mixed = rn(rn(weight * model) + rn(rn(1.0 - weight) * base))
        _store(torch.where(model == base, base, mixed), output)
        return Outcome((), _non_finite(chunk), int((~output.isfinite()).sum()))


def _load(array: torch.Tensor, working: DType) -> torch.Tensor:
    return round_to(array, working).to(real_dtype(working))


def _store(values: torch.Tensor, output: torch.Tensor) -> None:
    output.copy_(round_to(values, BY_NAME[str(output.dtype).removeprefix("torch.")]))


def _delta(chunk: Chunk, model: int) -> torch.Tensor:
    return _load(chunk.models[model], chunk.working) - _load(chunk.base, chunk.working)


def _score(chunk: Chunk, score: Score) -> torch.Tensor:
    """The scores of a chunk's positions, in the type of the arithmetic."""
    real = real_dtype(chunk.working)
    if isinstance(score, Variance):
        rn = _rounding(chunk.working, score.storage_rounding)
        wide = torch.float64 if chunk.working.bits >= 32 else torch.float32
        deltas = [rn(_delta(chunk, model)).to(wide) for model in range(len(chunk.models))]
        return rn(variances(deltas).to(real))
    base, model = (_load(array, chunk.working).double().view(-1, score.length) for array in chunk.inputs)
    divergence = divergences(model, base).to(real).repeat_interleave(score.length)
    found = _delta(chunk, 0).abs() * divergence
    return torch.where(found.isnan(), torch.zeros_like(found), found)


def _keys(chunk: Chunk, subject: Subject) -> torch.Tensor:
    """The keys of a model's task vector, or of a score."""
    values = _delta(chunk, subject) if isinstance(subject, int) else _score(chunk, subject)
    return keys_of(values, key_dtype(subject, chunk.working))


def _block_sums(chunk: Chunk, columns: Sequence[Sequence[float]]) -> BlockSums:
    rows = array("d", [value for row in zip(*columns, strict=True) for value in row])
    return BlockSums.of(chunk.start, len(columns), rows)


def _sums_of_lines(products: Sequence[torch.Tensor], line: Line, start: int) -> list[float]:
    """The sums of one block that begins at element ``start``: those of each line in it, for each product."""
    if line.stride > 1:
        columns = []
        for product in products:
            total = torch.zeros(line.stride, dtype=torch.float64, device=product.device)
            for row in product.view(-1, line.stride):
                total = total + row
            columns.append(total)
        result: list[float] = torch.stack(columns, 1).view(-1).tolist()
        return result
    sums, first, end = [], start, start + len(products[0])
    for _ in range(lines_of_block(line)):
        last = min(first // line.length * line.length + line.length, end)
        for product in products:
            sums += sums_of_blocks(product[first - start : last - start]) if first < last else [0.0]
        first = last
    return sums


def _of_elements(
    chunk: Chunk, lines: LineCoefficients, terms: int, like: torch.Tensor
) -> Sequence[torch.Tensor]:
    """For each term the coefficient of every element of a chunk."""
    (length, stride), values = lines
    index = torch.arange(chunk.start, chunk.start + chunk.count, device=like.device)
    number = index // length if stride == 1 else index % stride
    table = torch.tensor(values, dtype=torch.float64, device=like.device).to(like.dtype).view(-1, terms)
    return list(table[number].unbind(1))


def _rounding(working: DType, storage_rounding: bool) -> Rounding:
    if not storage_rounding:
        return lambda values: values
    return lambda values: round_to(values, working).to(real_dtype(working))


def _mask(chunk: Chunk, delta: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which elements are kept, and for DELLA's own rescaling the probability of each."""
    index = torch.arange(chunk.start, chunk.start + chunk.count, device=delta.device)
    match mask:
        case Dense():
            return torch.ones_like(delta, dtype=torch.bool), None
        case Draw():
            return draws(mask.random_key, index) < mask.below, None
        case Ranked():
            keys = keys_of(delta, chunk.working)
            thresholds = rank_thresholds(keys, chunk.line, mask.density, mask.epsilon)
            probability = thresholds.double() / 2.0**32 if mask.inverse_probability else None
            return draws(mask.random_key, index) < thresholds, probability
        case Scored():
            return _band(_keys(chunk, mask.score), index, mask.mask), None
        case Band():
            return _band(keys_of(delta, chunk.working), index, mask), None
    raise BackendError(f"unknown mask {mask!r}")


def _band(keys: torch.Tensor, index: torch.Tensor, mask: Band) -> torch.Tensor:
    """Which keys a band keeps, of elements with these flat indices."""
    position = draws(mask.random_key, index) if mask.by_draw else index
    kept = (keys >= mask.low) & (keys <= min(mask.high, 2**63 - 1))
    for bound, (first, last) in ((mask.low, mask.low_positions), (mask.high, mask.high_positions)):
        inside = (position >= min(first, 2**63 - 1)) & (position <= min(last, 2**63 - 1))
        kept &= (keys != min(bound, 2**63 - 1)) | inside
    return kept


def _fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x * y + z in float32 with one rounding: the product is exact in float64, the sum's error is sticky."""
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    away = (error > 0) == (total > 0)
    sticky = torch.where(away, bits, bits - 1) | 1
    odd = torch.where((error != 0) & total.isfinite(), sticky, bits).view(torch.float64)
    return odd.float()


def _non_finite(chunk: Chunk) -> tuple[int, ...]:
    return tuple(int((~_load(array, chunk.working).isfinite()).sum()) for array in chunk.inputs)
