"""Needs: values that must be measured before a tensor can be merged.

A need says what is measured, not how. Needs are frozen, hashable and picklable. Equal needs are answered once, and
the needs alone say how often a tensor must be read (``steps``). Sums are measured as ``BlockSums``
(``backends/statistics.py``), which can be merged, kept and sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from merge_engine.backends.operations import Line, Mask, RankMask, Score, Scored, Subject, TopShare, key_dtype
from merge_engine.backends.statistics import levels
from merge_engine.dtypes import DType


@dataclass(frozen=True)
class KeyRanks:
    """The magnitude keys at ``ranks`` of a model's task vector, or of a score. Rank 1 is the largest key.

    ``model`` is a recipe position, or the score. With ``whole_model`` the ranks are among the elements of all merged
    tensors of the model. The answer is ``{rank: Found}``, without ranks of a ``TopShare`` that keeps nothing.
    """

    model: Subject
    ranks: tuple[int | TopShare, ...]
    whole_model: bool = False


@dataclass(frozen=True)
class NonZero:
    """The number of positions whose score is not 0. The answer is that number."""

    score: Score


@dataclass(frozen=True)
class TiePlaces:
    """The places of the elements that split the ties of a mask by index. The answer is ``{rank: Place}``.

    A rank whose ties need no split has no place.
    """

    model: Subject
    mask: RankMask | TopShare


@dataclass(frozen=True)
class MaskedL1:
    """The L1 norm of a task vector, and that of the entries that a mask keeps. The answer is these two floats."""

    model: int
    mask: Mask


@dataclass(frozen=True)
class MaskedSquares:
    """The sum of squares of a task vector, and that of the entries that a mask keeps.

    The answer is these two floats.
    """

    model: int
    mask: Mask


@dataclass(frozen=True)
class Overlaps:
    """How many entries each mask keeps alone, and how many others keep too. ``masks``: one for each model of the task.

    Masks are bands above 0. The answer is a tuple of ``Overlap``.
    """

    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class Gram:
    """The inner products of all inputs, the base first; with ``of_deltas`` those of the task vectors.

    The answer is a symmetric matrix, a list of rows of floats. With ``line`` (see ``Line.along``) there is one for each
    line, and the answer is an ``array`` of float64, [lines, pairs]: for each line the pairs i <= j of the matrix, row
    by row.
    """

    of_deltas: bool = False
    line: Line | None = None


@dataclass(frozen=True)
class Together:
    """A number of elements: chunks start at multiples of it, so that no line (or with ``task.count`` no tensor) is cut.

    It is not measured and has no answer.
    """

    elements: int


Need: TypeAlias = KeyRanks | NonZero | TiePlaces | MaskedL1 | MaskedSquares | Overlaps | Gram | Together


@dataclass(frozen=True)
class Place:
    """The place of an element: the tensor's name and the flat index in it."""

    tensor: str
    index: int


class Kind(IntEnum):
    """The result of one reading of a tensor. Each kind uses the results of those before it."""

    COUNTS = 0
    KEYS = 1
    PLACES = 2
    SUMS = 3


class Step(NamedTuple):
    """One reading of a tensor: counts, a level of keys (see ``levels``), places, or sums."""

    kind: Kind
    level: int = 0


def mask_needs(model: Subject, mask: Mask | TopShare) -> Iterable[Need]:
    """The needs of a mask for the task vector of a model, by recipe position, or for a score."""
    if isinstance(mask, Scored):
        yield from mask_needs(mask.score, mask.mask)
    elif isinstance(mask, TopShare):
        assert not isinstance(model, int), "only scores are ranked by shares"
        yield from (NonZero(model), KeyRanks(model, (mask,)))
        if mask.ties == "index":
            yield TiePlaces(model, mask)
    elif isinstance(mask, RankMask):
        yield KeyRanks(model, mask.ranks, mask.whole_model)
        if mask.ties == "index":
            yield TiePlaces(model, mask)


def steps(needs: Iterable[Need], working: DType) -> Sequence[Step]:
    """The readings that answer the needs, in order. ``working`` is the dtype that the tensor is merged in."""
    needs = list(needs)
    kinds = {type(need) for need in needs}
    result: list[Step] = []
    if kinds & {NonZero, Overlaps}:
        result.append(Step(Kind.COUNTS))
    ranked = [levels(key_dtype(need.model, working)) for need in needs if isinstance(need, KeyRanks)]
    result += [Step(Kind.KEYS, level) for level in range(max(ranked, default=0))]
    if TiePlaces in kinds:
        result.append(Step(Kind.PLACES))
    if kinds & {MaskedL1, MaskedSquares, Gram}:
        result.append(Step(Kind.SUMS))
    return result


def needs_reading(needs: Iterable[Need]) -> bool:
    """Whether anything must be measured before the tensor is merged."""
    return any(not isinstance(need, Together) for need in needs)


def line_elements(needs: Sequence[Need]) -> int:
    """The elements of a line along the last dimension, if each such line answers the needs alone; otherwise 0."""
    lengths = [
        need.line.length if isinstance(need, Gram) and need.line is not None and need.line.stride == 1 else 0
        for need in needs
    ]
    return math.lcm(*lengths) if lengths else 0


def is_shared(need: Need) -> bool:
    """Whether all tensors of a model answer the need together, before the first of them is merged."""
    if isinstance(need, TiePlaces):
        return isinstance(need.mask, RankMask) and need.mask.whole_model
    return isinstance(need, KeyRanks) and need.whole_model
