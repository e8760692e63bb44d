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

from merge_engine.backends.statistics import SUM_BLOCK
from merge_engine.errors import PlanError
from merge_engine.methods import Action, MaskedL1, MaskedSquares, Need, Together
from merge_engine.methods.needs import Step, is_shared, line_elements, steps
from merge_engine.planning.budget import Budget
from merge_engine.planning.joint import Group, Joint, JointTask, Part, SharedGroup, joined
from merge_engine.planning.plan import MergePlan
from merge_engine.planning.scratch import Scratch
from merge_engine.planning.visits import Visit
from merge_engine.storage import PAGE, aligned

MOST_ELEMENTS = 1 << 30
"""Elements of a chunk: native code counts those of a chunk in 32 bits."""

_PIECES = 8  # A chunk takes at most this part of the memory, so that the first one is soon read.
_PIECES_OF_SEVERAL = 4
"""Pieces in a chunk of several outputs: each call of a backend takes 40 us, and ten recipes took a tenth less time."""

_HELD = 2  # Room for so many tensors that are held whole: while one is merged, the next is read.
_SUMS_HELD = 3  # Chunks whose sums of lines are held: their totals wait for a device.
_PIECES_AT_ONCE = (
    4  # With fewer chunks in the rings, a disk with a high rate and a high latency would be idle.
)


class RingBytes(NamedTuple):
    """Bytes of memory for inputs and for outputs."""

    inputs: int
    outputs: int


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

    ``shared_known`` says that the answers to the shared needs are known and are not measured. ``beside`` are the plans
    of other recipes over the same inputs: what all of them make of a tensor is made in the same visits. Raises
    ``PlanError`` for a budget that is too small.
    """

    plan: MergePlan
    budget: Budget = field(default_factory=Budget)
    shared_known: bool = False
    beside: tuple[MergePlan, ...] = ()
    _divisions: dict[int, _Division] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        needed = sum(self.largest_chunk) + self.scratch_bytes
        if needed > self.budget.memory:
            largest = max(self._computed, key=self._least_bytes)
            raise PlanError(
                [
                    f"{largest.name}: at least {needed:,} bytes of it must be in memory at a time, but the memory "
                    f"budget is {self.budget.memory:,} bytes; raise it"
                ]
            )

    @cached_property
    def plans(self) -> tuple[MergePlan, ...]:
        """The plans of all recipes, by their numbers in ``Part``."""
        return (self.plan, *self.beside)

    @cached_property
    def _joint(self) -> Joint:
        return joined(self.plans)

    @property
    def tasks(self) -> Sequence[JointTask]:
        """The tensors of all plans, each with all that is made of it."""
        return self._joint.tasks

    @property
    def shared(self) -> Sequence[SharedGroup]:
        """The recipes that answer shared needs together."""
        return self._joint.shared

    def within(self, memory: int) -> Schedule:
        """The schedule of the same plan for another memory budget, in bytes.

        Raises ``PlanError`` if it is too small.
        """
        return replace(self, budget=replace(self.budget, memory=memory))

    def own_needs(self, group: Group) -> Sequence[Need]:
        """The needs of all parts of a group that the tensor answers alone, each once."""
        task = group.task
        if task.action not in _MEASURED or not task.count:
            return ()
        needs = [
            need
            for part in group.parts
            for need in self.plans[part.recipe].method.needs(part.task)
            if not is_shared(need)
        ]
        return needs if len(group.parts) == 1 else list(dict.fromkeys(needs))

    def chunk_elements(self, task: JointTask) -> int:
        """Elements of a chunk: all of a small tensor, otherwise a multiple of the elements that must stay together."""
        return self._division(task).elements

    def chunks(self, task: JointTask) -> Sequence[tuple[int, int]]:
        """(start, count) in elements of each chunk that is merged. Empty for a tensor without elements."""
        total, step = task.count, self.chunk_elements(task)
        if total <= step:
            return ((0, total),) if total else ()
        return [(start, min(step, total - start)) for start in range(0, total, step)]

    def readings(self, task: JointTask) -> int:
        """The number of times that a tensor's inputs are read, merging included."""
        division = self._division(task)
        shared = len({step for number in self._shared_of(task) for step in self._shared_steps[number]})
        if division.elements >= task.count or division.measured_whole or division.alone:
            return shared + 1
        return shared + division.steps + len(self._rounds(task))

    @cached_property
    def largest_chunk(self) -> RingBytes:
        """Bytes of the largest inputs and of the largest output of one chunk. Inputs used in place count as 0."""
        inputs = outputs = 0
        for task in self._computed:
            count = min(self.chunk_elements(task), task.count)
            inputs = max(inputs, self._input_bits(task) * count // 8)
            outputs = max(outputs, task.output_bits * count // 8)
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
        inputs, outputs = largest.inputs + pages, largest.outputs + PAGE * len(self.plans)
        least = inputs + outputs
        whole = sum(self._span_bytes(task, task.count) + 2**16 for task in self._computed)
        wanted = min(max(_HELD * least, _PIECES_AT_ONCE * self._piece), whole)
        total = max(least, min(wanted, self.budget.memory - self.scratch_bytes))
        return RingBytes(*(aligned(part * total // least) for part in (inputs, outputs)))

    @cached_property
    def bytes_read(self) -> int:
        """Input bytes that all readings of all tensors move together."""
        return sum(
            self.readings(task) * operand.stored_bytes for task in self.tasks for operand in task.inputs
        )

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of tensor data in all outputs."""
        return sum(plan.bytes_written for plan in self.plans)

    @cached_property
    def bytes_up(self) -> int:
        """Input bytes that cross the link to a device, if there is one."""
        return sum(self.readings(task) * self._input_bits(task) * task.count // 8 for task in self._computed)

    @cached_property
    def bytes_down(self) -> int:
        """Output bytes that cross the link from a device, if there is one."""
        return sum(task.output_bits * task.count // 8 for task in self._computed)

    def visits(self) -> Iterator[Visit]:
        """Every visit of a run, in order."""
        yield from self._shared_visits()
        for task in self._in_writing_order():
            yield from self._visits_of(task)

    def _visits_of(self, task: JointTask) -> Iterator[Visit]:
        division, total = self._division(task), task.count
        needs = [self.own_needs(group) for group in task.groups]
        wanted = [steps(each, group.task.working) for each, group in zip(needs, task.groups, strict=True)]
        parts = task.written
        readings = _all_steps(wanted)
        if not total or not (parts or readings):
            return
        if total <= division.elements:
            yield Visit(task, 0, total, needs, wanted, True, parts)
            return
        chunks = self.chunks(task)
        if division.alone:
            for start, count in chunks:
                yield Visit(task, start, count, needs, wanted, True, parts, alone=True)
            return
        held = division.measured_whole
        for number, step in enumerate(readings):
            now = [[step] if step in each else [] for each in wanted]
            if held:
                there = number > 0
                yield Visit(task, 0, total, needs, now, True, inputs_are_there=there, inputs_stay=bool(parts))
            else:
                for start, count in chunks:
                    yield Visit(task, start, count, needs, now, start + count == total)
        nothing: list[list[Step]] = [[] for _ in wanted]
        rounds = self._rounds(task)
        for together in rounds:
            stay = held and together is not rounds[-1]
            for start, count in chunks:
                yield Visit(
                    task,
                    start,
                    count,
                    needs,
                    nothing,
                    False,
                    together,
                    inputs_are_there=held,
                    inputs_stay=stay,
                    final=together is rounds[-1] and start + count == total,
                )

    def _rounds(self, task: JointTask) -> Sequence[Sequence[Part]]:
        """The parts of a tensor that is cut, in the order of their merging: those of a round are merged together."""
        parts = task.written
        if not self.budget.whole_outputs:
            return [parts] if parts else []
        rounds: list[list[Part]] = []
        begun = 0
        for part in parts:
            nbytes = part.task.out.bits * task.count // 8
            if not rounds or begun + nbytes > self.budget.memory:
                rounds.append([])
                begun = 0
            rounds[-1].append(part)
            begun += nbytes
        return rounds

    def _shared_visits(self) -> Iterator[Visit]:
        if not self.shared:
            return
        tasks = sorted((task for task in self.tasks if self._shared_of(task)), key=lambda task: task.name)
        for step in _all_steps(self._shared_steps):
            for task in tasks:
                of_task = self._shared_of(task)
                now = [
                    [step] if number in of_task and step in each else []
                    for number, each in enumerate(self._shared_steps)
                ]
                if any(now):
                    for start, count in self.chunks(task):
                        yield Visit(task, start, count, (), now, False, shared=True)

    def _shared_of(self, task: JointTask) -> list[int]:
        """The numbers of the shared groups that a tensor is measured for."""
        if not self.shared or self.shared_known or not task.count:
            return []
        return [
            group.shared
            for group in task.groups
            if group.shared is not None and group.task.action in _MEASURED
        ]

    @cached_property
    def _shared_steps(self) -> Sequence[Sequence[Step]]:
        """The readings of each shared group."""
        return [steps(group.needs, group.tasks[0].working) for group in self.shared]

    @cached_property
    def _scratch(self) -> Scratch:
        return Scratch([plan.method for plan in self.plans])

    @cached_property
    def _computed(self) -> Sequence[JointTask]:
        """The tasks that the backend works on: all but copies."""
        return [task for task in self.tasks if not task.copied]

    def _in_writing_order(self) -> Sequence[JointTask]:
        """Tasks in the order of their output. Shards take turns, so that several files are written side by side.

        The shards are those of the first recipe that has the tensor.
        """
        if all(len(plan.shards) < 2 for plan in self.plans):
            return self.tasks
        by_shard: dict[tuple[int, int], list[JointTask]] = {}
        for task in self.tasks:
            first = min(part.recipe for part in task.parts)
            by_shard.setdefault((first, self.plans[first].shard_of[task.name]), []).append(task)
        lists = [by_shard[shard] for shard in sorted(by_shard)]
        result: list[JointTask] = []
        for begin in range(0, len(lists), self.budget.side_by_side):
            result += _in_turns(lists[begin : begin + self.budget.side_by_side])
        return result

    def _division(self, task: JointTask) -> _Division:
        division = self._divisions.get(id(task))
        if division is None:
            division = self._divisions[id(task)] = self._divide(task)
        return division

    def _divide(self, task: JointTask) -> _Division:
        total, budget = task.count, self.budget
        if task.copied:
            return _Division(max(total, 1))
        grams = self._scratch.line_grams(task)
        # Every part must be solved for a chunk alone: draws depend on where in the tensor an element is.
        own = line_elements(self._all_needs(task)) if len(grams) == len(task.parts) else 0
        scratch = self._scratch.masks(task, SUM_BLOCK) + _SUMS_HELD * self._scratch.sums(task, SUM_BLOCK)
        if own:
            scratch += _SUMS_HELD * self._scratch.lines(task, SUM_BLOCK)
        blocks = min(budget.memory // _PIECES, self._piece) // max(self._span_bytes(task, SUM_BLOCK), 1)
        if scratch:
            blocks = min(blocks, budget.memory // _PIECES // scratch)
        fitting = min(max(blocks, 1) * SUM_BLOCK, MOST_ELEMENTS)
        if total <= fitting:
            return _Division(max(total, 1))
        if own and (unit := math.lcm(SUM_BLOCK, own)) <= fitting:
            return _Division(fitting // unit * unit, alone=True)
        needs = self._all_needs(task)
        readings = len(_all_steps([steps(self.own_needs(g), g.task.working) for g in task.groups]))
        lines = self._scratch.sums(task, total) + self._scratch.lines(task, total)
        held = _HELD * self._span_bytes(task, total) + self._scratch.masks(task, total) + lines
        if readings and total <= MOST_ELEMENTS and not budget.in_place and held <= budget.memory:
            return _Division(total)
        together = math.lcm(*(need.elements for need in needs if isinstance(need, Together)))
        unit = min(math.lcm(SUM_BLOCK, together), total)
        # A backend may keep one bit of notes for every element of every model whose norms are summed.
        noted = any(isinstance(need, MaskedL1 | MaskedSquares) for need in needs)
        notes = total * sum(len(group.task.models) for group in task.groups) // 8 if noted else 0
        whole = budget.in_place and total <= MOST_ELEMENTS and notes + lines <= budget.memory // _PIECES
        return _Division(max(fitting // unit, 1) * unit, readings, readings > 0 and whole)

    def _all_needs(self, task: JointTask) -> list[Need]:
        return [need for group in task.groups for need in self.own_needs(group)]

    def _scratch_bytes(self, task: JointTask) -> int:
        """Bytes that the backend and the answers need beside inputs and outputs."""
        division, total = self._division(task), task.count
        count = min(division.elements, total)
        masks = self._scratch.masks(task, count)
        if division.alone:
            return masks + _SUMS_HELD * (self._scratch.sums(task, count) + self._scratch.lines(task, count))
        at_once = total if division.measured_whole else min(_SUMS_HELD * count, total)
        return masks + self._scratch.sums(task, at_once) + self._scratch.lines(task, total)

    def _least_bytes(self, task: JointTask) -> int:
        """Bytes of a chunk of a tensor, with what it takes beside."""
        return self._span_bytes(task, min(self.chunk_elements(task), task.count)) + self._scratch_bytes(task)

    @cached_property
    def _piece(self) -> int:
        if not self.budget.in_place:
            return self.budget.piece
        return self.budget.cached_piece * min(len(self.plans), _PIECES_OF_SEVERAL)

    def _span_bytes(self, task: JointTask, count: int) -> int:
        """Bytes of ``count`` elements in all inputs and all outputs."""
        return self._input_bits(task) * count // 8 + task.output_bits * count // 8

    def _input_bits(self, task: JointTask) -> int:
        return 0 if self.budget.in_place else task.input_bits


_MEASURED = (Action.MERGE, Action.MEASURE)


def _all_steps(of_groups: Sequence[Sequence[Step]]) -> Sequence[Step]:
    """The readings of all groups in order, each once."""
    return of_groups[0] if len(of_groups) == 1 else sorted({step for each in of_groups for step in each})


def _in_turns(lists: Sequence[Sequence[JointTask]]) -> Iterator[JointTask]:
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
