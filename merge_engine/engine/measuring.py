"""From needs to answers: chunks are measured step by step, and the answers follow.

A ``Measurement`` takes the chunks of one tensor, or of all tensors that answer needs together, step by step (see
``methods/needs.py``). Results stay on the backend's device until they are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations_with_replacement
from typing import Any

from merge_engine.backends import Backend
from merge_engine.backends.operations import (
    NOTHING,
    Chunk,
    FoundBand,
    KeyColumn,
    Mask,
    Overlap,
    Rank,
    RankMask,
    Score,
    Scored,
    SolvedBand,
    Sought,
    Subject,
    TopShare,
    key_dtype,
)
from merge_engine.backends.statistics import BlockSums, KeyTable, LineTotals, levels, lines_of_block
from merge_engine.dtypes import F32, DType
from merge_engine.engine.answers import (
    EVERY_KEY,
    Query,
    SharedAnswers,
    Split,
    deciding_ties,
    has_subject,
    place_of,
    positions_of,
)
from merge_engine.errors import CheckpointError
from merge_engine.methods import (
    Gram,
    KeyRanks,
    MaskedL1,
    MaskedSquares,
    Need,
    NonZero,
    Overlaps,
    Place,
    Task,
    TiePlaces,
)
from merge_engine.methods.needs import Kind, Step
from merge_engine.methods.rounding import rounded

_SUMS_AHEAD = 2
"""Chunks whose sums of lines stay on the device: adding them up waits for it."""


@dataclass
class _Round:
    """Sums of every model under one mask each, which a backend takes together: the masks by recipe position.

    ``handles`` are those to ``BlockSums``, one a chunk.
    """

    masks: dict[int, Mask]
    handles: list[Any] = field(default_factory=list)


class Measurement(Mapping[Need, Any]):
    """Answers to ``needs``, complete once every step has had all chunks.

    The needs may be those of several recipes: each subject's keys are counted once for all ranks. ``elements`` is the
    number of elements in all chunks together. ``shared`` has the answers to shared needs;
    ``known`` are answers that are not measured again. It is a mapping from needs to answers; a look-up waits until
    the device has the answer, and raises ``KeyError`` for a need that is not among ``needs``.
    """

    def __init__(
        self,
        backend: Backend,
        needs: Sequence[Need],
        working: DType,
        elements: int,
        shared: Measurement | None = None,
        known: SharedAnswers | None = None,
    ):
        self._backend = backend
        self._needs = needs
        self._working = working
        self._elements = elements
        self._shared = shared
        self._queries: list[list[Query]] | None = None
        self._found: dict[Query, Any] = {}
        self._counts: dict[DType, dict[Backend, Any]] = {}  # by the width of the keys
        self._places: dict[Split, Place] = {}
        self._wanted: dict[Split, tuple[int, int]] | None = None
        self._lines: dict[Gram, LineTotals] = {}
        self._zeros: dict[Score, int] = {}
        self._overlaps: dict[Overlaps, list[Any]] = {}  # handles to tuples, one a chunk
        self._solved: dict[tuple[Subject, RankMask], SolvedBand] = {}
        if known is not None:
            self._found = dict(known.found)
            self._places = dict(known.places)
        self._measure(needs)

    def _measure(self, needs: Sequence[Need]) -> None:
        """Measure these of the needs."""
        self._measured = needs
        self._norms = _rounds([need for need in needs if isinstance(need, MaskedL1)])
        self._squares = _rounds([need for need in needs if isinstance(need, MaskedSquares)])
        self._grams: dict[Gram, list[Any]] = {need: [] for need in needs if isinstance(need, Gram)}

    def add(self, step: Step, chunk: Chunk, task: Task, last: bool, backend: Backend | None = None) -> None:
        """Measure a chunk of a tensor; after the ``last`` one the step is complete. Chunks come in order.

        ``backend`` has the chunk, if several devices measure shared needs together.
        Raises ``CheckpointError`` if the inputs changed since an earlier step.
        """
        self._backend = backend or self._backend
        if step.kind is Kind.COUNTS:
            self._tally(chunk)
        elif step.kind is Kind.KEYS:
            self._count(step.level, chunk, task, last)
        elif step.kind is Kind.PLACES:
            self._locate(chunk, task, last)
        else:
            self._sum(chunk, task)

    def keep(self) -> None:
        """Keep what was measured, where that is wanted, once it is complete. Waits for a device."""

    def data(self) -> SharedAnswers:
        """The keys and places that were found, for use in another process. Waits for a device."""
        found = [(query, self._backend.fetch(handle)) for query, handle in self._found.items()]
        return SharedAnswers(found, list(self._places.items()))

    def masks(self, task: Task, masks: Mapping[int, Mask]) -> list[SolvedBand]:
        """For each model's mask, in order: the mask as a backend applies it, and its number of kept entries without
        trim slack.

        ``masks`` are by recipe position. All calls are for the same tensor.
        """
        asked = [self._resolved(model, mask) for model, mask in masks.items()]
        unsolved = {
            (subject, mask): None
            for subject, mask in asked
            if isinstance(mask, RankMask) and (subject, mask) not in self._solved
        }
        for dtype in {key_dtype(subject, task.working) for subject, _ in unsolved}:
            group = [each for each in unsolved if key_dtype(each[0], task.working) == dtype]
            bands = [self._band(task, subject, mask) for subject, mask in group]
            self._solved.update(zip(group, self._backend.bands(bands, dtype), strict=True))
        result = []
        for subject, mask in asked:
            solved = self._solved[subject, mask] if isinstance(mask, RankMask) else SolvedBand(mask, None)
            if not isinstance(subject, int) and mask != NOTHING:
                solved = SolvedBand(Scored(subject, solved.mask), None)
            result.append(solved)
        return result

    def __getitem__(self, need: Need) -> Any:
        if need not in self._needs:
            if self._shared is None:
                raise KeyError(f"{need} is not among the needs")
            return self._shared[need]
        if isinstance(need, KeyRanks):
            ranks = [rank for rank in self._ranks(need) if rank]
            return {rank: self._backend.fetch(self._found[need.model, rank]) for rank in ranks}
        if isinstance(need, NonZero):
            return self._elements - self._zeros.get(need.score, 0)
        if isinstance(need, Overlaps):
            counted = [self._backend.fetch(handle) for handle in self._overlaps.get(need, ())]
            return tuple(Overlap(*map(sum, zip(*parts, strict=True))) for parts in zip(*counted, strict=True))
        if isinstance(need, TiePlaces):
            mask = self._as_ranks(need)
            return {
                rank: place
                for (model, of, rank), place in self._places.items()
                if (model, of) == (need.model, mask)
            }
        if isinstance(need, MaskedL1 | MaskedSquares):
            sums = self._norms if isinstance(need, MaskedL1) else self._squares
            found = next(each for each in sums if each.masks[need.model] == need.mask)
            at = 2 * list(found.masks).index(need.model)
            return tuple(self._totals(found.handles)[at : at + 2])
        if isinstance(need, Gram):
            if need.line is None:
                return _symmetric(self._totals(self._grams[need]))
            while self._grams[need]:
                self._add_lines(need)
            return self._lines[need].values
        raise KeyError(f"{need} has no answer")

    def __iter__(self) -> Iterator[Need]:
        return iter(self._needs)

    def __len__(self) -> int:
        return len(self._needs)

    def _tally(self, chunk: Chunk) -> None:
        for need in self._measured:
            if isinstance(need, NonZero):
                zeros, _ = self._backend.locate(chunk, need.score, 0, EVERY_KEY)
                self._zeros[need.score] = self._zeros.get(need.score, 0) + zeros
            elif isinstance(need, Overlaps):
                handles = self._overlaps.setdefault(need, [])
                handles.append(self._backend.overlaps(chunk, need.masks))

    def _ranks(self, need: KeyRanks) -> list[int]:
        """The ranks as numbers. 0 is a share of no key."""
        return [self._rank(need.model, rank) for rank in need.ranks]

    def _rank(self, subject: Subject, rank: int | TopShare) -> int:
        if isinstance(rank, int):
            return rank
        assert not isinstance(subject, int), "only scores are ranked by shares"
        keys: int = self[NonZero(subject)]
        if rank.single:
            return int(rounded(rounded(keys, F32) * rounded(rank.part, F32), F32))
        return int(rank.part * keys)

    def _resolved(self, model: int, mask: Mask) -> tuple[Subject, Mask]:
        """What a mask looks at, and the mask with a number as its last rank."""
        if not isinstance(mask, Scored):
            return model, mask
        plain: Mask | TopShare = mask.mask
        if isinstance(plain, TopShare):
            last = self._rank(mask.score, plain)
            plain = plain.down_to(last) if last else NOTHING
        return mask.score, plain

    def _asked(self) -> list[list[Query]]:
        """The queries of each subject. Shares are known once their counts are."""
        if self._queries is None:
            by_subject: dict[Subject, dict[Query, None]] = {}
            for need in self._measured:
                if isinstance(need, KeyRanks):
                    queries = {(need.model, rank): None for rank in self._ranks(need) if rank}
                    if queries:
                        by_subject.setdefault(need.model, {}).update(queries)
            self._queries = [list(queries) for queries in by_subject.values()]
        return self._queries

    def _count(self, level: int, chunk: Chunk, task: Task, last: bool) -> None:
        """Refine every key by its next bits. At level 0 the ranks of a model are looked up in one table.

        Keys of another width, those of scores, are counted on their own.
        """
        by_width: dict[DType, list[list[Query]]] = {}
        for queries in self._asked():
            width = key_dtype(queries[0][0], self._working)
            if level < levels(width):
                by_width.setdefault(width, []).append(queries)
        for width, asked in by_width.items():
            groups = asked if level == 0 else [[query] for queries in asked for query in queries]
            self._count_groups(level, width, groups, chunk, task, last)

    def _count_groups(
        self, level: int, width: DType, groups: list[list[Query]], chunk: Chunk, task: Task, last: bool
    ) -> None:
        within = [self._found.get(queries[0]) for queries in groups]
        backend = self._backend
        if chunk.count == self._elements:
            sought = [
                Sought(place_of(task, queries[0][0]), tuple([rank for _, rank in queries]), found)
                for queries, found in zip(groups, within, strict=True)
            ]
            self._take(groups, backend.find_all(chunk, level, sought))
            return
        counts = self._counts.setdefault(width, {})
        if backend not in counts:
            counts[backend] = backend.new_counts(level, within)
        columns = [
            KeyColumn(slot, place_of(task, queries[0][0]))
            for slot, queries in enumerate(groups)
            if has_subject(task, queries[0][0])
        ]
        backend.count(chunk, columns, counts[backend])
        if last:
            self._take(groups, self._look_up(self._counts.pop(width), groups, within))

    def _look_up(
        self, counts: Mapping[Backend, Any], groups: Sequence[Sequence[Query]], within: Sequence[Any]
    ) -> list[list[Any]]:
        """Find ranks in what was counted: on the device, or in the tables of several added up."""
        backend = self._backend
        if len(counts) > 1:
            tables = [each.fetch(of_device) for each, of_device in counts.items()]
            added = [reduce(KeyTable.merge, of_slot) for of_slot in zip(*tables, strict=True)]
            return [
                [table.find(rank, backend.fetch(one)) for _, rank in queries]
                for table, queries, one in zip(added, groups, within, strict=True)
            ]
        ranks = [Rank(slot, rank) for slot, queries in enumerate(groups) for _, rank in queries]
        found = iter(backend.find(counts[backend], ranks))
        return [[next(found) for _ in queries] for queries in groups]

    def _take(self, groups: Sequence[Sequence[Query]], found: Sequence[Sequence[Any]]) -> None:
        for queries, answers in zip(groups, found, strict=True):
            self._found.update(zip(queries, answers, strict=True))

    def _locate(self, chunk: Chunk, task: Task, last: bool) -> None:
        """Find the n-th occurrence of each key whose ties are split by index, in the order of the elements."""
        if self._wanted is None:
            self._wanted = {}
            for need in self._measured:
                if isinstance(need, TiePlaces) and (mask := self._as_ranks(need)) is not None:
                    found = {rank: self._backend.fetch(self._found[need.model, rank]) for rank in mask.ranks}
                    for rank, nth in deciding_ties(mask, found).items():
                        self._wanted[need.model, mask, rank] = found[rank].key, nth
        for split, (key, nth) in list(self._wanted.items()):
            if not has_subject(task, split[0]):
                continue
            passed, offset = self._backend.locate(chunk, place_of(task, split[0]), key, nth)
            if offset is None:
                self._wanted[split] = key, nth - passed
            else:
                self._places[split] = Place(task.name, chunk.start + offset)
                del self._wanted[split]
        if last and self._wanted:
            raise CheckpointError(
                "the inputs changed while they were merged: what was counted is not there any more"
            )

    def _as_ranks(self, need: TiePlaces) -> RankMask | None:
        """The mask of a need with a number as its last rank; None for a share of no key."""
        if isinstance(need.mask, RankMask):
            return need.mask
        last = self._rank(need.model, need.mask)
        return need.mask.down_to(last) if last else None

    def _sum(self, chunk: Chunk, task: Task) -> None:
        for rounds, measure in (
            (self._norms, self._backend.l1_norms),
            (self._squares, self._backend.squares),
        ):
            for each in rounds:
                solved = [mask for mask, _ in self.masks(task, each.masks)]
                each.handles.append(measure(chunk, solved, task.storage_rounding))
        for need, handles in self._grams.items():
            handles.append(self._backend.gram(chunk, need.of_deltas, need.line))
            while need.line is not None and len(handles) > _SUMS_AHEAD:
                self._add_lines(need)

    def _add_lines(self, need: Gram) -> None:
        """Add the sums of a chunk to the totals of its lines: sums of all chunks could take as much as the tensor."""
        sums: BlockSums = self._backend.fetch(self._grams[need].pop(0))
        if need not in self._lines:
            assert need.line is not None
            columns = sums.columns // lines_of_block(need.line)
            self._lines[need] = LineTotals(need.line, self._elements, columns)
        self._lines[need].add(sums)

    def _totals(self, handles: list[Any]) -> list[float]:
        """The totals of the sums over all chunks. The handles are replaced by their sum."""
        sums: BlockSums = reduce(BlockSums.merge, (self._backend.fetch(handle) for handle in handles))
        handles[:] = [sums]
        return sums.totals()

    def _band(self, task: Task, model: Subject, mask: RankMask) -> FoundBand:
        source = self._shared if mask.whole_model and self._shared is not None else self
        high = mask.first if mask.first > 1 else None
        return FoundBand(
            mask,
            source._found[model, mask.last],
            None if high is None else source._found[model, high],
            positions_of(task, source._places.get((model, mask, mask.last)), mask.stable_ascending),
            positions_of(task, source._places.get((model, mask, mask.first)), False),
        )


def _rounds(needs: Sequence[MaskedL1 | MaskedSquares]) -> list[_Round]:
    """The masks of the needs, as few rounds as possible. A model with fewer masks than others repeats its first."""
    if not needs:  # as for most tensors: there may be many
        return []
    by_model: dict[int, dict[Mask, None]] = {}
    for need in needs:
        by_model.setdefault(need.model, {})[need.mask] = None
    masks = {model: list(of_model) for model, of_model in by_model.items()}
    return [
        _Round(
            {model: of_model[i] if i < len(of_model) else of_model[0] for model, of_model in masks.items()}
        )
        for i in range(max(map(len, masks.values())))
    ]


def _symmetric(products: Sequence[float]) -> list[list[float]]:
    """The rows of a symmetric matrix, n by n, from its upper triangle: n * (n + 1) / 2 numbers, row by row."""
    n = (math.isqrt(8 * len(products) + 1) - 1) // 2
    rows = [[0.0] * n for _ in range(n)]
    for (i, k), product in zip(combinations_with_replacement(range(n), 2), products, strict=True):
        rows[i][k] = rows[k][i] = product
    return rows
