"""Sinks: take merged tensors, in memory or in a checkpoint folder."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from merge_engine.backends.memory import address_of
from merge_engine.errors import PlanError
from merge_engine.observe.digests import Digests
from merge_engine.planning import MergePlan
from merge_engine.tensors import new_tensor

if TYPE_CHECKING:
    import torch

    from merge_engine.engine.records import Recorder


class Sink(Protocol):
    """Takes merged tensors, piece by piece."""

    def write_batch(self, pieces: Iterable[tuple[str, int, memoryview]]) -> None:
        """Take bytes of tensors: each piece is a name, the offset of the first byte in the tensor, and the bytes.

        Called from several threads, in any order.
        """


@dataclass(frozen=True)
class Target:
    """Where the tensors of one recipe go: to a sink and, with ``digests``, there too. No sink: nothing is merged.

    ``recorder`` gets the run before it begins.
    """

    sink: Sink | None = None
    digests: Digests | None = None
    recorder: Recorder | None = None


class MemorySink:
    """Merged tensors in memory, by name, allocated whole.

    Raises ``PlanError`` for a dtype that torch does not have, and ``BackendError`` where torch makes no tensors.
    """

    def __init__(self, plan: MergePlan):
        import torch

        for task in plan.tasks:
            if not hasattr(torch, task.out.name) or task.out.bits < 8:
                raise PlanError(
                    [f"{task.name}: torch has no tensors of {task.out}; merge to a folder instead"]
                )
        self.tensors: dict[str, torch.Tensor] = {
            task.name: new_tensor(task.shape, getattr(torch, task.out.name), "cpu") for task in plan.tasks
        }

    def write_batch(self, pieces: Iterable[tuple[str, int, memoryview]]) -> None:
        """Copy into the tensors."""
        for name, offset, data in pieces:
            tensor = self.tensors[name]
            if offset + len(data) > tensor.nbytes:
                raise ValueError(f"{name}: {len(data)} bytes from {offset} on are more than it has")
            # Unlike a copy of slices, this one lets other threads copy at the same time.
            ctypes.memmove(tensor.data_ptr() + offset, address_of(data), len(data))
