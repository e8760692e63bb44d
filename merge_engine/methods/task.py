"""One output tensor: its operands and its parameters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any

from merge_engine.dtypes import DType
from merge_engine.operands import Operand


class Action(Enum):
    """What is done with a tensor."""

    MERGE = "merge"  # by the method
    ROUND = "round"  # the only input is rounded to the working dtype, then to the output's
    COPY = "copy"  # the dtype is not mergeable: all inputs must hold the same bytes
    MEASURE = "measure"  # the needs are answered, and nothing is written


@dataclass(frozen=True)
class Task:
    """One output tensor.

    ``inputs`` are operands of the output's ``shape``: the base model's first if ``has_base``, then one for each of
    ``models``, the recipe positions (from 0) of the models that have the tensor. ``settings`` has an instance of
    the method's ``Settings`` for each of ``models``; ``common`` is an instance of its ``Common``. Inputs are
    rounded to the dtype ``working`` before arithmetic, and the result to the dtype ``out``. ``storage_rounding`` is
    ``arithmetic: mergekit``. ``elements`` has each model's number of elements in all merged tensors together, by
    recipe position. ``drawn_as`` is the name of the tensor whose random draws it shares; None: it has its own.
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
    drawn_as: str | None = None

    @cached_property
    def count(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)

    @cached_property
    def input_bits(self) -> int:
        """Bits that one element takes in all inputs together."""
        return sum(operand.dtype.bits for operand in self.inputs)

    def random_key(self, model: int) -> int:
        """Philox key of a recipe position: 64 bits of BLAKE2b over seed, tensor name and position."""
        return _random_key(self.seed, self.name if self.drawn_as is None else self.drawn_as, model)


@lru_cache(maxsize=4096)  # a merge asks twice for each, and a session for the same ones in every merge
def _random_key(seed: int, name: str, model: int) -> int:
    text = f"{seed}\0{name}\0{model}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
