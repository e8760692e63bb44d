"""What a backend is asked to do, in numbers: masks, consensus and combination.

The element-wise formulas are written out in docs/arithmetic.md. Here d = x - b is a task vector, a key is
the bits of its magnitude in the working dtype, and a position is either the flat index of an element or
its 32-bit random draw. Position ranges are inclusive; ``(1, 0)`` is empty. Those of draws begin with 0.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from merge_engine.dtypes import DType

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


Mask = Dense | Band | Draw | Ranked | RankMask
NOTHING = Draw(below=0, random_key=0)


class Entry(NamedTuple):
    """One model in a consensus: which of its elements count, and how much."""

    mask: Mask
    weight: float
    rescale: float = 1.0
    vote_slack: float = 0.0
    retain_slack: float = 0.0


class Consensus(NamedTuple):
    """b + scale * mean of the retained w * d, after an optional election of signs (TIES and its kin).

    With ``normalize`` the mean divides by the weights of what was retained, element by element; without an
    election by ``divisor``.
    """

    entries: tuple[Entry, ...]
    election: Literal["none", "sum", "count"] = "none"
    normalize: bool = False
    scale: float = 1.0
    storage_rounding: bool = False
    divisor: float = 1.0


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
    """Keys to count: those of which model of the chunk, and in which slot of the counts."""

    slot: int
    model: int


class Rank(NamedTuple):
    """Asks for the ``rank``-th largest key, from 1, of those that were counted in a slot."""

    slot: int
    rank: int


class Sought(NamedTuple):
    """Asks for the keys of some ranks, from 1, among those of a model of a chunk.

    ``within`` is what was found for them one level above, None at level 0.
    """

    model: int
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
