"""Order statistics of magnitude keys: the k-th largest key of a task vector, and where its ties lie.

A key is found from histograms, one streaming pass for 16-bit dtypes, two for float32, four for float64.
Histograms add up, so "largest" may range over one tensor or over all tensors of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from merge_engine.backends import Backend
from merge_engine.backends.base import NEXT_BITS, levels
from merge_engine.backends.operations import Chunk, Column
from merge_engine.dtypes import DType
from merge_engine.methods.base import MergeTask, Statistic


class Query(NamedTuple):
    """Asks for the key of the ``rank``-th largest magnitude (from 1) of the model at a recipe position."""

    model: int
    rank: int


class Found(NamedTuple):
    """A key, how many keys are larger, and how many are equal."""

    key: int
    above: int
    equal: int


@dataclass(frozen=True)
class Place:
    """Where an element is: its tensor and flat index."""

    tensor: str
    index: int


class Selection:
    """Answers queries. ``statistics`` are the passes it takes.

    ``ties`` names, once the keys are known, those whose n-th occurrence (from 0, tensors in order of their
    names) must be located as well; None when no tie is decided by index.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        working: DType,
        ties: Callable[[Mapping[Query, Found]], Mapping[Query, int]] | None,
    ):
        self.queries = tuple(dict.fromkeys(queries))
        self.found: dict[Query, Found] = {}
        self.places: dict[Query, Place] = {}
        self._partial = {query: Found(0, 0, 0) for query in self.queries}
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
        self._slots: dict[tuple[int, int], int] = {}  # (model, prefix) -> slot
        self._histograms: Any = None

    def measure(self, backend: Backend, chunk: Chunk, task: MergeTask) -> None:
        if self._histograms is None:
            for query, partial in self._selection._partial.items():
                self._slots.setdefault((query.model, partial.key), len(self._slots))
            self._histograms = backend.new_histograms(self._level, len(self._slots))
        columns = [
            Column(slot, task.models.index(model), prefix)
            for (model, prefix), slot in self._slots.items()
            if model in task.models
        ]
        backend.histogram(chunk, self._level, columns, self._histograms)

    def finish(self, backend: Backend) -> None:
        partial = self._selection._partial
        for query, (prefix, above, _) in partial.items():
            slot = self._slots[query.model, prefix]
            bin_ = backend.select(self._histograms, self._level, slot, query.rank - above)
            key = prefix << NEXT_BITS | bin_.bin
            partial[query] = Found(key, above + bin_.above, bin_.equal)
        self._histograms = None
        self._selection.found = dict(partial)


class _Ties(Statistic):
    """Locates the n-th occurrence of a key. Tensors must come in the order of their names."""

    def __init__(self, selection: Selection, ties: Callable[[Mapping[Query, Found]], Mapping[Query, int]]):
        self._selection = selection
        self._ties = ties
        self._wanted: dict[Query, int] | None = None

    def measure(self, backend: Backend, chunk: Chunk, task: MergeTask) -> None:
        if self._wanted is None:
            self._wanted = dict(self._ties(self._selection.found))
        for query, nth in list(self._wanted.items()):
            if query.model not in task.models:
                continue
            key = self._selection.found[query].key
            passed, offset = backend.locate(chunk, task.models.index(query.model), key, nth)
            if offset is None:
                self._wanted[query] = nth - passed
            else:
                self._selection.places[query] = Place(task.name, chunk.start + offset)
                del self._wanted[query]

    def finish(self, backend: Backend) -> None:
        if self._wanted:
            raise AssertionError("a tie counted by a histogram was not found again")
