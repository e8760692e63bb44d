"""What takes merged tensors: new ones, or those of the caller, which are written in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from merge_engine.methods import Task
from merge_engine.planning import MergePlan
from merge_engine.session.matching import match
from merge_engine.tensors import new_tensor

if TYPE_CHECKING:
    import torch


class Targets(Protocol):
    """Makes the tensor of each task, and takes it when it is merged. ``notes`` are messages for the user."""

    notes: list[str]

    def target(self, task: Task) -> torch.Tensor:
        """A contiguous tensor on the device that computes."""

    def merged(self, task: Task, tensor: torch.Tensor) -> None:
        """Take the tensor, whose values are merged or will be once the device comes to them."""


class NewTensors:
    """New tensors, by name in ``tensors``. ``devices`` says where each is computed."""

    def __init__(self, plan: MergePlan, devices: Mapping[str, str], inputs: set[int]):
        self.notes: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self._plan = plan
        self._devices = devices

    def target(self, task: Task) -> torch.Tensor:
        """See ``Targets``."""
        return _new(task, self._devices)

    def merged(self, task: Task, tensor: torch.Tensor) -> None:
        """See ``Targets``."""
        self.tensors[task.name] = tensor

    @property
    def in_order(self) -> dict[str, torch.Tensor]:
        """The tensors in the order of the plan."""
        return {task.name: self.tensors[task.name] for task in self._plan.tasks}


class GivenTensors:
    """The tensors of a module, or of a mapping from names to tensors.

    A contiguous one on the device that computes, and of the output's dtype, is written there. Others are copied into.
    Raises ``PlanError`` as ``match`` does.
    """

    def __init__(
        self,
        given: torch.nn.Module | Mapping[str, torch.Tensor],
        plan: MergePlan,
        devices: Mapping[str, str],
        inputs: set[int],
    ):
        self._devices = devices
        self._given, self.notes = match(given, plan, inputs)

    def target(self, task: Task) -> torch.Tensor:
        """See ``Targets``."""
        given = self._given.get(task.name)
        if given is None or not self._is_written(task, given):
            return _new(task, self._devices)
        return given

    def merged(self, task: Task, tensor: torch.Tensor) -> None:
        """See ``Targets``."""
        import torch

        given = self._given.get(task.name)
        if given is None:
            return
        if not self._is_written(task, given):
            given.copy_(tensor)
        elif not given.is_inference():
            torch.autograd.graph.increment_version(given)

    def _is_written(self, task: Task, given: torch.Tensor) -> bool:
        """Whether the kernels write to a tensor themselves."""
        return (
            given.is_contiguous()
            and str(given.device) == self._devices[task.name]
            and str(given.dtype) == f"torch.{task.out.name}"
        )


def _new(task: Task, devices: Mapping[str, str]) -> torch.Tensor:
    import torch

    return new_tensor(task.shape, getattr(torch, task.out.name), devices[task.name])
