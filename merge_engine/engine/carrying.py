"""Carry out a schedule: with less memory if the device is short of it, and the shared needs alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from merge_engine.backends import Backend
from merge_engine.engine.answers import SharedAnswers
from merge_engine.engine.pipeline import Pipeline
from merge_engine.engine.runs import Run, Runs, Tally
from merge_engine.engine.scheduling import SMALLEST_DEVICE_MEMORY
from merge_engine.engine.sinks import Target
from merge_engine.errors import DeviceMemoryError, PlanError
from merge_engine.methods import Answers, Method, Need, Operation, Task
from merge_engine.methods.needs import is_shared
from merge_engine.observe.ledger import Ledger, reading_counted
from merge_engine.operands import Access
from merge_engine.planning import Schedule, measuring

Progress = Callable[[int], None]


def carry_out(
    scheduled: Schedule,
    backend: Backend,
    access: Access,
    targets: Sequence[Target],
    progress: Progress | None = None,
    answered: Callable[[Task, Answers], None] | None = None,
    known: Sequence[SharedAnswers | None] = (),
    labels: Sequence[str] = (),
    tally: Tally | None = None,
) -> tuple[Run, ...]:
    """Carry out a schedule, and return the runs of its recipes.

    ``targets`` take the merged bytes, one for each recipe. ``answered`` is called with each tensor that is only
    measured, and its answers. ``known`` has each recipe's answers to the shared needs, if they are known already.
    ``labels`` are the names of several recipes, for messages, and ``tally`` takes what is measured together (see
    ``Runs``). If the device has too little memory, the plan is scheduled again for half of it, and so on. Raises as
    ``run`` does.
    """
    ledger = Ledger()
    notes: list[str] = []
    start = time.perf_counter()
    with reading_counted(ledger):
        while True:
            runs = Runs(scheduled, backend, ledger, notes, answered, known, labels, tally=tally)
            for target, run in zip(targets, runs.each, strict=True):
                if target.recorder is not None:
                    target.recorder.run = run
            try:
                pipeline = Pipeline(scheduled, runs, access, targets, progress or (lambda nbytes: None))
            except DeviceMemoryError as short:
                memory = scheduled.budget.memory // 2
                if memory < SMALLEST_DEVICE_MEMORY:
                    raise
                try:
                    scheduled = scheduled.within(memory)
                except PlanError:  # the smallest piece of some tensor does not fit
                    raise short from None
                notes.append(
                    f"the device is short of memory: working with {memory / 2**20:,.0f} MiB at a time"
                )
                continue
            pipeline.carry_out()
            access.files.check_unchanged()
            break
    ledger.seconds = time.perf_counter() - start
    return runs.each


def decide_together(scheduled: Schedule, backend: Backend, access: Access) -> list[SharedAnswers | None]:
    """The answers to the shared needs of each plan, as data; None if it has none. Raises as ``run`` does."""
    if not scheduled.shared:
        return [None] * len(scheduled.plans)
    first, *others = (measuring(plan, _Together(plan.method)) for plan in scheduled.plans)
    alone = Schedule(first, scheduled.budget, beside=tuple(others))
    runs = carry_out(alone, backend, access, [Target()] * len(alone.plans))
    return [None if run.shared is None else run.shared.data() for run in runs]


class _Together(Method):
    """The shared needs of another method alone."""

    def __init__(self, method: Method):
        self.name = method.name
        self._method = method

    def needs(self, task: Task) -> Sequence[Need]:
        """The needs that all tensors answer together."""
        return [need for need in self._method.needs(task) if is_shared(need)]

    def solve(self, task: Task, answers: Answers) -> Operation:
        """Nothing is merged."""
        raise NotImplementedError
