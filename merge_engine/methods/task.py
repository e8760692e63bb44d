"""One output tensor: what it is made of, and everything that decides it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

from merge_engine.dtypes import DType
from merge_engine.operands import Operand


class Action(Enum):
    """What becomes of a tensor."""

    MERGE = "merge"  # what the method says
    ROUND = "round"  # the only input, rounded to the working dtype and the output's
    COPY = "copy"  # of a dtype that cannot be computed with: all inputs must hold the same bytes
    MEASURE = "measure"  # nothing is written; only the needs are answered


@dataclass(frozen=True)
class Task:
    """One output tensor.

    ``inputs`` are operands of the output's ``shape``: the base model's first if ``has_base``, then one for each of
    ``models``, the recipe positions of the models that have the tensor. ``settings`` holds their parameters,
    instances of the method's ``Settings``; ``common`` those of the tensor, an instance of its ``Common``. Arithmetic
    runs in ``working``, the result is written as ``out``. ``elements`` says how many elements each model, by position,
    has in all merged tensors together.
    """

    name: str
    shape: tuple[int, ...]
    working: DType
    out: DType
    action: Action
    inputs: tuple[Operand, ...]
    has_base: bool = False
    models: tuple[int, ...] = ()
    settings: tuple[Any, ...] = ()
    common: Any = None
    seed: int = 0
    storage_rounding: bool = False
    elements: Mapping[int, int] = field(default_factory=dict, compare=False)

    @cached_property
    def count(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @cached_property
    def input_bits(self) -> int:
        """Bits that one element takes in all inputs together."""
        return sum(operand.dtype.bits for operand in self.inputs)

    def random_key(self, model: int) -> int:
        """Philox key of a recipe position: 64 bits of BLAKE2b over seed, tensor name and position."""
        text = f"{self.seed}\0{self.name}\0{model}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
