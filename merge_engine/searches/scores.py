"""What a scorer returns: a finite number for each objective, with its standard error if the scorer knows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from merge_engine.errors import OptionError
from merge_engine.recipe.problems import suggestion
from merge_engine.report.history_data import Objective
from merge_engine.text import counted, did_you_mean, shown

DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class Scores:
    """What a scorer says of a merge: a score for each objective, with standard errors where they are known."""

    values: Sequence[float]
    errors: Sequence[float | None]
    seconds: float


class Unscored(Exception):
    """What a scorer returned is no score for each objective. Its text says what is wrong with it."""


def read_objectives(directions: object) -> tuple[Objective, ...]:
    """The objectives from one direction, a list of them, or a map from names to directions.

    Without names they are called ``score``, or ``score 1``, ``score 2`` and so on. Raises ``OptionError``.
    """
    if isinstance(directions, str):
        named: dict[Any, Any] = {"score": directions}
    elif isinstance(directions, Mapping):
        named = dict(directions)
    elif isinstance(directions, Sequence):
        names = ["score"] if len(directions) == 1 else [f"score {i}" for i in range(1, len(directions) + 1)]
        named = dict(zip(names, directions, strict=True))
    else:
        raise OptionError(f"directions: must be a direction or several, not {shown(directions)}")
    if not named:
        raise OptionError("directions: there is none; give maximize or minimize for each objective")
    problems = [
        f"directions: names must be text, not {shown(name)}" for name in named if not isinstance(name, str)
    ]
    problems += [
        f"directions: must be maximize or minimize, not {shown(direction)}"
        f"{did_you_mean(str(direction), DIRECTIONS)}"
        for direction in named.values()
        if direction not in DIRECTIONS
    ]
    if problems:
        raise OptionError(problems)
    return tuple(Objective(name, direction) for name, direction in named.items())


def read_scores(
    returned: object, objectives: Sequence[Objective]
) -> tuple[tuple[float, ...], tuple[float | None, ...]]:
    """Scores and standard errors (None where there is none), in the order of the objectives.

    ``returned``: a score, or one for each objective as a sequence or as a map by names. A score is a number, or a pair
    of a number and its standard error. Raises ``Unscored``.
    """
    scores = (
        _by_name(returned, objectives) if isinstance(returned, Mapping) else _in_order(returned, objectives)
    )
    pairs = [_pair(score, objective) for score, objective in zip(scores, objectives, strict=True)]
    return tuple(score for score, _ in pairs), tuple(error for _, error in pairs)


def _by_name(returned: Mapping[Any, object], objectives: Sequence[Objective]) -> list[object]:
    names = [objective.name for objective in objectives]
    for name in returned:
        if name not in names:
            raise Unscored(f"a score {shown(name)}, which is no objective{suggestion(str(name), names)}")
    if lacking := [name for name in names if name not in returned]:
        raise Unscored(f"no score {shown(lacking[0])}")
    return [returned[name] for name in names]


def _in_order(returned: object, objectives: Sequence[Objective]) -> Sequence[object]:
    several = _several(returned)
    if len(objectives) == 1 and (several is None or len(several) == 2):
        return [returned]
    if several is None or len(several) != len(objectives):
        what = shown(returned) if several is None else counted(len(several), "score")
        raise Unscored(f"{what} for {counted(len(objectives), 'objective')}")
    return several


def _pair(score: object, objective: Objective) -> tuple[float, float | None]:
    both = _several(score)
    if both is None:
        return _finite(score, objective.name), None
    if len(both) != 2:
        raise Unscored(
            f"{shown(score)} as {objective.name}; a score is a number, or a pair with its standard error"
        )
    number, error = both
    if error is None:
        return _finite(number, objective.name), None
    deviation = _finite(error, f"the standard error of {objective.name}")
    if deviation < 0:
        raise Unscored(f"{deviation} as the standard error of {objective.name}, which is never negative")
    return _finite(number, objective.name), deviation


def _several(value: object) -> Sequence[object] | None:
    """The values of a list, a tuple or an array with one dimension; None for all else."""
    if hasattr(value, "tolist"):  # arrays and tensors, also those of one number
        value = value.tolist()
    return value if isinstance(value, list | tuple) else None


def _finite(value: object, what: str) -> float:
    """A number as ``float``. Numbers of other libraries, and tensors of one element, are numbers too."""
    if isinstance(value, str | bool) or not isinstance(value, SupportsFloat):
        raise Unscored(f"{shown(value)} as {what}, which is no number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise Unscored(f"{shown(value)} as {what}, which is no number") from None
    if not math.isfinite(number):
        raise Unscored(
            f"{number} as {what}; a score must be finite: return a bad one for a model that is no good"
        )
    return number
