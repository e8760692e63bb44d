"""Shared needs measured in parts: processes count the keys of their tensors, and one process adds the counts.

With ``trim_scope: model`` the ranks are among all elements of a model. Counts of keys are integers, so those of parts
add up to those of the whole, whoever counted them: a few hundred kilobytes for each model are sent, and no tensor. The
answers are those of ``Measurement``, which counts the same in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from merge_engine.backends import Backend
from merge_engine.backends.operations import Chunk, Found, KeyColumn, RankMask, Subject
from merge_engine.backends.statistics import KeyTable, levels
from merge_engine.engine.answers import EVERY_KEY, Query, SharedAnswers, Split, deciding_ties
from merge_engine.engine.carrying import Progress, carry_out
from merge_engine.engine.jobs import Done, Job
from merge_engine.engine.scheduling import schedule_for
from merge_engine.engine.sinks import Target
from merge_engine.errors import CheckpointError
from merge_engine.methods import Answers, KeyRanks, Method, Need, Operation, Place, Task, TiePlaces
from merge_engine.planning import MergePlan, Schedule, Visit, measuring

Column = tuple[Subject, "Found | None"]
"""What a table counts: a model's recipe position, and what was found for the rank one level above, if any."""

Sought = tuple[Subject, int, int]
"""A model's recipe position, a key, and which of the elements with that key is meant, from 0."""

T = TypeVar("T", covariant=True)


@dataclass(frozen=True, kw_only=True)
class CountJob(Job):
    """Count the keys of some tensors at a level, in a table for each of ``columns``.

    ``plan`` is one of ``parts_to_count``, number ``part`` of them.
    """

    part: int
    columns: Sequence[Column]
    level: int


@dataclass(frozen=True, kw_only=True)
class PlaceJob(Job):
    """Count the elements of each tensor that have a key, and find one of them, for each of ``sought``.

    ``again`` says that the tensors have been counted, which no schedule knows.
    """

    part: int
    sought: Sequence[Sought]
    again: bool = False

    @property
    def nbytes(self) -> int:
        """See ``Job.nbytes``."""
        return 0 if self.again else super().nbytes


@dataclass(frozen=True)
class Placed:
    """For each sought: how many elements with its key each tensor has, by name, and the place that was found."""

    totals: Sequence[Mapping[str, int]]
    found: Sequence[Place | None]


def count_keys(job: CountJob, progress: Progress | None = None) -> Done[tuple[int, Sequence[KeyTable]]]:
    """Do a job: the number of the part, and its tables. Raises as ``run`` does."""
    return _carry_out(job, lambda backend: _Keys(backend, job.columns, job.level), progress)


def find_places(job: PlaceJob, progress: Progress | None = None) -> Done[tuple[int, Placed]]:
    """Do a job: the number of the part, and what was found in it. Raises as ``run`` does."""
    return _carry_out(job, lambda backend: _Keyed(backend, job.sought), progress)


def parts_to_count(plan: MergePlan) -> Sequence[MergePlan]:
    """The merged tensors of each shard, as plans to measure; shards without any are left out."""
    parts = [measuring(plan.only(number), _Nothing()) for number in range(len(plan.shards))]
    with_elements = [replace(part, tasks=tuple(task for task in part.tasks if task.count)) for part in parts]
    return [part for part in with_elements if part.tasks]


def decide_in_parts(
    needs: Sequence[Need],
    parts: Sequence[MergePlan],
    do: Callable[[Callable[[Any], Done[Any]], Iterable[Job]], Iterable[Any]],
    **options: Any,
) -> SharedAnswers:
    """The answers to shared needs of the tensors of all ``parts`` together.

    ``do`` maps a function over jobs, and yields the values of what is done, some perhaps twice. ``options`` are those
    of ``Job``. Raises ``CheckpointError`` for inputs that change meanwhile, and as ``run`` does.
    """
    found: dict[Query, Found] = {}
    ranks = _ranks(needs)
    for level in range(levels(parts[0].tasks[0].working)):
        groups = list(ranks.values())
        if level:
            groups = [[query] for queries in groups for query in queries]
        columns = [(model, found.get((model, rank))) for (model, rank), *_ in groups]
        jobs = [
            CountJob(plan=part, part=number, columns=columns, level=level, **options)
            for number, part in enumerate(parts)
        ]
        tables = _added(do(count_keys, jobs))
        found = {
            query: table.find(query[1], found.get(query))
            for queries, table in zip(groups, tables, strict=True)
            for query in queries
        }
    wanted: dict[Split, tuple[int, int]] = {}
    for need in needs:
        if isinstance(need, TiePlaces):
            mask = need.mask
            assert isinstance(mask, RankMask), "shares are of one tensor"
            of_mask = {rank: found[need.model, rank] for rank in mask.ranks}
            for rank, nth in deciding_ties(mask, of_mask).items():
                wanted[need.model, mask, rank] = of_mask[rank].key, nth
    return SharedAnswers(list(found.items()), list(_placed(wanted, parts, do, options)) if wanted else [])


def _ranks(needs: Sequence[Need]) -> dict[Subject, list[Query]]:
    """The ranks that are looked for, by model."""
    by_model: dict[Subject, dict[Query, None]] = {}
    for need in needs:
        if isinstance(need, KeyRanks):
            for rank in need.ranks:
                assert isinstance(rank, int), "shares are of one tensor"
                by_model.setdefault(need.model, {})[need.model, rank] = None
    return {model: list(queries) for model, queries in by_model.items()}


def _added(counted: Iterable[tuple[int, Sequence[KeyTable]]]) -> Sequence[KeyTable]:
    """The tables of all parts added, each part once."""
    sums: Sequence[KeyTable] = ()
    seen: set[int] = set()
    for part, tables in counted:
        if part not in seen:
            sums = [one.merge(other) for one, other in zip(sums, tables, strict=True)] if seen else tables
            seen.add(part)
    return sums


def _placed(
    wanted: Mapping[Split, tuple[int, int]],
    parts: Sequence[MergePlan],
    do: Callable[[Callable[[Any], Done[Any]], Iterable[Job]], Iterable[Any]],
    options: Mapping[str, Any],
) -> Iterator[tuple[Split, Place]]:
    """The place of the n-th element with a key, for each split, in the order of the tensors' names.

    First all tensors are counted, then the one that has the element is searched.
    """
    every = [(model, key, EVERY_KEY) for (model, *_), (key, _) in wanted.items()]
    jobs = [PlaceJob(plan=part, part=n, sought=every, **options) for n, part in enumerate(parts)]
    totals: list[dict[str, int]] = [{} for _ in every]
    for _, placed in do(find_places, jobs):
        for known, more in zip(totals, placed.totals, strict=True):
            known.update(more)
    homes = {task.name: (part, task) for part in parts for task in part.tasks}
    searches = []
    for number, ((model, *_), (key, nth)) in enumerate(wanted.items()):
        name, rest = _tensor_with(totals[number], nth)
        part, task = homes[name]
        within, sought = replace(part, tasks=(task,)), [(model, key, rest)]
        searches.append(PlaceJob(plan=within, part=number, sought=sought, again=True, **options))
    splits = list(wanted)
    places = {number: placed.found[0] for number, placed in do(find_places, searches)}
    for number, place in places.items():
        if place is None:
            raise _changed()
        yield splits[number], place


def _tensor_with(totals: Mapping[str, int], nth: int) -> tuple[str, int]:
    """The tensor that has the n-th of some elements, and its number among those of the tensor."""
    for name in sorted(totals):
        if nth < totals[name]:
            return name, nth
        nth -= totals[name]
    raise _changed()


def _changed() -> CheckpointError:
    return CheckpointError(
        "the inputs changed while they were merged: what was counted is not there any more"
    )


class _Tally(Protocol[T]):
    """Takes the chunks of a step (see ``runs.Tally``)."""

    def add(self, chunk: Chunk, task: Task) -> None: ...

    def result(self) -> T:
        """What was found in all chunks."""


class _Keys:
    """Counts keys in tables, one for each column."""

    def __init__(self, backend: Backend, columns: Sequence[Column], level: int):
        self._backend = backend
        self._columns = columns
        self._level = level
        self._counts: Any = None

    def add(self, chunk: Chunk, task: Task) -> None:
        slots = [
            KeyColumn(slot, task.models.index(model))
            for slot, (model, _) in enumerate(self._columns)
            if model in task.models
        ]
        if slots:
            self._backend.count(chunk, slots, self._made())

    def result(self) -> Sequence[KeyTable]:
        tables: Sequence[KeyTable] = self._backend.fetch(self._made())
        return tables

    def _made(self) -> Any:
        """The counts, made when the device is ready for work."""
        if self._counts is None:
            self._counts = self._backend.new_counts(self._level, [within for _, within in self._columns])
        return self._counts


class _Keyed:
    """Counts the elements that have a key, and finds one of them."""

    def __init__(self, backend: Backend, sought: Sequence[Sought]):
        self._backend = backend
        self._sought = sought
        self._totals: list[dict[str, int]] = [{} for _ in sought]
        self._found: list[Place | None] = [None for _ in sought]

    def add(self, chunk: Chunk, task: Task) -> None:
        for number, (model, key, nth) in enumerate(self._sought):
            if model not in task.models:
                continue
            before = self._totals[number].get(task.name, 0)
            ahead = EVERY_KEY if nth < before else nth - before
            passed, offset = self._backend.locate(chunk, task.models.index(model), key, ahead)
            if offset is not None:
                self._found[number] = Place(task.name, chunk.start + offset)
            self._totals[number][task.name] = before + passed

    def result(self) -> Placed:
        return Placed(self._totals, self._found)


class _OnePass(Schedule):
    """One reading of all tensors, for a tally."""

    def visits(self) -> Iterator[Visit]:
        for task in self.tasks:
            for start, count in self.chunks(task):
                yield Visit(task, start, count, (), (), False, shared=True)


class _Nothing(Method):
    """Tensors that are counted have no needs of their own."""

    name = "count"

    def solve(self, task: Task, answers: Answers) -> Operation:
        """Nothing is merged."""
        raise NotImplementedError


def _carry_out(
    job: CountJob | PlaceJob, make: Callable[[Backend], _Tally[T]], progress: Progress | None
) -> Done[tuple[int, T]]:
    with job.opened() as (backend, access):
        within = schedule_for(job.plan, access, backend, job.memory)
        tally, scheduled = make(backend), _OnePass(within.plan, within.budget)
        (run,) = carry_out(scheduled, backend, access, [Target()], progress, tally=tally)
        return Done((job.part, tally.result()), run.ledger)
