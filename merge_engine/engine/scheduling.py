"""From a plan to a schedule for this machine: the way that files are read, and the budget for the backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from merge_engine.backends import Backend
from merge_engine.operands import Access
from merge_engine.planning import Budget, MergePlan, Schedule
from merge_engine.storage import OpenFiles, available_memory, choose_way


@contextmanager
def open_access(plan: MergePlan, backend: Backend | type[Backend]) -> Iterator[Access]:
    """Decide how the inputs are read, and keep them open until the context is left.

    For the decision see ``choose_way``. Inputs that are read through the page cache are used there in place if the
    backend can do that.
    """
    try:
        available = available_memory()
    except OSError:  # the system does not say
        available = 0
    with OpenFiles() as files:
        yield Access(files, choose_way(plan.files, available), backend.reads_in_place)


def schedule_for(
    plan: MergePlan,
    access: Access,
    backend: Backend | type[Backend],
    memory: int,
    shared_known: bool = False,
) -> Schedule:
    """The schedule of a plan for a backend and ``memory`` bytes, with inputs read as ``access`` says.

    For ``shared_known`` see ``Schedule``. Raises ``PlanError`` when the memory is too small.
    """
    in_place = (
        access.in_place
        and access.way == "cached"
        and all(operand.maps(access) for task in plan.tasks for operand in task.inputs)
    )
    return Schedule(plan, Budget(memory, backend.depth, in_place), shared_known)
