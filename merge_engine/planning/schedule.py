"""The order of work for a plan and a budget, known before the first byte is read.

Memory is where the backend computes: that of the host, or of a device. A tensor that fits there is visited once, to be
measured and merged, and a tensor that can only be copied takes no memory. A larger one is visited once per chunk for
every step of its needs, and once more to be merged. A tensor whose inputs are used in place is measured whole and
then merged chunk by chunk, so that the output is still in the processor's cache when it is digested. A tensor each of
whose lines answers alone is visited once per chunk of whole lines. Shared needs, which all tensors of a model answer
together, come first, in the order of the tensors' names.

Less memory means another schedule of the same plan, never another result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from merge_engine.backends.operations import Line
from merge_engine.backends.statistics import SUM_BLOCK, lines_of_block, sum_block
from merge_engine.errors import PlanError
from merge_engine.methods import Action, Gram, MaskedL1, MaskedSquares, Need, Task, Together
from merge_engine.methods.needs import Step, is_shared, line_elements, steps
from merge_engine.planning.plan import MergePlan
from merge_engine.storage import PAGE, aligned

DEFAULT_MEMORY = 400_000_000
"""Bytes of tensor data that a run holds in the host's memory at a time by default."""

PIECE = 16 << 20
"""Bytes of inputs and output in a chunk: large enough for disk throughput, small enough for the processor's cache."""

DEVICE_PIECE = 64 << 20
"""The same for a device, which has no such cache, and where each chunk takes launches."""

CACHED_PIECE = 8 << 20
"""Bytes of output in a chunk whose inputs are used in place."""

MOST_ELEMENTS = 1 << 30
"""Elements of a chunk: native code counts those of a chunk in 32 bits."""

SIDE_BY_SIDE = 8
"""Most shards that are written at a time: one file on a RAM disk takes 2.4 GB/s however many threads write to it."""

_PIECES = 8  # A chunk takes at most this part of the memory, so that the first one is soon read.
_HELD = 2  # Room for so many tensors that are held whole: while one is merged, the next is read.
_SUMS_HELD = 3  # Chunks whose sums of lines are held: their totals wait for a device.
_PIECES_AT_ONCE = (
    4  # With fewer chunks in the rings, a disk with a high rate and a high latency would be idle.
)


@dataclass(frozen=True)
class Budget:
    """Limits of a run: ``memory`` in bytes of tensor data, of the host or of the device that computes.

    ``in_place`` says that inputs are used in the page cache and take none of the memory. ``piece`` and
    ``cached_piece`` are the bytes of a chunk, see ``PIECE``, ``DEVICE_PIECE`` and ``CACHED_PIECE``. ``side_by_side``
    shards are written at a time.
    """

    memory: int = DEFAULT_MEMORY
    in_place: bool = False
    piece: int = PIECE
    cached_piece: int = CACHED_PIECE
    side_by_side: int = SIDE_BY_SIDE


class RingBytes(NamedTuple):
    """Bytes of memory for inputs and for outputs."""

    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Visit:
    """One chunk of one tensor: elements [start, start + count).

    ``steps`` are the readings of the ``needs`` that are measured in this visit; ``last`` says that they are
    complete after it. ``merge`` says that the chunk is merged. ``alone`` says that the chunk answers the needs for
    itself, as if it were a tensor, ``shared`` that all tensors of a model answer them together. ``inputs_are_there``
    says that an earlier visit brought the inputs into memory, ``inputs_stay`` that a later one will use them.
    """

    task: Task
    start: int
    count: int
    needs: Sequence[Need]
    steps: Sequence[Step]
    last: bool
    merge: bool
    alone: bool = False
    shared: bool = False
    inputs_are_there: bool = False
    inputs_stay: bool = False

    @property
    def whole(self) -> bool:
        """Whether the chunk is all of the tensor."""
        return self.count == self.task.count

    @property
    def answers(self) -> bool:
        """Whether all needs of the tensor are answered after this visit."""
        return self.last and (not self.steps or self.steps[-1] == steps(self.needs, self.task.working)[-1])


class _Division(NamedTuple):
    """How a tensor is cut: the elements of a chunk.

    For a tensor that is cut: the readings that measure it, and whether each reads it whole; or whether its chunks are
    measured and merged alone.
    """

    elements: int
    steps: int = 0
    measured_whole: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Schedule:
    """A plan cut into visits that fit in the budget.

    ``shared_known`` says that the answers to the shared needs are known and are not measured. Raises ``PlanError``
    for a budget that is too small.
    """

    plan: MergePlan
    budget: Budget = Budget()
    shared_known: bool = False
    _divisions: dict[str, _Division] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        needed = sum(self.largest_chunk) + self.scratch_bytes
        if needed > self.budget.memory:
            largest = max(self._computed, key=self._least_bytes)
            raise PlanError(
                [
                    f"{largest.name}: at least {needed / 2**20:.1f} MiB of it must be in memory at a time, but the "
                    f"memory budget is {self.budget.memory / 2**20:.1f} MiB; raise it"
                ]
            )

    def within(self, memory: int) -> Schedule:
        """The schedule of the same plan for another memory budget, in bytes.

        Raises ``PlanError`` if it is too small.
        """
        return replace(self, budget=replace(self.budget, memory=memory))

    @cached_property
    def shared_needs(self) -> Sequence[Need]:
        """The needs that all tensors of a model answer together, each once."""
        merged = [task for task in self.plan.tasks if task.action in _MEASURED and task.count]
        found = {
            need: None for task in merged[:1] for need in self.plan.method.needs(task) if is_shared(need)
        }
        if found:
            found = {
                need: None for task in merged for need in self.plan.method.needs(task) if is_shared(need)
            }
        return tuple(found)

    def own_needs(self, task: Task) -> Sequence[Need]:
        """The needs that a tensor answers alone."""
        if task.action not in _MEASURED or not task.count:
            return ()
        return [need for need in self.plan.method.needs(task) if not is_shared(need)]

    def chunk_elements(self, task: Task) -> int:
        """Elements of a chunk: all of a small tensor, otherwise a multiple of the elements that must stay together."""
        return self._division(task).elements

    def chunks(self, task: Task) -> Sequence[tuple[int, int]]:
        """(start, count) in elements of each chunk that is merged. Empty for a tensor without elements."""
        total, step = task.count, self.chunk_elements(task)
        if total <= step:
            return ((0, total),) if total else ()
        return [(start, min(step, total - start)) for start in range(0, total, step)]

    def readings(self, task: Task) -> int:
        """The number of times that a tensor's inputs are read, merging included."""
        division = self._division(task)
        once = division.elements >= task.count or division.measured_whole or division.alone
        shared = len(self._shared_steps) if task.action in _MEASURED else 0
        merged = task.action is not Action.MEASURE
        return shared + (1 if once else merged + division.steps)

    @cached_property
    def largest_chunk(self) -> RingBytes:
        """Bytes of the largest inputs and of the largest output of one chunk. Inputs used in place count as 0."""
        inputs = outputs = 0
        for task in self._computed:
            count = min(self.chunk_elements(task), task.count)
            inputs = max(inputs, self._input_bits(task) * count // 8)
            outputs = max(outputs, task.out.bits * count // 8)
        return RingBytes(inputs, outputs)

    @cached_property
    def scratch_bytes(self) -> int:
        """Bytes that the backend needs beside inputs and outputs."""
        return max((self._scratch_bytes(task) for task in self._computed), default=0)

    @cached_property
    def ring_bytes(self) -> RingBytes:
        """Bytes of the two rings.

        As far as the budget allows, they hold the largest chunk, one that is read meanwhile, and their outputs. They
        are no larger than the plan needs, because new memory costs time.
        """
        pages = 2 * PAGE * max((len(task.inputs) for task in self._computed), default=0)
        largest = self.largest_chunk
        inputs, outputs = largest.inputs + pages, largest.outputs + PAGE
        least = inputs + outputs
        whole = sum(self._span_bytes(task, task.count) + 2**16 for task in self._computed)
        wanted = min(max(_HELD * least, _PIECES_AT_ONCE * self._piece), whole)
        total = max(least, min(wanted, self.budget.memory - self.scratch_bytes))
        return RingBytes(*(aligned(part * total // least) for part in (inputs, outputs)))

    @cached_property
    def bytes_read(self) -> int:
        """Input bytes that all readings of all tensors move together."""
        return sum(
            self.readings(task) * operand.stored_bytes for task in self.plan.tasks for operand in task.inputs
        )

    @cached_property
    def bytes_up(self) -> int:
        """Input bytes that cross the link to a device, if there is one."""
        return sum(self.readings(task) * self._input_bits(task) * task.count // 8 for task in self._computed)

    @cached_property
    def bytes_down(self) -> int:
        """Output bytes that cross the link from a device, if there is one."""
        return sum(
            task.out.bits * task.count // 8 for task in self._computed if task.action is not Action.MEASURE
        )

    def visits(self) -> Iterator[Visit]:
        """Every visit of a run, in order."""
        yield from self._shared_visits()
        for task in self._in_writing_order():
            yield from self._visits_of(task)

    def _visits_of(self, task: Task) -> Iterator[Visit]:
        division, merge = self._division(task), task.action is not Action.MEASURE
        total, needs = task.count, self.own_needs(task)
        readings = steps(needs, task.working)
        if not merge and not readings:
            return
        if total <= division.elements:
            if total:
                yield Visit(task, 0, total, needs, readings, True, merge)
            return
        chunks = self.chunks(task)
        if division.alone:
            for start, count in chunks:
                yield Visit(task, start, count, needs, readings, True, merge, alone=True)
            return
        if division.measured_whole:
            for number, step in enumerate(readings):
                there = number > 0
                yield Visit(
                    task, 0, total, needs, (step,), True, False, inputs_are_there=there, inputs_stay=merge
                )
        else:
            for step in readings:
                for start, count in chunks:
                    yield Visit(task, start, count, needs, (step,), start + count == total, False)
        for start, count in chunks if merge else ():
            there = division.measured_whole
            yield Visit(task, start, count, needs, (), False, True, inputs_are_there=there)

    def _shared_visits(self) -> Iterator[Visit]:
        tasks = sorted(self._measured_together, key=lambda task: task.name)
        for step in self._shared_steps:
            for task in tasks:
                for start, count in self.chunks(task):
                    last = task is tasks[-1] and start + count == task.count
                    yield Visit(task, start, count, self.shared_needs, (step,), last, False, shared=True)

    @cached_property
    def _measured_together(self) -> Sequence[Task]:
        return [task for task in self.plan.tasks if task.action in _MEASURED and task.count]

    @cached_property
    def _shared_steps(self) -> Sequence[Step]:
        if not self.shared_needs or self.shared_known:
            return ()
        return steps(self.shared_needs, self._measured_together[0].working)

    @cached_property
    def _computed(self) -> Sequence[Task]:
        """The tasks that the backend works on: all but copies."""
        return [task for task in self.plan.tasks if task.action is not Action.COPY]

    def _in_writing_order(self) -> Sequence[Task]:
        """Tasks in the order of their output. Shards take turns, so that several files are written side by side."""
        if len(self.plan.shards) < 2:
            return self.plan.tasks
        by_shard: list[list[Task]] = [[] for _ in self.plan.shards]
        for task in self.plan.tasks:
            by_shard[self.plan.shard_of[task.name]].append(task)
        result: list[Task] = []
        for first in range(0, len(by_shard), self.budget.side_by_side):
            result += _in_turns(by_shard[first : first + self.budget.side_by_side])
        return result

    def _division(self, task: Task) -> _Division:
        division = self._divisions.get(task.name)
        if division is None:
            division = self._divisions[task.name] = self._divide(task)
        return division

    def _divide(self, task: Task) -> _Division:
        total, budget = task.count, self.budget
        if task.action is Action.COPY:
            return _Division(max(total, 1))
        grams = self._line_grams(task)
        own = line_elements(self.own_needs(task)) if grams else 0
        scratch = self._mask_bytes(task, SUM_BLOCK) + _SUMS_HELD * self._sums_bytes(task, SUM_BLOCK)
        if own:
            scratch += _SUMS_HELD * self._lines_bytes(task, SUM_BLOCK)
        blocks = min(budget.memory // _PIECES, self._piece) // max(self._span_bytes(task, SUM_BLOCK), 1)
        if scratch:
            blocks = min(blocks, budget.memory // _PIECES // scratch)
        fitting = min(max(blocks, 1) * SUM_BLOCK, MOST_ELEMENTS)
        if total <= fitting:
            return _Division(max(total, 1))
        if own and (unit := math.lcm(SUM_BLOCK, own)) <= fitting:
            return _Division(fitting // unit * unit, alone=True)
        needs = self.own_needs(task)
        readings = len(steps(needs, task.working))
        lines = self._sums_bytes(task, total) + self._lines_bytes(task, total)
        held = _HELD * self._span_bytes(task, total) + self._mask_bytes(task, total) + lines
        if readings and total <= MOST_ELEMENTS and not budget.in_place and held <= budget.memory:
            return _Division(total)
        together = max((need.elements for need in needs if isinstance(need, Together)), default=1)
        unit = min(math.lcm(SUM_BLOCK, together), total)
        # A backend may keep one bit of notes for every element of every model whose norms are summed.
        noted = any(isinstance(need, MaskedL1 | MaskedSquares) for need in needs)
        notes = total * len(task.models) // 8 if noted else 0
        whole = budget.in_place and total <= MOST_ELEMENTS and notes + lines <= budget.memory // _PIECES
        return _Division(max(fitting // unit, 1) * unit, readings, readings > 0 and whole)

    def _scratch_bytes(self, task: Task) -> int:
        """Bytes that the backend and the answers need beside inputs and output."""
        division, total = self._division(task), task.count
        count = min(division.elements, total)
        masks = self._mask_bytes(task, count)
        if division.alone:
            return masks + _SUMS_HELD * (self._sums_bytes(task, count) + self._lines_bytes(task, count))
        at_once = total if division.measured_whole else min(_SUMS_HELD * count, total)
        return masks + self._sums_bytes(task, at_once) + self._lines_bytes(task, total)

    def _mask_bytes(self, task: Task, count: int) -> int:
        """Bytes of the masks of so many elements."""
        return self.plan.method.scratch_bytes(len(task.models)) * count if task.action is Action.MERGE else 0

    def _sums_bytes(self, task: Task, count: int) -> int:
        """Bytes of the sums of lines over the blocks of so many elements."""
        return sum(
            -(-8 * _pairs(task, need) * lines_of_block(line) * count // sum_block(line))
            for need, line in self._line_grams(task)
        )

    def _lines_bytes(self, task: Task, count: int) -> int:
        """Bytes of the totals and coefficients of the lines of so many elements."""
        result = 0
        for need, line in self._line_grams(task):
            pairs, vectors = _pairs(task, need), _vectors(task, need)
            if line.stride > 1:
                result += 8 * (pairs + vectors) * line.stride
            else:  # a chunk has a copy of its coefficients
                result += 8 * (pairs + 2 * vectors) * -(-count // line.length)
        return result

    def _line_grams(self, task: Task) -> Sequence[tuple[Gram, Line]]:
        """The needs that each line of a tensor answers, and the lines."""
        if not self.plan.method.sums_lines or task.action is not Action.MERGE:
            return ()
        needs = self.own_needs(task)
        return [(need, need.line) for need in needs if isinstance(need, Gram) and need.line is not None]

    def _least_bytes(self, task: Task) -> int:
        """Bytes of a chunk of a tensor, with what it takes beside."""
        return self._span_bytes(task, min(self.chunk_elements(task), task.count)) + self._scratch_bytes(task)

    @property
    def _piece(self) -> int:
        return self.budget.cached_piece if self.budget.in_place else self.budget.piece

    def _span_bytes(self, task: Task, count: int) -> int:
        """Bytes of ``count`` elements in all inputs and the output."""
        return (self._input_bits(task) + task.out.bits) * count // 8

    def _input_bits(self, task: Task) -> int:
        return 0 if self.budget.in_place else task.input_bits


_MEASURED = (Action.MERGE, Action.MEASURE)


def _vectors(task: Task, need: Gram) -> int:
    return len(task.models) if need.of_deltas else len(task.inputs)


def _pairs(task: Task, need: Gram) -> int:
    vectors = _vectors(task, need)
    return vectors * (vectors + 1) // 2


def _in_turns(lists: Sequence[Sequence[Task]]) -> Iterator[Task]:
    """The tasks of all lists, so mixed that every list is at the same share of its elements at any time."""
    placed = []
    for tasks in lists:
        total = sum(task.count for task in tasks)
        done = 0
        for number, task in enumerate(tasks):
            placed.append((done / max(total, 1), number, task))
            done += task.count
    placed.sort(key=lambda place: place[:2])
    return (task for *_, task in placed)
