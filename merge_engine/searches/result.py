"""What a search found: the best trials as recipes, and whether they are better than the recipe without changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

from merge_engine.errors import OptionError
from merge_engine.recipe import Recipe
from merge_engine.report.history_data import Objective, SearchHistory, Trial
from merge_engine.report.values import score_text
from merge_engine.searches.candidates import Candidates
from merge_engine.searches.writing import write_files
from merge_engine.text import counted, some

_CHANCE = 0.05
"""The probability with which the best of many trials that are no better than the baseline may seem so."""


@dataclass(frozen=True)
class Comparison:
    """The best trial in one objective, the one at ``index`` in scores, beside the baseline.

    ``gain``: how much better its score is. ``standard_error`` of this difference, None if the scorer gives none; it
    counts the two scores as independent, which is too large if both come from the same items. ``threshold``: the number
    of standard errors that the best of as many trials exceeds by chance with a probability of 0.05 (Bonferroni).
    ``beyond_noise``: whether the gain does; None without standard errors.
    """

    objective: Objective
    index: int
    best: Trial
    baseline: Trial
    gain: float
    standard_error: float | None
    threshold: float
    beyond_noise: bool | None


@dataclass(frozen=True)
class SearchResult:
    """The trials of a search. ``notes`` says what was special about it."""

    history: SearchHistory
    candidates: Candidates
    notes: tuple[str, ...] = ()

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials in order. The first is the baseline, the recipe without changes."""
        return self.history.trials

    @property
    def front(self) -> tuple[Trial, ...]:
        """The trials that no other one beats in all objectives, those with the same values once.

        With one objective it is the first of the best.
        """
        distinct: list[Trial] = []
        for trial in self.history.front:
            if not any(trial.values == other.values for other in distinct):
                distinct.append(trial)
        return tuple(distinct[:1] if len(self.history.objectives) == 1 else distinct)

    @property
    def best(self) -> Trial:
        """The best trial. Raises ``OptionError`` if there are several objectives: see ``front``."""
        if len(self.history.objectives) > 1:
            names = some([objective.name for objective in self.history.objectives])
            raise OptionError(f"no trial is best in all of {names}; .front has those that no other one beats")
        return self.front[0]

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes of ``front``, in its order."""
        return tuple(self.recipe_of(trial) for trial in self.front)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """For each objective the best trial beside the baseline."""
        return tuple(self._compared(i) for i in range(len(self.history.objectives)))

    @property
    def summary(self) -> list[str]:
        """What came out, in a sentence for each objective."""
        return [_sentence(each, len(self.trials) - 1) for each in self.comparisons]

    def recipe_of(self, trial: Trial) -> Recipe:
        """The recipe of a trial."""
        if trial.number == self.history.baseline:
            return self.candidates.recipe
        return self.candidates.recipe_of(trial.values)

    def write(self, folder: str | Path) -> None:
        """Write the best recipes, a page and the numbers into a folder, in place of those of an earlier search.

        ``best.yaml``, or ``front-1.yaml`` and so on with several objectives; ``history.html``; ``history.json``. Each
        file is complete or not there, and ``history.json``, which names the others, comes last. Raises ``OutputError``
        if the folder cannot be written, and ``ReportError`` if matplotlib is not installed.
        """
        shown = replace(self.history, summary=(*self.summary, *self.notes))
        write_files(Path(folder), shown, list(zip(self.front, self.recipes, strict=True)))

    def _compared(self, i: int) -> Comparison:
        objective = self.history.objectives[i]
        sign = 1 if objective.direction == "maximize" else -1
        scored = [trial for trial in self.trials if trial.scores]
        baseline, best = scored[0], max(scored, key=lambda trial: sign * trial.scores[i])
        gain = sign * (best.scores[i] - baseline.scores[i])
        errors = best.errors[i], baseline.errors[i]
        both = None if errors[0] is None or errors[1] is None else math.hypot(errors[0], errors[1])
        threshold = NormalDist().inv_cdf(1 - _CHANCE / max(len(scored) - 1, 1))
        beyond = None if both is None else gain > threshold * both
        return Comparison(objective, i, best, baseline, gain, both, threshold, beyond)


def _sentence(found: Comparison, others: int) -> str:
    name, i = found.objective.name, found.index
    baseline = f"the recipe without changes has {_score(found.baseline, i)}"
    if found.best is found.baseline:
        return f"{name}: {baseline}, and none of {counted(others, 'trial')} is better"
    both = f"{name}: trial {found.best.number} has {_score(found.best, i)}, {baseline}"
    if found.beyond_noise is None:
        return f"{both}; without standard errors nobody knows whether that is noise"
    if not found.standard_error:
        return f"{both}, both without noise"
    ratio = f"{found.gain / found.standard_error:.1f} standard errors"
    chance = f"chance gives the best of {counted(others, 'trial')} up to {found.threshold:.1f}"
    verdict = "more than noise" if found.beyond_noise else "no more than noise"
    return f"{both}: {ratio} better, {verdict}, because {chance}"


def _score(trial: Trial, i: int) -> str:
    return score_text(trial.scores[i], trial.errors[i])
