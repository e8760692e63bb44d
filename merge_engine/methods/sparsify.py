"""Sparsifiers: which entries of a task vector survive.

Each makes a ``Cut`` for a model and a number of elements. A cut says which order statistics it needs
(``ranks``, descending, from 1), and asks for a mask from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from merge_engine.backends.operations import (
    EVERY_POSITION,
    NO_POSITION,
    NOTHING,
    Dense,
    Draw,
    Found,
    Mask,
    Positions,
    RankBand,
    Ranked,
)
from merge_engine.methods.base import Values
from merge_engine.methods.selection import Place
from merge_engine.recipe import Parameter

DENSITY = Parameter("density", float, "model", default=1.0, minimum=0, maximum=1)
TIES = Parameter("ties", str, "tensor", default="spread", choices=("spread", "index", "all"), constant=True)
TRIM_SCOPE = Parameter(
    "trim_scope", str, "tensor", default="tensor", choices=("tensor", "model"), constant=True
)
TRIM_SLACK = Parameter(
    "trim_slack", float, "model", default=0.0, minimum=0, maximum=1, exclusive_maximum=True
)
RESCALE_CHOICES = ("false", "true", "density")


@dataclass(frozen=True)
class Ties:
    """How ties are decided in one tensor: the rule, and for ``index`` where the deciding ties lie."""

    rule: Literal["spread", "index", "all"]
    tensor: str
    random_key: int
    places: Mapping[int, Place]  # by rank


class Cut(ABC):
    """The fate of one model's entries."""

    ranks: tuple[int, ...] = ()

    def tie_counts(self, found: Mapping[int, Found]) -> Mapping[int, int]:
        """For each rank whose ties are split by index: the occurrence (from 0) where the split is."""
        return {}

    @abstractmethod
    def mask(self, found: Mapping[int, Any], ties: Ties) -> Mask | RankBand:
        """The mask, or what the backend is to make one of, from the backend's handles to what was found."""


@dataclass(frozen=True)
class Keep(Cut):
    """A mask that needs no statistics."""

    fixed: Mask

    def mask(self, found: Mapping[int, Any], ties: Ties) -> Mask | RankBand:
        """Return the mask."""
        return self.fixed


@dataclass(frozen=True)
class KeepBand(Cut):
    """Keeps the magnitudes of descending rank ``first`` to ``last`` (from 1, both included).

    With ``slack`` the lower threshold t gives way to RN(float32(1 - slack) * t). ``stable_ascending`` says
    how ``ties: index`` reads at the lower threshold: which of its ties a stable sort by ascending magnitude
    would drop, instead of keeping the lowest indices.
    """

    first: int
    last: int
    slack: float = 0.0
    stable_ascending: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:  # type: ignore[override]
        """The ranks of the highest kept magnitude (if any is dropped above it) and of the lowest."""
        return (self.first, self.last) if self.first > 1 else (self.last,)

    def tie_counts(self, found: Mapping[int, Found]) -> Mapping[int, int]:
        """See ``Cut.tie_counts``."""
        counts = {}
        low = found[self.last]
        kept = self.last - low.above
        if self.slack == 0 and kept < low.equal and low.key > 0:
            counts[self.last] = low.equal - kept if self.stable_ascending else kept - 1
        if self.first > 1:
            high = found[self.first]
            dropped = self.first - 1 - high.above
            if dropped > 0 and high.key > 0:
                counts[self.first] = high.equal - dropped - 1
        return counts

    def mask(self, found: Mapping[int, Any], ties: Ties) -> Mask | RankBand:
        """See ``Cut.mask``."""
        return RankBand(
            self.first,
            self.last,
            found[self.last],
            found[self.first] if self.first > 1 else None,
            self.slack,
            ties.rule,
            self._positions(ties, self.last, self.stable_ascending),
            self._positions(ties, self.first, False),
            ties.random_key,
        )

    def _positions(self, ties: Ties, rank: int, from_there: bool) -> Positions:
        """Where the ties at a threshold stay: up to the deciding one, or from it on."""
        place = ties.places.get(rank)
        if place is None:
            return EVERY_POSITION
        if ties.tensor == place.tensor:
            return (place.index, EVERY_POSITION[1]) if from_there else (0, place.index)
        return EVERY_POSITION if (ties.tensor > place.tensor) == from_there else NO_POSITION


class Sparsifier(ABC):
    """Makes cuts from a model's parameters."""

    parameters: tuple[Parameter, ...] = ()
    whole_lines = False

    @abstractmethod
    def cut(self, settings: Values, common: Values, count: int, random_key: int) -> Cut:
        """The cut for a task vector of ``count`` elements, which may be all tensors of a model together."""

    def problem(self, settings: Values) -> str | None:
        """What is wrong with a combination of parameters that are right one by one."""
        return None


class Everything(Sparsifier):
    """No sparsification."""

    def cut(self, settings: Values, common: Values, count: int, random_key: int) -> Cut:
        """Keep every entry."""
        return Keep(Dense())


class Magnitude(Sparsifier):
    """Top-k by magnitude: k = floor(density * N), at least 1 (TIES, Yadav et al., NeurIPS 2023)."""

    parameters = (DENSITY, TRIM_SLACK, TIES, TRIM_SCOPE)

    def cut(self, settings: Values, common: Values, count: int, random_key: int) -> Cut:
        """Keep the k largest magnitudes, and with a slack the near misses."""
        density = float(settings["density"] or 0)
        if density >= 1 or count == 0:
            return Keep(Dense())
        if density <= 0:
            return Keep(NOTHING)
        return KeepBand(1, max(1, int(density * count)), float(settings["trim_slack"] or 0))


class Outliers(Sparsifier):
    """Drops the floor(gamma * N) largest and the smallest so that floor(density * N) remain.

    Model Breadcrumbs (Davari and Belilovsky, ECCV 2024).
    """

    parameters = (
        DENSITY,
        Parameter("gamma", float, "model", default=0.01, minimum=0, maximum=1),
        TRIM_SLACK,
        TIES,
        TRIM_SCOPE,
    )

    def cut(self, settings: Values, common: Values, count: int, random_key: int) -> Cut:
        """Keep a band of magnitudes."""
        density, gamma = float(settings["density"] or 0), float(settings["gamma"] or 0)
        if density >= 1 or count == 0:
            return Keep(Dense())
        kept = int(density * count)
        if kept == 0:
            return Keep(NOTHING)
        dropped_below = max(0, count - kept - int(gamma * count))
        last = count - dropped_below
        return KeepBand(last - kept + 1, last, float(settings["trim_slack"] or 0), stable_ascending=True)


class Bernoulli(Sparsifier):
    """Keeps each entry with probability ``density`` (DARE, Yu et al., ICML 2024)."""

    parameters = (DENSITY,)

    def cut(self, settings: Values, common: Values, count: int, random_key: int) -> Cut:
        """Keep by a draw."""
        density = float(settings["density"] or 0)
        return Keep(Dense() if density >= 1 else Draw(int(2.0**32 * density), random_key))


class RankedBernoulli(Sparsifier):
    """Keeps entries with a probability that rises with their rank in the row (DELLA, Deep et al., 2024)."""

    parameters = (
        DENSITY,
        Parameter("epsilon", float, "model", default=0.15, minimum=0, maximum=1),
    )
    whole_lines = True

    def cut(self, settings: Values, common: Values, count: int, random_key: int) -> Cut:
        """Keep by a draw against each entry's own probability."""
        density, epsilon = float(settings["density"] or 0), float(settings["epsilon"] or 0)
        if density >= 1:
            return Keep(Dense())
        if density <= 0:
            return Keep(NOTHING)
        by_density = common["rescale"] == "density"
        return Keep(Ranked(density, epsilon, by_density, random_key))

    def problem(self, settings: Values) -> str | None:
        """Probabilities must stay within 0 and 1."""
        density, epsilon = float(settings["density"] or 0), float(settings["epsilon"] or 0)
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            return (
                f"density {density:g} with epsilon {epsilon:g} gives keep probabilities from "
                f"{density - epsilon:g} to {density + epsilon:g}; both must lie between 0 and 1"
            )
        return None
