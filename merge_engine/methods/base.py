"""What a merge method is: which parameters it has, what it needs to know of a tensor, and which operation follows.

A method sees one output tensor at a time, as a ``Task``. It says what must be measured as values (``needs``), and
answers the answers with an operation (``solve``), which is then applied to every chunk. Nothing here reads, measures or
computes tensors: the engine does, in bounded memory, on any backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from merge_engine.backends.operations import Combine, Consensus
from merge_engine.methods.needs import Need
from merge_engine.methods.task import Task
from merge_engine.recipe import Parameter, Recipe, declared

Operation: TypeAlias = Consensus | Combine
Answers: TypeAlias = Mapping[Need, Any]
"""The answers to a task's needs. Looking one up waits until a device has it."""


@dataclass(frozen=True)
class NoParameters:
    """For methods without parameters of a kind."""


class Method(ABC):
    """A merge method. It holds no state: one object serves all merges.

    ``Settings`` and ``Common`` are frozen dataclasses whose fields are parameters (see ``parameter``): those that each
    model has of its own, and those that hold for all models of a tensor. ``elects`` says that models elect signs, so
    that entries can be lost to an election.
    """

    name: str
    Settings: type = NoParameters
    Common: type = NoParameters
    uses_base: bool = True
    max_models: int | None = None
    elects: bool = False

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """What a recipe may set."""
        return declared(self.Settings, "model") + declared(self.Common, "tensor")

    def check(self, recipe: Recipe, tasks: Sequence[Task]) -> list[str]:
        """Why these tensors cannot be merged so, one line per reason; empty if they can."""
        return []

    def needs(self, task: Task) -> Sequence[Need]:
        """What must be measured before the tensor can be merged. By default nothing."""
        return ()

    @abstractmethod
    def solve(self, task: Task, answers: Answers) -> Operation:
        """The operation to apply to every chunk of the tensor."""

    def scratch_bytes(self, models: int) -> int:
        """Bytes per element that the backend needs beside inputs and output."""
        return 0
