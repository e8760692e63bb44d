"""From a plan to a schedule for this machine: the way that files are read, and the budget for the backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from merge_engine.backends import Backend
from merge_engine.operands import Access
from merge_engine.planning import DEFAULT_MEMORY, DEVICE_PIECE, PIECE, Budget, MergePlan, Schedule
from merge_engine.storage import OpenFiles, Way, way_here

DEVICE_SHARE = 4
"""By default a run takes one part in so many of a device's free memory."""

SMALLEST_DEVICE_MEMORY = 16 << 20
"""The smallest memory budget, in bytes, that a run tries on a device with too little memory."""


@contextmanager
def open_access(
    plan: MergePlan,
    backend: Backend | type[Backend],
    beside: Sequence[MergePlan] = (),
    way: Way | None = None,
) -> Iterator[Access]:
    """Decide how the inputs are read, and keep them open until the context is left.

    ``beside`` are the plans of other recipes. For the decision see ``way_here``; a given ``way`` is it. Inputs
    that are read through the page cache are used there in place if the backend can do that.
    """
    with OpenFiles() as files:
        inputs = frozenset(file for each in (plan, *beside) for file in each.files)
        yield Access(files, way or way_here(inputs), backend.reads_in_place)


def schedule_for(
    plan: MergePlan,
    access: Access,
    backend: Backend | type[Backend],
    memory: int | None = None,
    shared_known: bool = False,
    beside: Sequence[MergePlan] = (),
    whole_outputs: bool = False,
) -> Schedule:
    """The schedule of a plan for a backend and ``memory`` bytes, with inputs read as ``access`` says.

    The default of the memory is 400 MB of the host's or, with a device, a quarter of what it has free. For
    ``shared_known`` and ``beside`` see ``Schedule``, for ``whole_outputs`` see ``Budget``. Raises ``PlanError`` when
    the memory is too small.
    """
    if memory is None:
        memory = _default_memory(backend)
    in_place = (
        access.in_place
        and access.way == "cached"
        and all(
            operand.maps(access) for each in (plan, *beside) for task in each.tasks for operand in task.inputs
        )
    )
    piece = DEVICE_PIECE if backend.has_link else PIECE
    budget = Budget(memory, in_place, piece, whole_outputs=whole_outputs)
    return Schedule(plan, budget, shared_known, tuple(beside))


def _default_memory(backend: Backend | type[Backend]) -> int:
    """Bytes of tensor data at a time. Where the device is not here, that of the host's memory."""
    free = None if isinstance(backend, type) else backend.free_memory()
    return DEFAULT_MEMORY if free is None else max(free // DEVICE_SHARE, SMALLEST_DEVICE_MEMORY)
