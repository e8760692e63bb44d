"""One visit on a backend, in three phases: measure, merge, wait.

The phases are separate because several visits are in flight at a time. All visits of a batch are measured before the
first is merged, so that a device measures them together, and the next batch may start before the device has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from merge_engine.backends.memory import identical
from merge_engine.backends.operations import Chunk, Combine, Consensus, Entry, Line, Nearswap, Outcome
from merge_engine.engine.measuring import Measurement
from merge_engine.engine.runs import Before, Run, Runs, Solved
from merge_engine.errors import NonFiniteError
from merge_engine.methods import Action, Task
from merge_engine.methods.needs import needs_reading
from merge_engine.observe.result import ModelCounts, TensorResult
from merge_engine.planning import Part, Visit

COPY = Combine((1.0,))
"""Copies every finite value bit for bit, converted to the output's type."""


class Work:
    """One visit.

    ``arrays`` returns its first so many inputs as arrays of the backend. ``hosts`` are the same
    inputs, if the backend computes in the host's memory. Call ``measure``, ``merge`` and ``wait``, each once and in
    the order of the visits.
    """

    def __init__(
        self,
        runs: Runs,
        visit: Visit,
        arrays: Callable[[int], list[Any]],
        hosts: Sequence[memoryview] | None = None,
    ):
        self._runs = runs
        self.visit = visit
        self._measured = [
            _Measured(runs, visit, number, arrays, hosts) for number in range(len(visit.task.groups))
        ]
        self._merged = [
            _Merged(runs.each[part.recipe], part, self._measured[part.group]) for part in visit.parts
        ]
        self._mark: Any = None

    def measure(self) -> None:
        """Measure the steps of the visit.

        Raises ``CheckpointError`` for inputs that changed since an earlier step.
        """
        for each in self._measured:
            each.measure()

    def merge(self, *outputs: Any) -> None:
        """Merge into ``outputs``: for each part of the visit an array of the backend with the visit's elements.

        Waits if an operation depends on an answer that the device has not found yet.
        """
        if not self._merged:
            self._mark = self._runs.backend.mark()
        for each, output in zip(self._merged, outputs, strict=True):
            each.merge(output)

    def wait(self) -> None:
        """Wait until inputs and outputs are no longer in use, and add the counts to the results of the runs.

        Raises ``NonFiniteError`` for NaN or infinity that the recipe does not allow.
        """
        for each in self._merged:
            each.wait()
        if self._runs.keeps:
            for measured in self._measured:
                measured.keep()
        if not self._merged:
            self._runs.backend.fetch(self._mark)
            self._answer()
        elif self.visit.final and not self.visit.whole:  # nothing is remembered from one visit to the next
            self._runs.forget(self.visit.task)

    def _answer(self) -> None:
        """Give the answers of tensors that are only measured away."""
        visit, runs = self.visit, self._runs
        if visit.shared or runs.answered is None:
            return
        for number, each in enumerate(self._measured):
            if visit.answers(number):
                runs.answered(each.group.task, each.measurement)
                runs.forget(visit.task)


class _Measured:
    """One visit for a group of parts: its chunk, what is measured, and the parts that copy the base."""

    def __init__(
        self,
        runs: Runs,
        visit: Visit,
        number: int,
        arrays: Callable[[int], list[Any]],
        hosts: Sequence[memoryview] | None,
    ):
        self.visit = visit
        self.group = visit.task.groups[number]
        self.unchanged: frozenset[int] = frozenset()
        self._runs = runs
        self._number = number
        self._arrays = arrays
        self._hosts = hosts
        self._measurement: Measurement | None = None
        self._chunk: Chunk | None = None
        self._first: Chunk | None = None

    def measure(self) -> None:
        """Measure the steps of the visit for the group. See ``Work.measure``."""
        runs, visit, group = self._runs, self.visit, self.group
        before = runs.before.get((visit.task, self._number))
        self.unchanged = self._unchanged() if before is None else before.unchanged
        if before is not None and before.chunk is not None:
            self.chunk.part_of = before.chunk
        if visit.inputs_stay and not visit.parts:
            chunk = self.chunk if self.is_computed else None
            runs.before[visit.task, self._number] = Before(chunk, self.unchanged)
        if visit.shared and runs.tally is not None:
            runs.tally.add(self.chunk, group.task)
        elif visit.shared:
            if group.shared is not None:
                last = visit.ends and group.task is runs.last_shared[group.shared]
                for step in visit.steps[group.shared]:
                    runs.shared[group.shared].add(step, self.chunk, group.task, last, runs.backend)
        elif self.is_computed:
            for step in visit.steps[self._number]:
                self.measurement.add(step, self.chunk, group.task, visit.last, runs.backend)

    def keep(self) -> None:
        """Keep what was measured for the group, once it is complete."""
        if self.visit.shared:
            if self.group.shared is not None:
                self._runs.shared[self.group.shared].keep()
        elif self.is_computed:
            self.measurement.keep()

    @property
    def is_computed(self) -> bool:
        """Whether a method looks at the inputs for at least one part."""
        return self.group.task.action is not Action.ROUND and len(self.unchanged) < len(self.group.parts)

    @property
    def measurement(self) -> Measurement:
        """What is measured for the group in this visit and in others."""
        if self._measurement is None:
            self._measurement = self._runs.measurement(self.visit, self._number)
        return self._measurement

    @property
    def chunk(self) -> Chunk:
        """All inputs of the group."""
        if self._chunk is None:
            places = self.group.places
            arrays = self._arrays(max(places) + 1)
            self._chunk = self._chunk_of([arrays[place] for place in places], self.group.task.has_base)
        return self._chunk

    @property
    def first(self) -> Chunk:
        """The first input alone, which is to be copied."""
        if self._first is None:
            place = self.group.places[0]
            self._first = self._chunk_of([self._arrays(place + 1)[place]], False)
        return self._first

    def _chunk_of(self, arrays: list[Any], has_base: bool) -> Chunk:
        """A chunk for the backend. One that answers alone begins with a line, and looks like a tensor."""
        visit, task = self.visit, self.group.task
        start = 0 if visit.alone else visit.start
        return Chunk(arrays, has_base, task.working, start, visit.count, Line.of(task.shape))

    def _unchanged(self) -> frozenset[int]:
        """The recipes that copy the base, because no model changed this chunk.

        This is exact only if nothing is rounded, no zero is negative and no value infinite (docs/arithmetic.md,
        step 14). A chunk of a tensor that was measured in another visit is computed, because its counts are needed.
        """
        visit, task = self.visit, self.group.task
        if (
            self._hosts is None
            or task.action is not Action.MERGE
            or not task.has_base
            or visit.shared
            or not (
                visit.whole or visit.alone or (visit.parts and not needs_reading(visit.needs[self._number]))
            )
            or not all(operand.dtype == task.working for operand in task.inputs)
        ):
            return frozenset()
        plans = [(part.recipe, self._runs.each[part.recipe].plan) for part in self.group.parts]
        copying = [
            recipe
            for recipe, plan in plans
            if plan.method.keeps_unchanged and not plan.recipe.allow_nonfinite
        ]
        same = copying and identical([self._hosts[place] for place in self.group.places], task.working)
        return frozenset(copying) if same else frozenset()


class _Merged:
    """One visit for one part."""

    def __init__(self, run: Run, part: Part, measured: _Measured):
        self._run = run
        self._task = part.task
        self._recipe = part.recipe
        self._measured = measured
        self._visit = measured.visit
        self._solved: Solved | None = None
        self._handle: Any = None

    @property
    def _unchanged(self) -> bool:
        return self._recipe in self._measured.unchanged

    def merge(self, output: Any) -> None:
        """See ``Work.merge``."""
        backend = self._run.backend
        if self._task.action is Action.ROUND or self._unchanged:
            self._handle = backend.combine(self._measured.first, COPY, output)
            return
        chunk, (operation, _) = self._measured.chunk, self._operation()
        if isinstance(operation, Consensus):
            self._handle = backend.consensus(chunk, operation, output)
        elif isinstance(operation, Nearswap):
            self._handle = backend.nearswap(chunk, operation, output)
        else:
            self._handle = backend.combine(chunk, operation, output)

    def wait(self) -> None:
        """See ``Work.wait``."""
        run, task = self._run, self._task
        outcome = run.backend.fetch(self._handle)
        result = run.add(task, self._visit.count)
        try:
            check_finite(task, outcome, run.plan.recipe.allow_nonfinite, run.label)
        except NonFiniteError:
            run.failed = True
            raise
        if task.action is Action.MERGE:
            self._count(result, outcome)

    def _count(self, result: TensorResult, outcome: Outcome) -> None:
        """Add a chunk's counts to its tensor's.

        The count without trim slack is of the tensor: the first chunk takes it.
        """
        run, task = self._run, self._task
        if self._unchanged:
            for model in task.models:
                result.counts.setdefault(model, ModelCounts())
            return
        _, trimmed_to = self._operation()
        plain = {model: run.backend.fetch(kept) for model, kept in trimmed_to.items()}
        if run.shared is not None:
            run.trimmed_to.update(plain)
            run.decided = run.decided or run.shared.data()
            plain = {}
        for model, counts in zip(task.models, outcome.counts, strict=False):
            before = result.counts.get(model, ModelCounts())
            saved = 0
            if model in plain:
                saved = counts.kept - (plain[model] if self._visit.start == 0 else 0)
            result.counts[model] = before + ModelCounts(counts.kept, counts.lost, saved, counts.saved)

    def _operation(self) -> Solved:
        run, task = self._run, self._task
        found = self._solved or run.operations.get(task.name)
        if found is None:
            measurement = self._measured.measurement
            operation, trimmed_to = run.plan.method.solve(task, measurement), {}
            if isinstance(operation, Consensus):
                masks = {model: e.mask for model, e in zip(task.models, operation.entries, strict=True)}
                solved = measurement.masks(task, masks)
                entries = tuple(
                    Entry(mask, *entry[1:])
                    for entry, (mask, _) in zip(operation.entries, solved, strict=True)
                )
                operation = Consensus(entries, *operation[1:])
                trimmed_to = {
                    model: kept
                    for model, (_, kept) in zip(task.models, solved, strict=True)
                    if kept is not None
                }
            found = self._solved = operation, trimmed_to
            if not self._visit.alone and not self._visit.whole:
                run.operations[task.name] = found
        return found


def check_finite(task: Task, outcome: Outcome, allowed: bool, label: str = "") -> None:
    """Raise ``NonFiniteError`` for NaN or infinity in an input or the output, unless they are ``allowed``.

    ``label`` names the recipe, if there are several.
    """
    if allowed:
        return
    for operand, found in zip(task.inputs, outcome.non_finite, strict=False):
        if found and operand.dtype == task.working:
            raise NonFiniteError(
                f"{operand.label} holds {found} NaN or infinite value(s); repair the checkpoint, or set "
                "allow_nonfinite: true to merge it all the same"
            )
        if found:
            raise NonFiniteError(
                f"{operand.label} holds {found} value(s) that are NaN, infinite or too large for {task.working}, "
                "which it is merged in; choose a wider dtype, or set allow_nonfinite: true to merge it all the same"
            )
    if outcome.non_finite_output:
        place = f"{label}: {task.name}" if label else task.name
        raise NonFiniteError(
            f"{place}: {outcome.non_finite_output} merged value(s) are too large for {task.out}; choose a wider "
            "out_dtype or smaller weights, or set allow_nonfinite: true to write infinity"
        )
