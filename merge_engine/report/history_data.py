"""The history of a search, as the page shows it and as a search hands it over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from merge_engine.recipe import Scalar


@dataclass(frozen=True)
class Objective:
    """A score that the search makes as large or as small as it can."""

    name: str
    direction: Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Trial:
    """One proposal of the search and what came out of it.

    ``values`` has the proposed value of each parameter, without those that the trial does not have. ``scores`` and
    ``errors`` (standard errors, None where unknown) follow the order of the objectives and are empty if the trial
    did not end with scores. ``state`` is ``complete`` if it did. ``seconds`` is the time from proposal to scores.
    ``reason`` says why a trial without scores has none.
    """

    number: int
    values: Mapping[str, Scalar]
    scores: tuple[float, ...] = ()
    errors: tuple[float | None, ...] = ()
    state: str = "complete"
    seconds: float | None = None
    reason: str = ""

    @property
    def is_scored(self) -> bool:
        """Whether the trial has scores that can be compared."""
        return bool(self.scores) and all(map(math.isfinite, self.scores))


@dataclass(frozen=True)
class SearchHistory:
    """The trials of a search in the order of their numbers.

    ``parameters`` are the names that the search varies. ``baseline`` is the number of the trial that is the recipe
    without changes, None if there is none. ``importance`` has, by objective and parameter, how much the parameter
    decides whether a trial is among the best tenth, as a share from 0 to 1. ``summary`` says in sentences what came
    out. ``logarithmic`` are the parameters whose values are even on a logarithmic scale.
    """

    parameters: tuple[str, ...]
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    baseline: int | None = None
    importance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
    logarithmic: tuple[str, ...] = ()

    @property
    def scored(self) -> tuple[Trial, ...]:
        """The trials whose scores can be compared."""
        return tuple(trial for trial in self.trials if trial.is_scored)

    @property
    def front(self) -> tuple[Trial, ...]:
        """The scored trials that no other one beats: at least as good in all objectives, and better in one.

        With one objective these are the trials with the best score.
        """
        front: list[Trial] = []
        for trial in self.scored:
            if not any(self._beats(other, trial) for other in front):
                front = [other for other in front if not self._beats(trial, other)]
                front.append(trial)
        return tuple(front)

    def _beats(self, one: Trial, other: Trial) -> bool:
        gains = [
            (mine - theirs) * (1 if objective.direction == "maximize" else -1)
            for objective, mine, theirs in zip(self.objectives, one.scores, other.scores, strict=True)
        ]
        return min(gains) >= 0 and max(gains) > 0
