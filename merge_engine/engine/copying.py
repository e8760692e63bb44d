"""Tensors whose dtype cannot be merged: their bytes go from the inputs to the output, if all inputs hold the same."""

from __future__ import annotations

from collections.abc import Sequence

from merge_engine.backends.memory import identical
from merge_engine.backends.statistics import SUM_BLOCK
from merge_engine.engine.sinks import Target
from merge_engine.errors import PlanError
from merge_engine.methods import Task
from merge_engine.observe.ledger import Ledger
from merge_engine.operands import Access, Operand
from merge_engine.recipe import exclude_key
from merge_engine.storage import PAGE, allocate

ELEMENTS = 32 * SUM_BLOCK
"""Elements that are compared at a time: 1 MiB of 64-bit integers."""


def copy(task: Task, access: Access, targets: Sequence[Target], ledger: Ledger) -> None:
    """Copy a tensor, piece by piece, to all targets.

    Raises ``PlanError`` unless all inputs hold the same bytes, and ``CheckpointError`` and ``OutputError``.
    """
    first, *others = task.inputs
    room = min(ELEMENTS, task.count) * task.out.bits // 8 + 2 * PAGE
    memory = allocate(2 * room)
    kept, compared = memory[: len(memory) // 2], memory[len(memory) // 2 :]
    for start in range(0, task.count, ELEMENTS):
        count = min(ELEMENTS, task.count - start)
        offset = task.out.bits * start // 8
        data = _read(first, start, count, access, kept, ledger)
        for operand in others:
            if not identical([data, _read(operand, start, count, access, compared, ledger)], None):
                raise differing(task, first.owner, operand.owner)
        for target in targets:
            if target.digests is not None:
                with ledger.timed(ledger.digest, len(data)):
                    target.digests.add(task.name, offset, data)
            assert target.sink is not None
            with ledger.timed(ledger.write, len(data)):
                target.sink.write_batch([(task.name, offset, data)])


def _read(
    operand: Operand, start: int, count: int, access: Access, memory: memoryview, ledger: Ledger
) -> memoryview:
    """The bytes of some elements, in ``memory``."""
    data = memory[: operand.dtype.bits * count // 8]
    with ledger.timed(ledger.read, len(data)):
        operand.read_into(data, start, access.files, access.way)
    return data


def differing(task: Task, one: str, other: str) -> PlanError:
    """The error for a tensor that can only be copied, but differs between the inputs ``one`` and ``other``."""
    return PlanError(
        [
            f"{task.name}: {task.out} tensors cannot be merged and must be the same in all inputs, but {other} "
            f"differs from {one}; to merge without it, add {exclude_key(task.name)} to the recipe"
        ]
    )
