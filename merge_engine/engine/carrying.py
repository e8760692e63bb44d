"""Carry out a schedule: with less memory if the device is short of it, and the shared needs alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from merge_engine.backends import Backend
from merge_engine.engine.measuring import SharedAnswers
from merge_engine.engine.pipeline import Pipeline
from merge_engine.engine.records import Recorder
from merge_engine.engine.scheduling import SMALLEST_DEVICE_MEMORY
from merge_engine.engine.sinks import Sink
from merge_engine.engine.work import Run, Tally
from merge_engine.errors import DeviceMemoryError, PlanError
from merge_engine.methods import Answers, Method, Need, Operation, Task
from merge_engine.methods.needs import is_shared
from merge_engine.observe.digests import Digests
from merge_engine.observe.ledger import Ledger, reading_counted
from merge_engine.operands import Access
from merge_engine.planning import Schedule, measuring

Progress = Callable[[int], None]


def carry_out(
    scheduled: Schedule,
    backend: Backend,
    access: Access,
    sink: Sink | None,
    digests: Digests | None,
    progress: Progress | None = None,
    answered: Callable[[Task, Answers], None] | None = None,
    shared: SharedAnswers | None = None,
    recorder: Recorder | None = None,
    tally: Tally | None = None,
) -> Run:
    """Carry out a schedule.

    ``sink`` takes the merged bytes. ``answered`` is called with each tensor that is only measured, and its answers.
    ``shared`` has the answers to the shared needs, if they are known already. ``recorder`` gets the run before it
    begins. ``tally`` takes what is measured together (see ``Run``). If the device has too little
    memory, the plan is scheduled again for half of it, and so on. Raises as ``run`` does.
    """
    ledger = Ledger()
    notes: list[str] = []
    start = time.perf_counter()
    with reading_counted(ledger):
        while True:
            run = Run(scheduled, backend, ledger, notes, answered, shared, tally)
            if recorder is not None:
                recorder.run = run
            try:
                pipeline = Pipeline(scheduled, run, access, sink, digests, progress or (lambda nbytes: None))
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
    return run


def decide_together(scheduled: Schedule, backend: Backend, access: Access) -> SharedAnswers | None:
    """The answers to the shared needs of a plan, as data; None if it has none. Raises as ``run`` does."""
    if not scheduled.shared_needs:
        return None
    shared = measuring(scheduled.plan, _Together(scheduled.plan.method))
    run = carry_out(Schedule(shared, scheduled.budget), backend, access, None, None)
    assert run.shared is not None
    return run.shared.data()


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
