"""The trials of a search as an Optuna study holds them.

The first trial is the recipe without changes, the baseline. If it lies in the space, it is a proposal like any other,
and samplers learn from it. If not, it is stored as failed, with its scores as attributes: samplers leave failed trials
out, and would take a trial without parameters for a sign that there are none.

A trial that did not end, because the scorer raised or the process was killed, is stored as failed and counts for
nothing: the sampler of the same number makes the same proposal again, unless it is CMA-ES, which draws by Optuna's
numbers. A trial whose values do not go together was refused: it is stored as pruned, and TPE counts it as bad.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from merge_engine.report.history_data import Objective, Trial
from merge_engine.searches.candidates import Candidates
from merge_engine.searches.samplers import Samplers, distributions
from merge_engine.searches.scores import Scores

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as Asked
    from optuna.trial import FrozenTrial

REFUSED = "refused"
_BASELINE = "baseline"
_SCORES = "scores"
_ERRORS = "standard_errors"
_SECONDS = "seconds"
_REASON = "reason"
_ENOUGH = 20
"""Fewer trials say nothing about importance."""


class Trials:
    """The trials of a study: those that ended, and the next one."""

    def __init__(
        self, study: Study, candidates: Candidates, objectives: Sequence[Objective], samplers: Samplers
    ):
        self._study = study
        self._candidates = candidates
        self._objectives = objectives
        self._samplers = samplers
        self._distributions = distributions(candidates.space, candidates.whole)
        for each in study.get_trials(deepcopy=False):
            self.give_up(each)  # those of a process that was killed
        self._begin()

    @property
    def ended(self) -> tuple[Trial, ...]:
        """The trials that ended, the baseline first, numbered from 0."""
        return tuple(self._as_trial(number, each) for number, each in enumerate(self._ended()))

    @property
    def needs_baseline(self) -> bool:
        """Whether the baseline is not scored yet and lies outside the space, so that ``add_baseline`` adds it."""
        return self._candidates.unchanged is None and not self._ended()

    def importance(self) -> dict[str, dict[str, float]]:
        """By objective, the share of each name in what made the best trials better (PED-ANOVA, IJCAI 2023).

        Empty with fewer than 20 trials.
        """
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
        from optuna.trial import TrialState

        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(complete) < _ENOUGH:
            return {}

        def important(i: int, sign: int) -> dict[str, float]:
            shares = get_param_importances(
                self._study,
                evaluator=PedAnovaImportanceEvaluator(),
                target=lambda trial: sign * trial.values[i],
            )
            return {name: float(share) for name, share in shares.items()}

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it takes low targets for good ones: so they are
            return {
                objective.name: important(i, -1 if objective.direction == "maximize" else 1)
                for i, objective in enumerate(self._objectives)
            }

    def ask(self) -> Asked:
        """The next trial, with a value for each name of the space."""
        self._study.sampler = self._samplers.of_trial(len(self._ended()))
        asked = self._study.ask(self._distributions)
        if is_baseline(asked):
            _ = (
                asked.relative_params
            )  # NSGA-II takes it into the first generation only if it was asked for a proposal
        return asked

    def scores_of(self, asked: Asked) -> Scores | None:
        """The scores of an earlier trial with the same recipe, if there is one. They take no time now."""
        proposed = self._candidates.values(asked.params)
        for each in self._ended():
            if each.values and self._candidates.values(each.params) == proposed:
                return Scores(each.values, each.user_attrs[_ERRORS], 0.0)
        return None

    def tell(self, asked: Asked, scores: Scores) -> None:
        """The trial ended with these scores."""
        asked.set_user_attr(_ERRORS, list(scores.errors))
        asked.set_user_attr(_SECONDS, scores.seconds)
        self._study.tell(asked, list(scores.values))

    def refuse(self, asked: Asked, reason: str) -> None:
        """The values of the trial do not go together."""
        from optuna.trial import TrialState

        asked.set_user_attr(_REASON, reason)
        self._study.tell(asked, state=TrialState.PRUNED)

    def give_up(self, trial: Asked | FrozenTrial) -> None:
        """The trial did not end, and counts for nothing. Does nothing if it did."""
        from optuna.trial import TrialState

        if self._study.get_trials(deepcopy=False)[trial.number].state is TrialState.RUNNING:
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._begin()

    def add_baseline(self, scores: Scores) -> None:
        """The recipe without changes, which lies outside the space, has these scores."""
        from optuna.trial import TrialState, create_trial

        attributes = {
            _BASELINE: True,
            _SCORES: list(scores.values),
            _ERRORS: list(scores.errors),
            _SECONDS: scores.seconds,
        }
        self._study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=attributes))

    def _begin(self) -> None:
        """Propose the baseline, unless it is there or waits to be asked for."""
        from optuna.trial import TrialState

        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        unchanged = self._candidates.unchanged
        if unchanged is not None and not waiting and not self._ended():
            self._study.enqueue_trial(dict(unchanged), user_attrs={_BASELINE: True})

    def _ended(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        ends = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = self._study.get_trials(deepcopy=False)
        return [each for each in trials if each.state in ends or _SCORES in each.user_attrs]

    def _as_trial(self, number: int, found: FrozenTrial) -> Trial:
        attributes = found.user_attrs
        values = self._candidates.values(found.params)
        if is_baseline(found):
            values = self._candidates.current
        scores = attributes.get(_SCORES) or found.values
        return Trial(
            number,
            {name: values[name] for name in self._candidates.space.varied if name in values},
            tuple(scores or ()),
            tuple(attributes.get(_ERRORS, ())),
            "complete" if scores else REFUSED,
            attributes.get(_SECONDS),
            attributes.get(_REASON, ""),
        )


def is_baseline(trial: Asked | FrozenTrial) -> bool:
    """Whether a trial is the recipe without changes."""
    return bool(trial.user_attrs.get(_BASELINE))
