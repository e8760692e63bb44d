"""Order statistics of magnitude keys: the k-th largest key of a task vector, and where its ties lie.

A key is found from histograms, one streaming pass for 16-bit dtypes, two for float32, four for float64.
Histograms add up, so "largest" may range over one tensor or over all tensors of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from merge_engine.backends import Backend
from merge_engine.backends.operations import Chunk, Column, Found, Rank
from merge_engine.backends.statistics import levels
from merge_engine.dtypes import DType
from merge_engine.errors import CheckpointError
from merge_engine.methods.base import MergeTask, Statistic


class Query(NamedTuple):
    """Asks for the key of the ``rank``-th largest magnitude (from 1) of the model at a recipe position."""

    model: int
    rank: int


@dataclass(frozen=True)
class Place:
    """Where an element is: its tensor and flat index."""

    tensor: str
    index: int


class Selection:
    """Answers queries with handles to ``Found`` of the backend. ``statistics`` are the passes it takes.

    ``ties`` names, once the keys are known, those whose n-th occurrence (from 0, tensors in order of their
    names) must be located as well; None when no tie is decided by index. ``elements`` is how many all chunks hold
    together.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        working: DType,
        ties: Callable[[Mapping[Query, Found]], Mapping[Query, int]] | None,
        elements: int,
    ):
        self.queries = tuple(dict.fromkeys(queries))
        self.ranks: dict[int, tuple[int, ...]] = {}  # all that are asked for in each model
        for query in self.queries:
            self.ranks[query.model] = (*self.ranks.get(query.model, ()), query.rank)
        self.elements = elements
        self.found: dict[Query, Any] = {}
        self.places: dict[Query, Place] = {}
        self.statistics: list[Statistic] = []
        if self.queries:
            self.statistics = [_Level(self, level) for level in range(levels(working))]
        if self.queries and ties is not None:
            self.statistics.append(_Ties(self, ties))


class _Level(Statistic):
    """One level of histograms: refines every query's key by its next bits."""

    def __init__(self, selection: Selection, level: int):
        self._selection = selection
        self._level = level
        self._slots: dict[Query, int] = {}
        self._histograms: Any = None

    def measure(self, backend: Backend, chunk: Chunk, task: MergeTask) -> None:
        found = self._selection.found
        if self._histograms is None:
            keys: dict[Any, int] = {}  # at level 0, the queries of a model share its histogram
            for query in self._selection.queries:
                key = query if self._level else query.model
                self._slots[query] = keys.setdefault(key, len(keys))
            self._histograms = backend.new_histograms(self._level, len(keys))
        alone = self._level == 0 and chunk.count == self._selection.elements
        columns = {
            slot: Column(
                slot,
                task.models.index(query.model),
                found.get(query),
                self._selection.ranks[query.model] if alone else (),
            )
            for query, slot in self._slots.items()
            if query.model in task.models
        }
        backend.histogram(chunk, self._level, list(columns.values()), self._histograms)

    def finish(self, backend: Backend) -> None:
        found = self._selection.found
        ranks = [Rank(slot, query.rank, found.get(query)) for query, slot in self._slots.items()]
        handles = backend.select(self._histograms, self._level, ranks)
        self._selection.found = dict(zip(self._slots, handles, strict=True))
        self._histograms = None


class _Ties(Statistic):
    """Locates the n-th occurrence of a key. Tensors must come in the order of their names."""

    def __init__(self, selection: Selection, ties: Callable[[Mapping[Query, Found]], Mapping[Query, int]]):
        self._selection = selection
        self._ties = ties
        self._keys: dict[Query, int] = {}
        self._wanted: dict[Query, int] | None = None

    def measure(self, backend: Backend, chunk: Chunk, task: MergeTask) -> None:
        if self._wanted is None:
            found = {query: backend.fetch(handle) for query, handle in self._selection.found.items()}
            self._keys = {query: answer.key for query, answer in found.items()}
            self._wanted = dict(self._ties(found))
        for query, nth in list(self._wanted.items()):
            if query.model not in task.models:
                continue
            passed, offset = backend.locate(chunk, task.models.index(query.model), self._keys[query], nth)
            if offset is None:
                self._wanted[query] = nth - passed
            else:
                self._selection.places[query] = Place(task.name, chunk.start + offset)
                del self._wanted[query]

    def finish(self, backend: Backend) -> None:
        if self._wanted:
            raise CheckpointError(
                "the inputs changed while they were merged: what was counted is not there any more"
            )
