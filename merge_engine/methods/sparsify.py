"""Sparsifiers: which entries of a task vector survive.

Each makes a ``Cut`` for a model and a number of elements. A cut says which order statistics it needs
(``ranks``, descending, from 1), and turns them into a mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from merge_engine.backends import Backend
from merge_engine.backends.operations import (
    EVERY_POSITION,
    NO_POSITION,
    NOTHING,
    Band,
    Dense,
    Draw,
    Mask,
    Positions,
    Ranked,
)
from merge_engine.methods.base import MergeTask, Values
from merge_engine.methods.selection import Found, Place
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

    rule: str
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
    def mask(
        self, found: Mapping[int, Found], ties: Ties, backend: Backend, task: MergeTask
    ) -> tuple[Mask, int | None]:
        """The mask, and what the trim would have kept without its slack (None when there is no slack)."""


@dataclass(frozen=True)
class Keep(Cut):
    """A mask that needs no statistics."""

    fixed: Mask

    def mask(
        self, found: Mapping[int, Found], ties: Ties, backend: Backend, task: MergeTask
    ) -> tuple[Mask, int | None]:
        """Return the mask."""
        return self.fixed, None


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

    def mask(
        self, found: Mapping[int, Found], ties: Ties, backend: Backend, task: MergeTask
    ) -> tuple[Mask, int | None]:
        """See ``Cut.mask``. A zero carries nothing, so zeros are never counted as kept."""
        low = found[self.last]
        high = found[self.first] if self.first > 1 else None
        low_kept = self.last - low.above
        high_kept = 0 if high is None else high.equal - (self.first - 1 - high.above)
        if high is not None and high.key == low.key and self.slack == 0:
            low_kept = high_kept = self.last - self.first + 1

        low_key, plain = low.key, None
        low_positions = self._positions(ties, self.last, low_kept, low.equal, self.stable_ascending)
        if self.slack > 0:
            plain = self._kept_without_slack(low, high, ties.rule)
            low_key, low_positions = backend.relax(low.key, self.slack, task.working), EVERY_POSITION
        if low_key == 0:
            low_key, low_positions = 1, EVERY_POSITION
        by_draw = ties.rule == "spread"
        if high is None:
            mask = Band(low_key, low_positions=low_positions, by_draw=by_draw, random_key=ties.random_key)
            return mask, plain
        if high.key < low_key:
            return NOTHING, plain
        high_positions = self._positions(ties, self.first, high_kept, high.equal, False)
        return Band(low_key, high.key, low_positions, high_positions, by_draw, ties.random_key), plain

    def _positions(self, ties: Ties, rank: int, kept: int, equal: int, from_there: bool) -> Positions:
        """Where ``kept`` of ``equal`` elements at a threshold stay: up to the deciding tie, or from it on."""
        if ties.rule == "spread":
            below = (kept << 32) // equal
            return (0, below - 1) if below else NO_POSITION
        if ties.rule == "index" and rank in ties.places:
            place = ties.places[rank]
            if ties.tensor == place.tensor:
                return (place.index, EVERY_POSITION[1]) if from_there else (0, place.index)
            return EVERY_POSITION if (ties.tensor > place.tensor) == from_there else NO_POSITION
        return EVERY_POSITION

    def _kept_without_slack(self, low: Found, high: Found | None, rule: str) -> int:
        top = high.above if high is not None and rule == "all" else self.first - 1
        if low.key == 0:
            return low.above - top
        return (low.above + low.equal if rule == "all" else self.last) - top


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
