"""What a backend is asked to do, in numbers: masks, consensus and combination.

The element-wise formulas are written out in docs/arithmetic.md. Here d = x - b is a task vector, a key is
the bits of its magnitude in the working dtype, and a position is either the flat index of an element or
its 32-bit random draw. Position ranges are inclusive; ``(1, 0)`` is empty. Those of draws begin with 0. A score is a
number >= 0 of each position, whose key is its bits in the dtype of the arithmetic.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from merge_engine.dtypes import F32, F64, DType

Positions = tuple[int, int]
EVERY_POSITION: Positions = (0, 2**64 - 1)
NO_POSITION: Positions = (1, 0)


@dataclass(frozen=True)
class Dense:
    """Keep every element."""


@dataclass(frozen=True)
class Band:
    """Keep keys between two bounds; keys equal to a bound only at the positions given for it."""

    low: int
    high: int = 2**64 - 1
    low_positions: Positions = EVERY_POSITION
    high_positions: Positions = EVERY_POSITION
    by_draw: bool = False
    random_key: int = 0


@dataclass(frozen=True)
class Draw:
    """Keep elements whose draw is below ``below``, of 2**32 (DARE)."""

    below: int
    random_key: int


@dataclass(frozen=True)
class Ranked:
    """Keep with a probability that rises with the magnitude's rank in its line (DELLA).

    The probability runs from ``density - epsilon`` for the smallest to ``density + epsilon`` for the largest
    magnitude of a line; equal magnitudes share their mean rank. With ``inverse_probability`` the kept
    elements are divided by their probability.
    """

    density: float
    epsilon: float
    inverse_probability: bool
    random_key: int


@dataclass(frozen=True)
class RankMask:
    """Keep the magnitudes of descending rank ``first`` to ``last`` (from 1, both included) of a task vector.

    With ``slack`` the lower threshold t gives way to RN(float32(1 - slack) * t). ``ties`` says which of the keys equal
    to a threshold stay: those whose draws fall below the share that is to stay ("spread"), the lowest flat indices
    ("index"; with ``stable_ascending`` those that a stable sort by ascending magnitude would keep), or all. With
    ``whole_model`` the ranks are among the elements of all merged tensors of the model.
    """

    first: int
    last: int
    slack: float = 0.0
    ties: Literal["spread", "index", "all"] = "spread"
    stable_ascending: bool = False
    whole_model: bool = False
    random_key: int = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the highest kept magnitude (if any is dropped above it) and of the lowest."""
        return (self.first, self.last) if self.first > 1 else (self.last,)


@dataclass(frozen=True)
class TopShare:
    """Keep the largest keys of a score, floor(``part`` * the number of keys that are not 0) of them.

    ``ties`` and ``random_key`` are those of a ``RankMask``. The product is taken in float64, or with ``single`` in
    float32. Once it is known, this is a ``RankMask``.
    """

    part: float
    single: bool = False
    ties: Literal["spread", "index", "all"] = "spread"
    random_key: int = 0

    def down_to(self, last: int) -> RankMask:
        """The mask that keeps so many."""
        return RankMask(1, last, ties=self.ties, random_key=self.random_key)


@dataclass(frozen=True)
class Variance:
    """The score of a position is the variance of all task vectors there (SCE).

    With ``storage_rounding`` task vectors and variance are rounded to the working dtype, as in mergekit.
    """

    storage_rounding: bool = False


@dataclass(frozen=True)
class Divergence:
    """The score of a position is |d| of the only model, times the divergence of its line (Arcee Fusion).

    A line is ``length`` elements of a chunk that follow each other. Its divergence is that of Kullback and Leibler,
    between the softmax of the model's line and that of the base's.
    """

    length: int


Score: TypeAlias = Variance | Divergence
Subject: TypeAlias = int | Score
"""What has keys: the task vector of a model, by its number, or a score of all models."""


@dataclass(frozen=True)
class Scored:
    """Keep the elements whose score a band keeps: the same in all models."""

    score: Score
    mask: Any  # a Band, a RankMask, a TopShare, or what a backend made of one


Mask = Dense | Band | Draw | Ranked | RankMask | Scored
NOTHING = Draw(below=0, random_key=0)


def key_dtype(subject: Subject, working: DType) -> DType:
    """The dtype whose bits are keys: of task vectors the working dtype, of scores that of the arithmetic."""
    if isinstance(subject, int):
        return working
    return F64 if working == F64 else F32


class Entry(NamedTuple):
    """One model in a consensus: which of its elements count, and how much."""

    mask: Mask
    weight: float
    rescale: float = 1.0
    vote_slack: float = 0.0
    retain_slack: float = 0.0


class Consensus(NamedTuple):
    """b + scale * mean of the retained w * d, after an optional election of signs (TIES and its kin).

    ``election`` says what a model's vote is: its weighted entry ("sum"), the sign of that ("count"), or its entry
    without the weight ("deltas"; then there are no slacks). With ``normalize`` the mean divides by the weights of what
    was retained, element by element; without an election by ``divisor``.

    With "overlap" nothing is elected or lost: where one model alone keeps an element, w * d is added, else d / the
    number of models that keep it (RAM). With it and "none", ``wide`` leaves weights, sums and result unrounded where
    ``storage_rounding`` is set.
    """

    entries: tuple[Entry, ...]
    election: Literal["none", "sum", "count", "deltas", "overlap"] = "none"
    normalize: bool = False
    scale: float = 1.0
    storage_rounding: bool = False
    divisor: float = 1.0
    wide: bool = False


NEAREST = 1e-6
"""Nearswap takes no distance for smaller than this."""


class Nearswap(NamedTuple):
    """b goes the way to x as far as their distance allows: by the weight threshold / |x - b|, at most 1.

    With ``storage_rounding`` every step is rounded to the working dtype, as in mergekit.
    """

    threshold: float
    storage_rounding: bool = False


class Line(NamedTuple):
    """Lines of a tensor along one of its dimensions: elements per line, and their distance in memory.

    Lines along the last dimension have the distance 1. The lines of a sum or a combination are along the last
    dimension or along the first.
    """

    length: int
    stride: int

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Line:
        """Lines along dimension 1; a tensor with fewer than two dimensions is a single line."""
        if len(shape) < 2:
            return cls(shape[0] if shape else 1, 1)
        return cls(shape[1], math.prod(shape[2:]))

    @classmethod
    def along(cls, shape: tuple[int, ...], dimension: Literal["first", "last"]) -> Line | None:
        """Lines along the first or the last dimension; None if the tensor is a single line."""
        if len(shape) < 2:
            return None
        line = cls(shape[-1], 1) if dimension == "last" else cls(shape[0], math.prod(shape[1:]))
        return None if line.length == math.prod(shape) else line


class LineCoefficients(NamedTuple):
    """Coefficients that differ between the lines of a tensor: [lines, terms] float64 by rows."""

    line: Line
    values: array[float]


class Combine(NamedTuple):
    """Sum of coefficient * input over all inputs of a chunk, divided by ``divisor`` if there is one.

    There is one coefficient for each input, the base included. With ``on_base`` there is one for each model: it
    multiplies the task vector, and the base is added to the sum. With ``lines`` each line has its own, and
    ``coefficients`` is empty; there is no divisor then. ``fused`` adds by fused multiply-add. ``fused`` and ``rounded``
    round the result to the working dtype before it is converted to the output's, as mergekit does; ``stepwise`` rounds
    the result of every operation to it.
    """

    coefficients: tuple[float, ...]
    divisor: float | None = None
    fused: bool = False
    rounded: bool = False
    stepwise: bool = False
    on_base: bool = False
    lines: LineCoefficients | None = None


_ONE_ELEMENT = Line(1, 1)


@dataclass
class Chunk:
    """A run of ``count`` elements of one tensor in every input; the first has flat index ``start``.

    ``inputs`` are arrays of the backend (see ``Backend.array``): with ``has_base`` the first is that of the
    base model, all others belong to the models. ``line`` matters to ``Ranked`` masks only, and then the chunk
    holds whole lines. ``part_of`` is the chunk that was measured, if this is a part of it: the same memory.
    ``noted`` is what a backend remembers of a chunk from measuring to merging it.
    """

    inputs: list[Any]
    has_base: bool
    working: DType
    start: int
    count: int
    line: Line = _ONE_ELEMENT
    part_of: Chunk | None = None
    noted: Any = None

    @property
    def base(self) -> Any:
        """The base model's array, None without one."""
        return self.inputs[0] if self.has_base else None

    @property
    def models(self) -> list[Any]:
        """The arrays of the models, in order."""
        return self.inputs[1:] if self.has_base else self.inputs


class Found(NamedTuple):
    """A magnitude key found by its rank: how many keys are larger, and how many equal.

    Backends may keep these numbers on their device (see ``Backend.fetch``).
    """

    key: int
    above: int
    equal: int


class KeyColumn(NamedTuple):
    """Keys to count: those of which model of the chunk, or of which score, and in which slot of the counts."""

    slot: int
    model: Subject


class Rank(NamedTuple):
    """Asks for the ``rank``-th largest key, from 1, of those that were counted in a slot."""

    slot: int
    rank: int


class Sought(NamedTuple):
    """Asks for the keys of some ranks, from 1, among those of a model of a chunk, or of a score.

    ``within`` is what was found for them one level above, None at level 0.
    """

    model: Subject
    ranks: tuple[int, ...]
    within: Any = None


class FoundBand(NamedTuple):
    """A mask by rank, and what was found for it: ``low`` for its last rank, ``high`` for its first if that is not 1.

    Keys equal to a threshold stay where ``low_positions`` and ``high_positions`` say, unless their ties are spread.
    """

    mask: RankMask
    low: Any
    high: Any = None
    low_positions: Positions = EVERY_POSITION
    high_positions: Positions = EVERY_POSITION


class SolvedBand(NamedTuple):
    """What a ``FoundBand`` keeps, and how many entries it would keep without slack (None when it has none)."""

    mask: Any
    kept_without_slack: Any


class Overlap(NamedTuple):
    """How many entries of a model no other model keeps, and how many at least one other keeps too."""

    unique: int
    shared: int


class Counts(NamedTuple):
    """What became of one model's entries that are not zero.

    ``kept`` by the mask; of those ``lost`` to the election, and ``saved``: in the mean only because of a sign
    slack.
    """

    kept: int
    lost: int
    saved: int


class Outcome(NamedTuple):
    """What applying an operation showed.

    Counts per model; NaN or infinite values in each input of the chunk, once rounded to the working dtype;
    and in the output.
    """

    counts: tuple[Counts, ...]
    non_finite: tuple[int, ...]
    non_finite_output: int
