"""What a method needs to know of a tensor before it can be merged, as values.

A need says what is measured, not how. Needs are frozen, hashable and picklable: equal ones are answered once, and it is
known from them alone how often a tensor must be read (``steps``). Answers are in ``backends/statistics.py``; those of
pieces of a tensor can be merged, kept and sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from merge_engine.backends.operations import Mask, RankMask
from merge_engine.backends.statistics import levels
from merge_engine.dtypes import DType


@dataclass(frozen=True)
class KeyRanks:
    """The magnitude keys at descending ``ranks`` (from 1) of the task vector of the model at a recipe position.

    With ``whole_model`` they are ranks among the elements of all merged tensors of the model. Answered by
    ``{rank: Found}``.
    """

    model: int
    ranks: tuple[int, ...]
    whole_model: bool = False


@dataclass(frozen=True)
class TiePlaces:
    """Where the elements lie that decide the ties of a mask of ranks by index. Answered by ``{rank: Place}``."""

    model: int
    mask: RankMask


@dataclass(frozen=True)
class MaskedL1:
    """The L1 norm of a task vector, whole and of what a mask keeps. Answered by two floats."""

    model: int
    mask: Mask


@dataclass(frozen=True)
class Gram:
    """The inner products of all inputs, the base first. Answered by the rows of a symmetric matrix."""


@dataclass(frozen=True)
class Together:
    """Runs of so many elements that no chunk may cut: a line, or with the tensor's ``count`` the whole matrix."""

    elements: int


Need: TypeAlias = KeyRanks | TiePlaces | MaskedL1 | Gram | Together


@dataclass(frozen=True)
class Place:
    """Where an element is: its tensor and flat index."""

    tensor: str
    index: int


class Kind(IntEnum):
    """What one reading of a tensor measures. Each builds on those before it."""

    KEYS = 0
    PLACES = 1
    SUMS = 2


class Step(NamedTuple):
    """One reading of a tensor: a level of keys (see ``levels``), places, or sums."""

    kind: Kind
    level: int = 0


def mask_needs(model: int, mask: Mask) -> Iterable[Need]:
    """What must be known before a mask can be applied to the task vector of a model."""
    if isinstance(mask, RankMask):
        yield KeyRanks(model, mask.ranks, mask.whole_model)
        if mask.ties == "index":
            yield TiePlaces(model, mask)


def steps(needs: Iterable[Need], working: DType) -> Sequence[Step]:
    """The readings that answer the needs, in order."""
    kinds = {type(need) for need in needs}
    result: list[Step] = []
    if KeyRanks in kinds:
        result += [Step(Kind.KEYS, level) for level in range(levels(working))]
    if TiePlaces in kinds:
        result.append(Step(Kind.PLACES))
    if MaskedL1 in kinds or Gram in kinds:
        result.append(Step(Kind.SUMS))
    return result


def needs_reading(needs: Iterable[Need]) -> bool:
    """Whether anything must be measured before the tensor is merged."""
    return any(not isinstance(need, Together) for need in needs)


def is_shared(need: Need) -> bool:
    """Whether the tensors of a model answer it together, before the first of them is merged."""
    if isinstance(need, TiePlaces):
        return need.mask.whole_model
    return isinstance(need, KeyRanks) and need.whole_model
