"""Sinks: take merged tensors, in memory, in a checkpoint folder, or for a function of the user."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
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
        self.tensors = {name: make() for name, make in _makers(plan).items()}

    def write_batch(self, pieces: Iterable[tuple[str, int, memoryview]]) -> None:
        """Copy into the tensors."""
        for name, offset, data in pieces:
            tensor = self.tensors[name]
            _copy(tensor, name, offset, data)


class Receiver:
    """A user's function that takes whole tensors: ``take(label, name, tensor)``.

    It is called by one thread at a time, and never again after it has raised an exception.
    """

    def __init__(self, take: Callable[[str, str, torch.Tensor], object]):
        self._take = take
        self._lock = threading.Lock()
        self._failed = False

    def __call__(self, label: str, name: str, tensor: torch.Tensor) -> None:
        """Give a tensor away."""
        with self._lock:
            if self._failed:
                return
            try:
                self._take(label, name, tensor)
            except BaseException:
                self._failed = True
                raise


class FunctionSink:
    """Gives each merged tensor of the recipe ``label`` to a receiver as soon as it is whole.

    Raises ``PlanError`` for a dtype that torch does not have.
    """

    def __init__(self, plan: MergePlan, label: str, receiver: Receiver):
        self._label = label
        self._receiver = receiver
        self._makers = _makers(plan)
        self._empty = [task.name for task in plan.tasks if not task.count]
        self._lock = threading.Lock()
        self._begun: dict[str, tuple[torch.Tensor, int]] = {}  # with the number of bytes that lack

    def write_batch(self, pieces: Iterable[tuple[str, int, memoryview]]) -> None:
        """Copy into tensors, and give those away that are whole."""
        for name, offset, data in pieces:
            with self._lock:
                if name not in self._begun:
                    made = self._makers[name]()
                    self._begun[name] = made, made.nbytes
                tensor, _ = self._begun[name]
            _copy(tensor, name, offset, data)
            with self._lock:
                lacking = self._begun[name][1] - len(data)
                self._begun[name] = tensor, lacking
                if not lacking:
                    del self._begun[name]
            if not lacking:
                self._receiver(self._label, name, tensor)

    def finish(self) -> None:
        """Give away what has no elements, and so no bytes that come."""
        for name in self._empty:
            self._receiver(self._label, name, self._makers[name]())


def _makers(plan: MergePlan) -> dict[str, Callable[[], torch.Tensor]]:
    """For each output a function that makes a tensor for it. Raises ``PlanError`` for a dtype that torch lacks."""
    import torch

    for task in plan.tasks:
        if not hasattr(torch, task.out.name) or task.out.bits < 8:
            raise PlanError([f"{task.name}: torch has no tensors of {task.out}; merge to a folder instead"])
    return {
        task.name: partial(new_tensor, task.shape, getattr(torch, task.out.name), "cpu")
        for task in plan.tasks
    }


def _copy(tensor: torch.Tensor, name: str, offset: int, data: memoryview) -> None:
    """Copy bytes into a tensor, while other threads do the same, which a copy of slices does not allow."""
    if offset + len(data) > tensor.nbytes:
        raise ValueError(f"{name}: {len(data)} bytes from {offset} on are more than it has")
    ctypes.memmove(tensor.data_ptr() + offset, address_of(data), len(data))
