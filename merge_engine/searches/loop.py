"""The search: Optuna proposes values, the session merges, the caller's function scores."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from merge_engine.arguments import path_of
from merge_engine.errors import OptionError, PlanError, RecipeError, SearchError
from merge_engine.recipe import Recipe, RecipeSource
from merge_engine.report.history_data import Objective, SearchHistory
from merge_engine.searches.candidates import Candidates
from merge_engine.searches.result import SearchResult
from merge_engine.searches.samplers import Samplers
from merge_engine.searches.scores import Scores, Unscored, read_objectives, read_scores
from merge_engine.searches.space import Range, read_space
from merge_engine.searches.storage import open_study
from merge_engine.searches.trials import Trials, is_baseline
from merge_engine.searches.writing import STUDY_FILE, prepare_folder
from merge_engine.text import shown

if TYPE_CHECKING:
    from optuna import Study
    from optuna import Trial as Asked
    from optuna.samplers import BaseSampler

    from merge_engine.planning import MergePlan
    from merge_engine.session import Merge, Session

Score: TypeAlias = "float | tuple[float, float | None]"
"""A score, or a pair of a score and its standard error."""
Scorer: TypeAlias = "Callable[[Merge], Score | Sequence[Score] | Mapping[str, Score]]"

T = TypeVar("T")
_KEPT = "the trials before it are kept, and the same call goes on"


def search(
    session: Session,
    evaluate: Scorer,
    space: Mapping[str, object],
    *,
    trials: int = 50,
    directions: str | Sequence[str] | Mapping[str, str] = "maximize",
    sampler: str | BaseSampler | None = None,
    storage: str | Path | None = None,
    seed: int = 0,
    start: str | RecipeSource | None = None,
    output: str | Path | None = None,
    timeout: float | None = None,
    on_trial: Callable[[SearchHistory], None] | None = None,
) -> SearchResult:
    """Look for the values with which a merge scores best.

    ``evaluate`` gets a planned merge of the session (``merge.into(model)``, ``merge.tensors()``) and returns a score:
    a finite number, or a pair of a number and its standard error; with several objectives a sequence of scores, or a
    map by names. ``space``: names of changes of the recipe, with a range ``(low, high)``, a map with ``low``,
    ``high``, and ``log`` or ``step``, a list of choices, or one fixed value. ``directions``: ``maximize`` or
    ``minimize``, one for each objective; as a map it names the objectives.

    The recipe ``start`` without changes is scored first, as trial 0; by default that is the session's. It may be the
    name of a method, as for ``Session.merge``. ``trials`` proposals follow, one at a time, because a merge uses all
    cores; none begins after ``timeout`` seconds. Values that were scored before get the same scores again, without a
    merge. ``sampler``: ``tpe`` (the default for one objective), ``nsga2`` (for several), ``cmaes``, or a sampler of
    Optuna. ``on_trial`` gets the history after each trial.

    ``storage``: a file or a URL of Optuna's. The same call with the same storage goes on until there are ``trials``
    proposals. Without one the trials are kept in ``output``, if that is given, else in memory. ``output``: a folder for
    the best recipes, a page and the numbers (see ``SearchResult.write``); it is also written when the search stops
    early.

    Raises ``OptionError`` for arguments that mean nothing, all at once and before anything is merged, and
    ``SearchError`` if the storage holds another search, or if ``evaluate`` raises or returns no score. The trials until
    then are kept, and the same call begins with the one that failed.
    """
    if not callable(evaluate):
        raise OptionError(f"evaluate: must be a function that scores a merge, not {shown(evaluate)}")
    merge = session.merge(start)
    checked = check(merge.recipe, space, directions, trials, timeout, sampler, seed)
    folder = None if output is None else path_of("output", output)
    _probe(session, checked.candidates)
    if folder is not None:
        prepare_folder(folder, [each.path for each in merge.plan.inputs])
        storage = folder / STUDY_FILE if storage is None else storage
    with open_study(storage, checked.objectives, _fingerprint(checked, merge.plan, evaluate)) as study:
        trying = _Trying(session, evaluate, checked, study)
        try:
            trying.until(trials, math.inf if timeout is None else time.monotonic() + timeout, on_trial)
        finally:
            history = trying.history()
            result = SearchResult(history, checked.candidates, tuple(checked.samplers.notes))
            if folder is not None and history.trials:
                result.write(folder)
        return result


@dataclass(frozen=True)
class Checked:
    """The arguments of a search after their checks."""

    candidates: Candidates
    objectives: tuple[Objective, ...]
    samplers: Samplers


class _Trying:
    """A search that is going on."""

    def __init__(self, session: Session, evaluate: Scorer, checked: Checked, study: Study):
        self._session = session
        self._evaluate = evaluate
        self._candidates = checked.candidates
        self._objectives = checked.objectives
        self._trials = Trials(study, checked.candidates, checked.objectives, checked.samplers)

    def history(self) -> SearchHistory:
        """The trials that ended, and what was important."""
        return replace(self._so_far(), importance=self._trials.importance())

    def until(self, trials: int, end: float, on_trial: Callable[[SearchHistory], None] | None) -> None:
        """Score the baseline and proposals until there are so many, or the time has come."""
        while len(self._trials.ended) <= trials and time.monotonic() < end:
            if self._trials.needs_baseline:
                self._trials.add_baseline(self._baseline())
            else:
                self._propose()
            if on_trial is not None:
                on_trial(self._so_far())

    def _so_far(self) -> SearchHistory:
        varied = self._candidates.space.varied
        even = tuple(name for name, domain in varied.items() if isinstance(domain, Range) and domain.log)
        return SearchHistory(
            tuple(varied), self._objectives, self._trials.ended, baseline=0, logarithmic=even
        )

    def _propose(self) -> None:
        asked = self._trials.ask()
        try:
            if is_baseline(asked):
                self._trials.tell(asked, self._baseline())
            elif (earlier := self._trials.scores_of(asked)) is not None:
                self._trials.tell(asked, earlier)
            else:
                self._try(asked)
        except BaseException:
            self._trials.give_up(asked)
            raise

    def _try(self, asked: Asked) -> None:
        begun = time.monotonic()
        try:
            merge = self._session.merge(self._candidates.recipe_of(asked.params))
        except (RecipeError, PlanError) as error:
            self._trials.refuse(asked, error.problems[0])
            return
        values = self._candidates.values(asked.params)
        text = ", ".join(f"{name}={shown(value)}" for name, value in values.items())
        self._trials.tell(asked, self._scored(merge, f"trial {len(self._trials.ended)} ({text})", begun))

    def _baseline(self) -> Scores:
        begun = time.monotonic()
        merge = self._session.merge(self._candidates.recipe)
        return self._scored(merge, "trial 0 (the recipe without changes)", begun)

    def _scored(self, merge: Merge, trial: str, begun: float) -> Scores:
        """What the scorer says. ``trial`` begins messages, and ``begun`` is the time when it did."""
        try:
            returned = self._evaluate(merge)
        except (Exception, SystemExit) as error:
            raise SearchError(f"{trial}: {_raised(error)}; {_KEPT}") from error
        try:
            values, errors = read_scores(returned, self._objectives)
        except Unscored as error:
            raise SearchError(f"{trial}: evaluate returned {error}; {_KEPT}") from None
        return Scores(values, errors, time.monotonic() - begun)


def _require_extra() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise SearchError('a search needs optuna; run: pip install "merge_engine[search]"') from None


def check(
    recipe: Recipe,
    space: object,
    directions: object,
    trials: object,
    timeout: object,
    sampler: str | BaseSampler | None,
    seed: int,
) -> Checked:
    """The arguments of ``search`` with the recipe that it starts from, checked.

    Raises ``OptionError`` with the problems of all of them, and ``SearchError`` if Optuna is not installed.
    """
    _require_extra()
    problems: list[str] = []

    def tried(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except OptionError as error:
            problems.extend(error.problems)
            return None

    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        problems.append(f"trials: must be a whole number from 1 on, not {shown(trials)}")
    if timeout is not None and (not isinstance(timeout, int | float) or not timeout > 0):
        problems.append(f"timeout: must be a number of seconds above 0, not {shown(timeout)}")
    objectives = tried(lambda: read_objectives(directions))
    read = read_space(space, problems)
    candidates = tried(lambda: Candidates(recipe, read))
    samplers = tried(lambda: Samplers(sampler, seed, len(objectives or [""]), read))
    if problems or candidates is None or objectives is None or samplers is None:
        raise OptionError(problems)
    return Checked(candidates, objectives, samplers)


def _probe(session: Session, candidates: Candidates) -> None:
    """Raise ``PlanError`` for the methods of the space that no values make possible with these inputs."""
    problems: list[str] = []
    for method in candidates.methods:
        said: list[str] = []
        for proposed in candidates.probes(method):
            try:
                session.merge(candidates.recipe_of(proposed))
                break
            except (RecipeError, PlanError) as error:
                said = error.problems
        else:
            problems += [f"space: {method}: {line}" for line in said]
    if problems:
        raise PlanError(problems)


def _fingerprint(checked: Checked, plan: MergePlan, evaluate: object) -> dict[str, object]:
    """What the trials of a search depend on, as JSON has it. Of the scorer that is only the name."""
    return {
        "scorer": {getattr(evaluate, "__qualname__", type(evaluate).__qualname__): True},
        "space": checked.candidates.space.plain,
        "directions": {each.name: each.direction for each in checked.objectives},
        "recipe": checked.candidates.recipe.to_plain(),
        "inputs": {each.label: each.fingerprint for each in plan.inputs},
    }


def _raised(error: BaseException) -> str:
    """What the scorer raised, and the line of it that did."""
    said = str(error).strip().split("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)[1:2]
    place = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in frames)
    return f"evaluate raised {type(error).__name__}{said and f': {said}'}{place}"
