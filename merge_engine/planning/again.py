"""Planning over the same models again and again: where only settings change, only settings are looked up again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from merge_engine.errors import PlanError
from merge_engine.fit import unused_settings
from merge_engine.methods import Method, Task
from merge_engine.planning.plan import MergePlan, checked
from merge_engine.planning.tasks import Planned, with_settings
from merge_engine.recipe import Recipe

Make: TypeAlias = "Callable[[Recipe, Callable[[Planned], object]], MergePlan]"


@dataclass(frozen=True)
class _Last:
    """The last plan: what it depends on but its settings, what its tasks are made of, and warnings about the inputs."""

    method: Method
    form: dict[str, Any]
    plan: MergePlan
    planned: Planned
    warnings: tuple[str, ...]


class Planner:
    """Plans recipes over models that do not change.

    ``make`` makes a plan anew, and hands over what its tasks were made of. A recipe that differs from the last one in
    nothing but settings and the seed gets the last plan, with tasks of its own.
    """

    def __init__(self, make: Make):
        self._make = make
        self._last: _Last | None = None

    def plan(self, recipe: Recipe) -> MergePlan:
        """The plan of a recipe. Raises as ``make`` does."""
        method, recipe, ignored = checked(recipe, False)
        last, form = self._last, _form(recipe)
        if last is None or last.method is not method or last.form != form:
            self._last = last = self._anew(recipe, method, form)
            tasks = last.plan.tasks
        else:
            tasks = _with_settings(recipe, last)
        unused = unused_settings(recipe, method, last.planned.names)
        warnings = (*recipe.remarks, *ignored, *last.warnings, *unused)
        return replace(last.plan, recipe=recipe, tasks=tasks, warnings=warnings)

    def _anew(self, recipe: Recipe, method: Method, form: dict[str, Any]) -> _Last:
        made: list[Planned] = []
        plan = self._make(recipe, made.append)
        unused = unused_settings(recipe, method, made[0].names)
        warnings = plan.warnings[len(recipe.remarks) : len(plan.warnings) - len(unused)]
        return _Last(method, form, plan, made[0], warnings)


def _with_settings(recipe: Recipe, last: _Last) -> tuple[Task, ...]:
    """The tasks of the last plan with other settings. Raises ``PlanError`` if they are impossible."""
    problems: list[str] = []
    tasks = {task.name: task for task in with_settings(recipe, last.method, last.planned.makings, problems)}
    if problems:
        raise PlanError(problems)
    return tuple([tasks[task.name] for task in last.plan.tasks])


def _form(recipe: Recipe) -> dict[str, Any]:
    """The recipe without settings and seed, as plain data."""
    plain = recipe.without({scope.place: scope.settings.keys() for scope in recipe.stacks.scopes}).to_plain()
    plain.pop("seed", None)
    return plain
