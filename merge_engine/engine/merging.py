"""Carry out visits on memory that holds their inputs: measure, solve, apply, count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from merge_engine.backends import Backend
from merge_engine.backends.cpu import identical
from merge_engine.backends.operations import Chunk, Combine, Consensus, Line, Outcome
from merge_engine.dtypes import DType
from merge_engine.engine.plan import Plan
from merge_engine.engine.result import ModelCounts, TensorResult
from merge_engine.engine.tasks import TensorJob
from merge_engine.engine.visits import Visit
from merge_engine.errors import NonFiniteError, PlanError
from merge_engine.methods import MergeTask, Operation, Solution


def apply(backend: Backend, operation: Operation, chunk: Chunk, output: Any) -> Any:
    """Write a merged chunk. A handle to its ``Outcome``."""
    if isinstance(operation, Consensus):
        return backend.consensus(chunk, operation, output)
    return backend.combine(chunk, operation, output)


def count(
    backend: Backend, result: TensorResult, task: MergeTask, outcome: Outcome, solution: Solution, first: bool
) -> None:
    """Add a chunk's counts to its tensor's. What a trim would have kept is known per tensor, not per chunk."""
    for model, counts in zip(task.models, outcome.counts, strict=False):
        before = result.counts.get(model, ModelCounts())
        trimmed = not solution.whole_model and model in solution.trimmed_to
        plain = backend.fetch(solution.trimmed_to[model]) if trimmed and first else 0
        saved = counts.kept - plain if trimmed else 0
        result.counts[model] = before + ModelCounts(counts.kept, counts.lost, saved, counts.saved)


def check_finite(
    job: TensorJob, outcome: Outcome, chunk: Chunk, sources: Sequence[tuple[str, DType]], allowed: bool
) -> None:
    """Refuse NaN and infinity, naming the input they are in, or the output where they first appear.

    ``sources`` says, for every input of the tensor in order, where it is and the dtype it is stored in.
    """
    if allowed:
        return
    for (place, stored), found in zip(sources, outcome.non_finite, strict=False):
        if found and stored == chunk.working:
            raise NonFiniteError(
                f"{place} holds {found} NaN or infinite value(s); repair the checkpoint, or set "
                "allow_nonfinite: true to merge it all the same"
            )
        if found:
            raise NonFiniteError(
                f"{place} holds {found} value(s) that are NaN, infinite or too large for {chunk.working}, which "
                "it is merged in; choose a wider dtype, or set allow_nonfinite: true to merge it all the same"
            )
    if outcome.non_finite_output:
        raise NonFiniteError(
            f"{job.name}: {outcome.non_finite_output} merged value(s) are too large for {job.out}; choose a wider "
            "out_dtype or smaller weights, or set allow_nonfinite: true to write infinity"
        )


def differing(job: TensorJob, one: object, other: object) -> PlanError:
    """What is wrong when two inputs differ in a tensor that can only be copied."""
    return PlanError(
        [
            f"{job.name}: {job.out} tensors cannot be merged and must be the same in all inputs, but {other} "
            f"differs from {one}"
        ]
    )


class _Measured(NamedTuple):
    """A tensor that was measured whole, and is merged in parts: whether no model changed it."""

    chunk: Chunk
    unchanged: bool


class Merger:
    """Visits the tensors of a plan, in order. ``results`` has one entry for each merged tensor."""

    def __init__(self, plan: Plan, backend: Backend):
        self._plan = plan
        self._backend = backend
        self._current: tuple[TensorJob, Solution] | None = None
        self._measured: dict[str, _Measured] = {}
        self.results: dict[str, TensorResult] = {}
        self.trimmed_to: dict[int, int] = {}  # over all tensors, when the trim was

    def visit(
        self, visit: Visit, inputs: Sequence[memoryview], output: memoryview
    ) -> Callable[[], Callable[[], None]]:
        """Measure one chunk. ``inputs`` are the base, if any, and the models.

        What is returned merges it into ``output``, unless it is only to be measured. Several visits may be measured
        before the first of them is merged: then the backend can be asked for what all of them need at once. It may
        work on a visit for longer than this takes: merging returns what waits until inputs and output are no longer
        in use. Call each once, in the order of the visits; one after which inputs stay may be measured by another
        thread, ahead of that. The wait raises ``NonFiniteError`` for NaN or
        infinity that the recipe does not allow. Raises ``PlanError`` for tensors that cannot be merged and are not
        the same everywhere.
        """
        job, backend = visit.job, self._backend
        if job.task is None and not job.out.mergeable:
            self._copy(visit, inputs, output)
            return lambda: lambda: None
        whole = self._measured.get(job.name)
        unchanged = whole.unchanged if whole is not None else self._unchanged(visit, inputs)
        chunk = self._chunk(visit, inputs[:1] if unchanged else inputs)
        if visit.stays:
            self._measured[job.name] = _Measured(chunk, unchanged)
        elif whole is not None:
            chunk.part_of = whole.chunk
            if visit.start + visit.count == job.count:
                del self._measured[job.name]
        if job.task is not None and not unchanged:
            for statistic in visit.statistics:
                statistic.measure(backend, chunk, job.task)
                if statistic in visit.complete:
                    statistic.finish(backend)
        return lambda: self._merge(visit, chunk, output, unchanged)

    def _merge(self, visit: Visit, chunk: Chunk, output: memoryview, unchanged: bool) -> Callable[[], None]:
        job, backend = visit.job, self._backend
        if not visit.merge:
            done = backend.mark()
            return lambda: backend.fetch(done)
        target = backend.output(output, job.out)
        if job.task is None or unchanged:
            handle = backend.combine(chunk, Combine((1.0,)), target)
            return lambda: self._finish(visit, chunk, handle, None)
        solution = self._solution(visit)
        handle = apply(backend, solution.operation, chunk, target)
        return lambda: self._finish(visit, chunk, handle, solution)

    def _finish(self, visit: Visit, chunk: Chunk, handle: Any, solution: Solution | None) -> None:
        """Take in the outcome of a merge. Without a solution the tensor was copied."""
        job, outcome = visit.job, self._backend.fetch(handle)
        self._check_finite(job, outcome, chunk)
        result = self.results.setdefault(job.name, TensorResult(job.name, 0))
        result.elements += visit.count
        if job.task is None:
            return
        if solution is None:
            for model in job.task.models:
                result.counts.setdefault(model, ModelCounts())
            return
        if solution.whole_model:
            fetched = {model: self._backend.fetch(kept) for model, kept in solution.trimmed_to.items()}
            self.trimmed_to.update(fetched)
        count(self._backend, result, job.task, outcome, solution, first=visit.start == 0)

    def _solution(self, visit: Visit) -> Solution:
        if self._current is None or self._current[0] is not visit.job:
            self._current = visit.job, visit.program.solve(self._backend)
        return self._current[1]

    def _chunk(self, visit: Visit, inputs: Sequence[memoryview]) -> Chunk:
        """The chunk that a backend works on. A tensor that is copied, having one input, has no base."""
        job = visit.job
        types = self._plan.input_dtypes(job)
        arrays = [self._backend.array(view, dtype) for view, dtype in zip(inputs, types, strict=False)]
        has_base = self._plan.base is not None and job.task is not None and len(arrays) > 1
        return Chunk(arrays, has_base, job.working, visit.start, visit.count, Line.of(job.shape))

    def _unchanged(self, visit: Visit, inputs: Sequence[memoryview]) -> bool:
        """Whether no model changed this chunk, so that the base's values are the result.

        Only exact when nothing is rounded, no zero is negative and no value infinite; it saves the computing. A chunk
        that was measured by itself has counts that need the computing.
        """
        job = visit.job
        return (
            job.task is not None
            and self._plan.base is not None
            and (visit.whole or (visit.merge and not visit.program.statistics))
            and not self._plan.recipe.allow_nonfinite
            and set(self._plan.input_dtypes(job)) == {job.task.working}
            and identical(inputs, job.task.working)
        )

    def _copy(self, visit: Visit, inputs: Sequence[memoryview], output: memoryview) -> None:
        """Copy a tensor that cannot be merged; all inputs must hold the same."""
        sources = self._plan.inputs(visit.job)
        for (checkpoint, _), data in zip(sources[1:], inputs[1:], strict=True):
            if not identical([inputs[0], data], None):
                raise differing(visit.job, sources[0][0].path, checkpoint.path)
        output[:] = inputs[0]
        result = self.results.setdefault(visit.job.name, TensorResult(visit.job.name, 0))
        result.elements += visit.count

    def _check_finite(self, job: TensorJob, outcome: Outcome, chunk: Chunk) -> None:
        sources = [
            (f"{checkpoint.file_of(name)}: tensor {name}", checkpoint.tensors[name].dtype)
            for checkpoint, name in self._plan.inputs(job)
        ]
        check_finite(job, outcome, chunk, sources, self._plan.recipe.allow_nonfinite)
