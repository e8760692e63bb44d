"""Measuring what is not known: answers are kept for the next merge of the same tensors (``engine/kept.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from merge_engine.backends import Backend
from merge_engine.backends.operations import Chunk, KeyColumn, Rank, RankMask, Subject, TopShare
from merge_engine.dtypes import DType
from merge_engine.engine.answers import Query, SharedAnswers, has_subject, place_of
from merge_engine.engine.kept import KeptOf, KeyCounts
from merge_engine.engine.measuring import Measurement
from merge_engine.methods import (
    Gram,
    KeyRanks,
    MaskedL1,
    MaskedSquares,
    Need,
    NonZero,
    Overlaps,
    Task,
    TiePlaces,
)
from merge_engine.methods.needs import Step, steps


class _Table(NamedTuple):
    """Counts of all keys of a tensor's subjects, to be kept: one slot for each."""

    backend: Backend
    task: Task
    subjects: list[Subject]
    counts: Any


class Remembering(Measurement):
    """A measurement that measures only what ``kept`` does not have, and gives it what it measures.

    Keys are counted in full, so that every other rank is known. For the other arguments see ``Measurement``.
    """

    def __init__(
        self,
        kept: KeptOf,
        backend: Backend,
        needs: Sequence[Need],
        working: DType,
        elements: int,
        shared: Measurement | None = None,
        known: SharedAnswers | None = None,
    ):
        super().__init__(backend, needs, working, elements, shared, known)
        self._kept = kept
        self._recalled: dict[Need, Any] = {}
        self._exact: set[Query] = set()  # those of ``_found`` that are not measured
        self._first: dict[Subject, KeyCounts] = {}  # what level 0 would count
        self._tables: dict[DType, list[_Table]] = {}  # by the width of the keys
        self._measure(self._recall())
        self._steps = frozenset(steps(self._measured, working))
        self._to_do = set(self._steps)

    def add(self, step: Step, chunk: Chunk, task: Task, last: bool, backend: Backend | None = None) -> None:
        """See ``Measurement.add``. A step whose answers are known is left out."""
        if step in self._steps:
            super().add(step, chunk, task, last, backend)
            if last:
                self._to_do.discard(step)

    def keep(self) -> None:
        """See ``Measurement.keep``."""
        if self._to_do or not self._steps:
            return
        self._steps = frozenset()
        self._keep_tables()
        for need in self._measured:
            if isinstance(need, KeyRanks):
                for rank, found in self[need].items():
                    self._kept.keep_found(need.model, rank, found)
            elif isinstance(need, TiePlaces):
                if (mask := self._as_ranks(need)) is not None:
                    self._kept.keep_places(need.model, mask, self[need])
            elif _is_kept_whole(need):
                self._kept.keep_answer(need, self[need])

    def __getitem__(self, need: Need) -> Any:
        return self._recalled[need] if need in self._recalled else super().__getitem__(need)

    def _recall(self) -> list[Need]:
        """Take what is known, and return the needs that must be measured.

        Sums under masks are taken of all models together, so they are all known, or none is.
        """
        for need in self._needs:
            if _is_kept_whole(need) and (answer := self._kept.answer(need)) is not None:
                self._recalled[need] = answer
        for kind in (MaskedL1, MaskedSquares):
            of_kind = [need for need in self._needs if isinstance(need, kind)]
            if any(need not in self._recalled for need in of_kind):
                for need in of_kind:
                    self._recalled.pop(need, None)
        return [need for need in self._needs if need not in self._recalled and not self._recalls(need)]

    def _recalls(self, need: Need) -> bool:
        """Whether a need about ranks is known; then its answer is taken."""
        if not isinstance(need, KeyRanks | TiePlaces) or not self._has_number(need):
            return False
        if isinstance(need, TiePlaces):
            mask = self._as_ranks(need)
            places = {} if mask is None else self._kept.places(need.model, mask)
            for rank, place in (places or {}).items():
                assert mask is not None
                self._places[need.model, mask, rank] = place
            return places is not None
        ranks = [rank for rank in self._ranks(need) if rank]
        if not ranks:
            return True
        counts = self._first.get(need.model) or self._kept.counts(need.model)
        if counts is not None:
            self._first[need.model] = counts
        for rank in ranks:
            query = need.model, rank
            if (exact := self._kept.found(*query, counts)) is not None:
                self._exact.add(query)
                self._found[query] = exact
            elif counts is not None:
                self._found[query] = counts.find(rank)
        return all((need.model, rank) in self._exact for rank in ranks)

    def _has_number(self, need: KeyRanks | TiePlaces) -> bool:
        """Whether the ranks of a need are numbers: shares are once the keys that are not 0 were counted."""
        asked = need.ranks if isinstance(need, KeyRanks) else (need.mask,)
        return not any(isinstance(each, TopShare) for each in asked) or (
            not isinstance(need.model, int) and NonZero(need.model) in self._recalled
        )

    def _asked(self) -> list[list[Query]]:
        left = ([query for query in queries if query not in self._exact] for queries in super()._asked())
        return [queries for queries in left if queries]

    def _count_groups(
        self, level: int, width: DType, groups: list[list[Query]], chunk: Chunk, task: Task, last: bool
    ) -> None:
        if level:
            super()._count_groups(level, width, groups, chunk, task, last)
        elif uncounted := [queries for queries in groups if queries[0][0] not in self._first]:
            self._count_all(width, uncounted, chunk, task, last)

    def _count_all(
        self, width: DType, asked: Sequence[Sequence[Query]], chunk: Chunk, task: Task, last: bool
    ) -> None:
        """Count the keys of a tensor in tables that will be kept, and look up ranks after the last one."""
        backend, tables = self._backend, self._tables.setdefault(width, [])
        if not tables or tables[-1].task is not task:
            subjects = [queries[0][0] for queries in asked if has_subject(task, queries[0][0])]
            tables.append(_Table(backend, task, subjects, backend.new_counts(0, [None] * len(subjects))))
        table = tables[-1]
        columns = [KeyColumn(slot, place_of(task, subject)) for slot, subject in enumerate(table.subjects)]
        if columns:
            backend.count(chunk, columns, table.counts)
        if last and len(tables) == 1:
            ranks = [Rank(slot, rank) for slot, queries in enumerate(asked) for _, rank in queries]
            found = iter(backend.find(table.counts, ranks))
            self._take(asked, [[next(found) for _ in queries] for queries in asked])
        elif last:
            counted = self._keep_tables()
            for queries in asked:
                counts = KeyCounts.sum_of(counted[queries[0][0]])
                self._take([queries], [[counts.find(rank) for _, rank in queries]])

    def _keep_tables(self) -> dict[Subject, list[KeyCounts]]:
        """Keep the counts of all keys, and return those of each tensor by subject. Waits for a device."""
        counted: dict[Subject, list[KeyCounts]] = {}
        for backend, task, subjects, counts in chain(*self._tables.values()):
            for subject, table in zip(subjects, backend.fetch(counts), strict=True):
                counted.setdefault(subject, []).append(KeyCounts.of(table))
                self._kept.keep_counts(task, subject, counted[subject][-1])
        self._tables = {}
        return counted


def _is_kept_whole(need: Need) -> bool:
    """Whether the answer to a need follows from it and from the tensor.

    Ranks are kept otherwise, and what a mask of the whole model keeps depends on other tensors.
    """
    if isinstance(need, MaskedL1 | MaskedSquares):
        return not (isinstance(need.mask, RankMask) and need.mask.whole_model)
    return isinstance(need, NonZero | Overlaps | Gram)
