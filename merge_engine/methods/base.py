"""The interface of a merge method: its parameters, its needs, and its operation.

A method sees one output tensor at a time, as a ``Task``. ``needs`` returns the values that must be measured, and
``solve`` turns their answers into an operation, which is then applied to every chunk. Methods do not read, measure or
compute tensors: the engine does, in bounded memory, on any backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from merge_engine.backends.operations import Combine, Consensus, Mask, Nearswap
from merge_engine.methods.needs import Need
from merge_engine.methods.task import Task
from merge_engine.recipe import Parameter, Recipe, declared

Operation: TypeAlias = Consensus | Combine | Nearswap
Answers: TypeAlias = Mapping[Need, Any]
"""The answers to a task's needs, by need. A look-up waits until the device has the answer."""


@dataclass(frozen=True)
class NoParameters:
    """``Settings`` or ``Common`` of a method without such parameters."""


class Method(ABC):
    """A merge method. It holds no state: one object serves all merges.

    ``Settings`` and ``Common`` are frozen dataclasses whose fields are parameters (see ``parameter``): ``Settings``
    has the parameters of each model, ``Common`` those of all models of a tensor. ``uses_base`` says that the method
    uses a base model, and ``requires_base`` that it cannot do without. ``min_models`` and ``max_models`` limit the
    number of models besides the base, for a recipe and for each tensor; no ``max_models``: any number. A tensor that
    fewer than ``min_models`` have is refused, or ``if_lacking`` says what is copied: a tensor that only one input has
    ("lone"), or the base's ("base"). ``elects`` says that models elect signs, so that entries can be lost to an
    election. ``keeps_unchanged`` says that the result has the base's bits where all inputs do. ``sums_lines`` says that
    needs may be about each line of a tensor.
    """

    name: str
    Settings: type = NoParameters
    Common: type = NoParameters
    uses_base: bool = True
    requires_base: bool = True
    min_models: int = 1
    max_models: int | None = None
    if_lacking: Literal["refuse", "lone", "base"] = "refuse"
    elects: bool = False
    keeps_unchanged: bool = True
    sums_lines: bool = False

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters that a recipe may set."""
        return declared(self.Settings, "model") + declared(self.Common, "tensor")

    def check(self, recipe: Recipe, tasks: Sequence[Task]) -> list[str]:
        """The reasons why these tensors cannot be merged with this recipe, one line each; empty if they can.

        ``tasks`` are all tensors that are merged.
        """
        return []

    def needs(self, task: Task) -> Sequence[Need]:
        """The values that must be measured before the tensor can be merged. By default none.

        The same task always has the same needs, in the same order.
        """
        return ()

    def masks(self, task: Task) -> Mapping[int, Mask]:
        """The mask of each model's task vector, by recipe position. By default none.

        A method has masks where each task vector is sparsified by itself. The method's needs include theirs.
        """
        return {}

    @abstractmethod
    def solve(self, task: Task, answers: Answers) -> Operation:
        """The operation for every chunk of the tensor. ``answers`` has the answer to each of the task's needs."""

    def scratch_bytes(self, models: int) -> int:
        """Bytes for each element of a tensor that the backend needs beside inputs and output, with so many models."""
        return 0
