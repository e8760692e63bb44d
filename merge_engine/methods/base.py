"""What a merge method is: which statistics it measures, and which operation they lead to.

A method sees one output tensor at a time as a ``MergeTask`` and answers with a ``Program``: statistics, each
one streaming pass over the tensor's chunks, and a solution that is asked for when they are complete. What
several tensors must decide together (one threshold for a whole model) is measured by a ``Share`` first.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from merge_engine.backends import Backend
from merge_engine.backends.operations import Chunk, Combine, Consensus
from merge_engine.dtypes import DType
from merge_engine.recipe import Parameter, Recipe, Scalar

Values: TypeAlias = Mapping[str, Scalar | None]


@dataclass(frozen=True)
class MergeTask:
    """One output tensor, and everything that decides it.

    ``models`` are the recipe positions of the models that have the tensor, in order; ``settings`` are their
    parameters, ``common`` those of the tensor. Arithmetic runs in ``working``, the result is written as
    ``out``.
    """

    name: str
    shape: tuple[int, ...]
    working: DType
    out: DType
    models: tuple[int, ...]
    settings: tuple[Values, ...]
    common: Values
    seed: int = 0
    storage_rounding: bool = False

    @cached_property
    def count(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    def random_key(self, model: int) -> int:
        """Philox key of a recipe position: 64 bits of BLAKE2b over seed, tensor name and position."""
        text = f"{self.seed}\0{self.name}\0{model}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class Statistic(ABC):
    """One streaming pass over the chunks of one or several tensors.

    ``notes`` says that a backend may note a bit for every element of every model on the way.
    """

    notes: bool = False

    @abstractmethod
    def measure(self, backend: Backend, chunk: Chunk, task: MergeTask) -> None:
        """Add a chunk. The chunks of a tensor come in order."""

    @abstractmethod
    def finish(self, backend: Backend) -> None:
        """All chunks were seen."""


Operation: TypeAlias = Consensus | Combine


@dataclass(frozen=True)
class Solution:
    """The operation to apply to every chunk.

    ``trimmed_to`` says, per model with a trim slack, how many entries the trim would have kept without it (a
    handle of the backend): in this tensor, or with ``whole_model`` in all tensors together.
    """

    operation: Operation
    trimmed_to: Mapping[int, Any] = field(default_factory=dict)
    whole_model: bool = False


class Program(ABC):
    """How one tensor is merged: ``statistics`` in order, then ``solve``."""

    statistics: Sequence[Statistic] = ()

    @abstractmethod
    def solve(self, backend: Backend) -> Solution:
        """The operation that the finished statistics lead to."""


class Fixed(Program):
    """A program with nothing to measure."""

    def __init__(self, operation: Operation):
        self._solution = Solution(operation)

    def solve(self, backend: Backend) -> Solution:
        """Return the operation."""
        return self._solution


class Share(ABC):
    """Statistics over several tensors, complete before the first of them is merged."""

    statistics: Sequence[Statistic]


class Method(ABC):
    """A merge method, stateless. ``parameters`` declares what a recipe may set."""

    name: str
    parameters: tuple[Parameter, ...]
    uses_base: bool
    max_models: int | None = None
    whole_lines: bool = False  # chunks must hold whole lines along dimension 1

    def check(self, recipe: Recipe, tasks: Sequence[MergeTask]) -> list[str]:
        """Why these tensors cannot be merged so, one line per reason; empty if they can."""
        return []

    def share(self, tasks: Sequence[MergeTask]) -> Share | None:
        """What the tensors must measure together before any of them is merged."""
        return None

    @abstractmethod
    def program(self, task: MergeTask, share: Share | None) -> Program:
        """How to merge one tensor."""

    def scratch_bytes(self, models: int) -> int:
        """Bytes per element that the backend needs beside inputs and output."""
        return 0
