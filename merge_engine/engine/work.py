"""One visit on a backend, in three phases: measure, merge, wait.

The phases are separate because several visits are in flight at a time. All visits of a batch are measured before the
first is merged, so that a device measures them together, and the next batch may start before the device has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypeAlias

from merge_engine.backends import Backend
from merge_engine.backends.memory import identical
from merge_engine.backends.operations import Chunk, Combine, Consensus, Entry, Line, Nearswap, Outcome
from merge_engine.engine.kept import Kept
from merge_engine.engine.measuring import Measurement, SharedAnswers
from merge_engine.errors import NonFiniteError
from merge_engine.methods import Action, Answers, Operation, Task
from merge_engine.methods.needs import needs_reading
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import ModelCounts, TensorResult
from merge_engine.planning import MergePlan, Schedule, Visit

Solved: TypeAlias = tuple[Operation, dict[int, Any]]
"""An operation whose masks the backend has solved, and for each model a handle to the number of entries that its mask
would keep without trim slack."""

COPY = Combine((1.0,))
"""Copies every finite value bit for bit, converted to the output's type."""


class Run:
    """The state that all visits of one run share.

    ``results`` has an entry for each merged tensor. ``trimmed_to`` has, by model, the number of entries that a trim
    over the whole model would have kept without slack. ``decided`` are the answers to the shared needs, once a tensor
    was merged with them. ``notes`` are messages for the user. ``answered`` is called
    with each tensor that is only measured, and its answers. ``shared`` are known answers to the shared needs. ``kept``
    has what was measured of the same tensors before, and takes what is measured.
    """

    def __init__(
        self,
        schedule: Schedule,
        backend: Backend,
        ledger: Ledger | None = None,
        notes: list[str] | None = None,
        answered: Callable[[Task, Answers], None] | None = None,
        shared: SharedAnswers | None = None,
        kept: Kept | None = None,
    ):
        self.plan: MergePlan = schedule.plan
        self.backend = backend
        self.ledger = ledger or Ledger()
        self.notes = notes if notes is not None else []
        self.answered = answered
        self.results: dict[str, TensorResult] = {}
        self.trimmed_to: dict[int, int] = {}
        self.measurements: dict[str, Measurement] = {}  # of tensors that take several visits
        self.operations: dict[str, Solved] = {}
        self.measured: dict[str, tuple[Chunk, bool]] = {}
        self._kept = kept
        self.shared: Measurement | None = None
        self.decided: SharedAnswers | None = None
        if schedule.shared_needs:
            tasks = [task for task in self.plan.tasks if task.action in (Action.MERGE, Action.MEASURE)]
            working = next(task.working for task in tasks if task.count)
            elements = sum(task.count for task in tasks)
            of_all = None if kept is None else kept.of(sorted((t for t in tasks if t.count), key=_by_name))
            self.shared = Measurement(
                backend, schedule.shared_needs, working, elements, known=shared, kept=of_all
            )

    def beside(self, backend: Backend) -> Run:
        """The part of the same run that another backend does."""
        other = copy(self)
        other.backend = backend
        return other

    def add(self, visit: Visit) -> TensorResult:
        """Add a visit that has merged or copied its chunk to the results, and return that of the tensor."""
        name = visit.task.name
        result = self.results.setdefault(name, TensorResult(name, 0))
        result.elements += visit.count
        return result

    def measurement(self, visit: Visit) -> Measurement:
        """The measurement that a visit belongs to."""
        if visit.shared:
            assert self.shared is not None
            return self.shared
        task = visit.task
        if visit.alone:
            return Measurement(self.backend, visit.needs, task.working, visit.count)
        found = self.measurements.get(task.name)
        if found is None:
            kept = None if self._kept is None else self._kept.of([task])
            found = Measurement(self.backend, visit.needs, task.working, task.count, self.shared, kept=kept)
            if not (visit.whole and visit.merge):
                self.measurements[task.name] = found
        return found


class Work:
    """One visit.

    ``arrays`` returns its first so many inputs as arrays of the backend, the base first. ``hosts`` are the same
    inputs, if the backend computes in the host's memory. Call ``measure``, ``merge`` and ``wait``, each once and in
    the order of the visits.
    """

    def __init__(
        self,
        run: Run,
        visit: Visit,
        arrays: Callable[[int], list[Any]],
        hosts: Sequence[memoryview] | None = None,
    ):
        self._run = run
        self.visit = visit
        self._arrays = arrays
        self._hosts = hosts
        self._chunk: Chunk | None = None
        self._unchanged = False
        self._measurement: Measurement | None = None
        self._solved: Solved | None = None
        self._handle: Any = None

    def measure(self) -> None:
        """Measure the steps of the visit.

        Raises ``CheckpointError`` for inputs that changed since an earlier step.
        """
        run, visit = self._run, self.visit
        task = visit.task
        before = run.measured.get(task.name)
        self._unchanged = before[1] if before is not None else self._is_unchanged()
        self._chunk = chunk = self._make_chunk()
        if before is not None:
            chunk.part_of = before[0]
        if visit.inputs_stay:
            run.measured[task.name] = chunk, self._unchanged
        if task.action is Action.ROUND or self._unchanged:
            return
        self._measurement = run.measurement(visit)
        for step in visit.steps:
            self._measurement.add(step, chunk, task, visit.last, run.backend)

    def merge(self, output: Any) -> None:
        """Merge into ``output``, an array of the backend with the visit's elements; None if the visit only measures.

        Waits if the operation depends on an answer that the device has not found yet.
        """
        visit, backend = self.visit, self._run.backend
        task = visit.task
        assert self._chunk is not None
        if not visit.merge:
            self._handle = backend.mark()
        elif task.action is Action.ROUND or self._unchanged:
            self._handle = backend.combine(self._chunk, COPY, output)
        else:
            operation, _ = self._operation()
            if isinstance(operation, Consensus):
                self._handle = backend.consensus(self._chunk, operation, output)
            elif isinstance(operation, Nearswap):
                self._handle = backend.nearswap(self._chunk, operation, output)
            else:
                self._handle = backend.combine(self._chunk, operation, output)

    def wait(self) -> None:
        """Wait until inputs and output are no longer in use, and add the counts to the run's results.

        Raises ``NonFiniteError`` for NaN or infinity that the recipe does not allow.
        """
        run, visit = self._run, self.visit
        task = visit.task
        outcome = run.backend.fetch(self._handle)
        if self._measurement is not None and visit.steps and visit.answers:
            self._measurement.keep()
        if task.action is Action.MEASURE and visit.answers and not visit.shared:
            assert run.answered is not None and self._measurement is not None
            run.answered(task, self._measurement)
            run.measurements.pop(task.name, None)
        if not visit.merge:
            return
        result = run.add(visit)
        check_finite(task, outcome, run.plan.recipe.allow_nonfinite)
        if task.action is Action.MERGE:
            self._count(result, outcome)
        if visit.start + visit.count == task.count:
            run.measurements.pop(task.name, None)
            run.operations.pop(task.name, None)
            run.measured.pop(task.name, None)

    def _count(self, result: TensorResult, outcome: Outcome) -> None:
        """Add a chunk's counts to its tensor's.

        The count without trim slack is of the tensor: the first chunk takes it.
        """
        run, visit, task = self._run, self.visit, self.visit.task
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
                saved = counts.kept - (plain[model] if visit.start == 0 else 0)
            result.counts[model] = before + ModelCounts(counts.kept, counts.lost, saved, counts.saved)

    def _operation(self) -> Solved:
        run, task = self._run, self.visit.task
        found = self._solved or run.operations.get(task.name)
        if found is None:
            measurement = self._measurement if self._measurement is not None else run.measurement(self.visit)
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
            if not self.visit.alone:
                run.operations[task.name] = found
        return found

    def _make_chunk(self) -> Chunk:
        """The chunk for the backend. For an unchanged tensor it has one input and no base.

        One that answers alone begins with a line, and looks like a tensor.
        """
        visit, task = self.visit, self.visit.task
        arrays = self._arrays(1 if self._unchanged else len(task.inputs))
        has_base = task.has_base and not self._unchanged
        start = 0 if visit.alone else visit.start
        return Chunk(arrays, has_base, task.working, start, visit.count, Line.of(task.shape))

    def _is_unchanged(self) -> bool:
        """Whether no model changed this chunk, so that the base's values are the result and need no computing.

        This is exact only if nothing is rounded, no zero is negative and no value infinite (docs/arithmetic.md,
        step 14). A chunk of a tensor that was measured in another visit is computed, because its counts are needed.
        """
        visit, task = self.visit, self.visit.task
        return (
            self._hosts is not None
            and task.action is Action.MERGE
            and task.has_base
            and not visit.shared
            and self._run.plan.method.keeps_unchanged
            and (visit.whole or visit.alone or (visit.merge and not needs_reading(visit.needs)))
            and not self._run.plan.recipe.allow_nonfinite
            and all(operand.dtype == task.working for operand in task.inputs)
            and identical(self._hosts, task.working)
        )


def _by_name(task: Task) -> str:
    return task.name


def check_finite(task: Task, outcome: Outcome, allowed: bool) -> None:
    """Raise ``NonFiniteError`` for NaN or infinity in an input or the output, unless they are ``allowed``."""
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
        raise NonFiniteError(
            f"{task.name}: {outcome.non_finite_output} merged value(s) are too large for {task.out}; choose a wider "
            "out_dtype or smaller weights, or set allow_nonfinite: true to write infinity"
        )
