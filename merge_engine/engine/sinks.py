"""Where merged tensors go besides a checkpoint folder."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Protocol

from merge_engine.engine.plan import Plan
from merge_engine.errors import PlanError

if TYPE_CHECKING:
    import torch


class Sink(Protocol):
    """Takes merged tensors, piece by piece."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a tensor from byte ``offset`` on. Called from several threads, in any order."""


class MemorySink:
    """Merged tensors in memory, allocated whole."""

    def __init__(self, plan: Plan):
        import torch

        for job in plan.jobs:
            if not hasattr(torch, job.out.name) or job.out.bits < 8:
                raise PlanError([f"{job.name}: torch has no tensors of {job.out}; merge to a folder instead"])
        self.tensors: dict[str, torch.Tensor] = {
            job.name: torch.empty(job.shape, dtype=getattr(torch, job.out.name)) for job in plan.jobs
        }

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Copy into the tensor."""
        tensor = self.tensors[name]
        target = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        memoryview(target).cast("B")[offset : offset + len(data)] = data
