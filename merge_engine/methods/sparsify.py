"""Sparsifiers: the choice of the entries of a task vector that are kept.

Each makes a mask from a model's parameters and a number of elements. The magnitudes at the ranks of a ``RankMask``
are measured before it is applied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from merge_engine.backends.operations import NOTHING, Dense, Draw, Mask, Ranked, RankMask
from merge_engine.recipe import parameter


@dataclass(frozen=True)
class Settings:
    """Parameters of each model in this family. A method has those that its sparsifier and its election use."""

    weight: float = parameter()
    density: float = parameter(1.0, minimum=0, maximum=1)
    gamma: float = parameter(0.01, minimum=0, maximum=1)
    epsilon: float = parameter(0.15, minimum=0, maximum=1)
    trim_slack: float = parameter(0.0, minimum=0, maximum=1, exclusive_maximum=True)
    sign_slack: float = parameter(0.0, minimum=0)


@dataclass(frozen=True)
class Common:
    """Parameters of all models of a tensor together."""

    normalize: bool = parameter(False)
    lambda_: float = parameter(1.0, name="lambda")
    rescale: Literal["false", "true", "density"] = parameter("false")
    ties: Literal["spread", "index", "all"] = parameter("spread", constant=True)
    trim_scope: Literal["tensor", "model"] = parameter("tensor", constant=True)
    elect: Literal["sum", "count"] = parameter("sum")
    sign_slack_mode: Literal["elect", "retain"] = parameter("elect")


class Sparsifier(ABC):
    """Makes masks from a model's parameters. ``parameters`` names the ones that it uses."""

    parameters: tuple[str, ...] = ("density",)

    @abstractmethod
    def mask(self, settings: Settings, common: Common, count: int, random_key: int) -> Mask:
        """The mask of a task vector.

        ``count`` is its number of elements; with ``trim_scope: model``, that of all merged tensors of the model.
        ``random_key`` is the Philox key of tensor and model.
        """

    def problem(self, settings: Settings) -> str | None:
        """What is wrong with a combination of parameters that are each valid alone; None if it is valid."""
        return None


class Everything(Sparsifier):
    """No sparsification."""

    def mask(self, settings: Settings, common: Common, count: int, random_key: int) -> Mask:
        """Keep every entry."""
        return Dense()


class Magnitude(Sparsifier):
    """Top-k by magnitude: k = floor(density * N), at least 1 (TIES, Yadav et al., NeurIPS 2023)."""

    parameters = ("density", "trim_slack", "ties", "trim_scope")

    def mask(self, settings: Settings, common: Common, count: int, random_key: int) -> Mask:
        """Keep the k largest magnitudes, and with a slack the near misses."""
        if settings.density >= 1 or count == 0:
            return Dense()
        if settings.density <= 0:
            return NOTHING
        kept = max(1, int(settings.density * count))
        return _band(1, kept, settings, common, random_key, stable_ascending=False)


class Outliers(Sparsifier):
    """Drops the floor(gamma * N) largest and the smallest so that floor(density * N) remain.

    Model Breadcrumbs (Davari and Belilovsky, ECCV 2024).
    """

    parameters = ("density", "gamma", "trim_slack", "ties", "trim_scope")

    def mask(self, settings: Settings, common: Common, count: int, random_key: int) -> Mask:
        """Keep a band of magnitudes."""
        if settings.density >= 1 or count == 0:
            return Dense()
        kept = int(settings.density * count)
        if kept == 0:
            return NOTHING
        last = count - max(0, count - kept - int(settings.gamma * count))
        return _band(last - kept + 1, last, settings, common, random_key, stable_ascending=True)


class Bernoulli(Sparsifier):
    """Keeps each entry with probability ``density`` (DARE, Yu et al., ICML 2024)."""

    def mask(self, settings: Settings, common: Common, count: int, random_key: int) -> Mask:
        """Keep by a draw."""
        return Dense() if settings.density >= 1 else Draw(int(2.0**32 * settings.density), random_key)


class RankedBernoulli(Sparsifier):
    """Keeps entries with a probability that rises with their rank in the line (DELLA, Deep et al., 2024)."""

    parameters = ("density", "epsilon")

    def mask(self, settings: Settings, common: Common, count: int, random_key: int) -> Mask:
        """Keep by a draw against each entry's own probability."""
        if settings.density >= 1:
            return Dense()
        if settings.density <= 0:
            return NOTHING
        return Ranked(settings.density, settings.epsilon, common.rescale == "density", random_key)

    def problem(self, settings: Settings) -> str | None:
        """Probabilities must stay within 0 and 1."""
        density, epsilon = settings.density, settings.epsilon
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            return (
                f"density {density:g} with epsilon {epsilon:g} gives keep probabilities from "
                f"{density - epsilon:g} to {density + epsilon:g}; both must lie between 0 and 1"
            )
        return None


def _band(
    first: int, last: int, settings: Settings, common: Common, random_key: int, stable_ascending: bool
) -> RankMask:
    return RankMask(
        first,
        last,
        settings.trim_slack,
        common.ties,
        stable_ascending,
        common.trim_scope == "model",
        random_key if common.ties == "spread" else 0,  # so that masks without draws can be equal
    )
