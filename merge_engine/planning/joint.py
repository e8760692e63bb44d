"""Tensors that several recipes make from one reading of their inputs.

Each recipe has a plan of its own. What they make of one tensor is a ``JointTask``: its inputs are those of all recipes
together, each once, and its parts are the recipes' own tasks. Parts with the same inputs in the same roles are a group,
which is measured once for all of them. A merge of one recipe is the case of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from merge_engine.methods import Action, Need, Task
from merge_engine.methods.needs import is_shared
from merge_engine.operands import Operand
from merge_engine.planning.plan import MergePlan

_MEASURED = (Action.MERGE, Action.MEASURE)


class Part(NamedTuple):
    """What one recipe makes of a tensor: the recipe's number, from 0, its task, and the number of its group."""

    recipe: int
    task: Task
    group: int = 0


class Group(NamedTuple):
    """Parts that are measured together: they differ in parameters and in what is written, but not in their inputs.

    ``task`` is that of the first part; those of the others have the same inputs, models and working dtype. ``places``
    are those of their inputs among all inputs of the joint task. ``shared`` is the number of the ``SharedGroup`` that
    answers their shared needs, if they have any.
    """

    task: Task
    parts: tuple[Part, ...]
    places: Sequence[int]
    shared: int | None = None


class SharedGroup(NamedTuple):
    """Recipes that answer their shared needs together, because they merge the same tensors of the same models.

    ``tasks`` are those of the first recipe in the order of their names; they are not empty.
    """

    recipes: tuple[int, ...]
    needs: tuple[Need, ...]
    tasks: Sequence[Task]


@dataclass(
    slots=True, eq=False
)  # not frozen: one for each tensor, and making frozen ones takes several times as long
class JointTask:
    """One tensor, of ``count`` elements, and all that recipes make of it.

    ``inputs`` are the operands of all parts, ``parts`` those of all groups. ``written`` are the parts that have an
    output: all, or none if they are only measured. ``input_bits`` and ``output_bits`` are those of an element in all
    inputs and in all outputs. ``copied`` says that the dtype is not mergeable.
    """

    name: str
    count: int
    inputs: tuple[Operand, ...]
    groups: tuple[Group, ...]
    parts: tuple[Part, ...]
    written: tuple[Part, ...]
    input_bits: int
    output_bits: int
    copied: bool


@dataclass(frozen=True)
class Joint:
    """All tensors of some plans, in the order of the first, and the groups that answer shared needs."""

    tasks: Sequence[JointTask]
    shared: Sequence[SharedGroup]


def joined(plans: Sequence[MergePlan]) -> Joint:
    """The tensors of plans whose recipes are merged from one reading."""
    having = [number for number, plan in enumerate(plans) if _has_shared_needs(plan)]
    if len(plans) == 1:
        shared = [_shared(plans, having)] if having else []
        return Joint([_alone(task, 0 if having else None) for task in plans[0].tasks], shared)
    tasks = _put_together(plans, [None] * len(plans))
    if not having:
        return Joint(tasks, [])
    by_measured: dict[Any, list[int]] = {}
    for number in having:
        by_measured.setdefault(_measured(tasks, number), []).append(number)
    shared = [_shared(plans, numbers) for numbers in by_measured.values()]
    of_recipes: list[int | None] = [None] * len(plans)
    for place, each in enumerate(shared):
        for number in each.recipes:
            of_recipes[number] = place
    return Joint(_put_together(plans, of_recipes), shared)


def measured_tasks(plan: MergePlan) -> list[Task]:
    """The tasks whose needs are answered."""
    return [task for task in plan.tasks if task.action in _MEASURED and task.count]


def _alone(task: Task, shared: int | None) -> JointTask:
    """The task of the only recipe."""
    parts = (Part(0, task),)
    group = Group(task, parts, range(len(task.inputs)), shared)
    return _task_of(task, task.inputs, (group,), parts, task.input_bits, task.out.bits)


def _put_together(plans: Sequence[MergePlan], shared: Sequence[int | None]) -> list[JointTask]:
    """The joint tasks. ``shared`` has the number of each recipe's shared group."""
    by_tensor: dict[tuple[object, ...], dict[tuple[object, ...], list[tuple[int, Task]]]] = {}
    for number, plan in enumerate(plans):
        for task in plan.tasks:
            groups = by_tensor.setdefault((task.name, task.shape, task.action is Action.COPY), {})
            roles = (task.inputs, task.has_base, task.models)
            measured_in = (task.working, task.storage_rounding, shared[number])
            groups.setdefault((roles, measured_in), []).append((number, task))
    return [_joint(list(groups.values()), shared) for groups in by_tensor.values()]


def _joint(groups: Sequence[Sequence[tuple[int, Task]]], shared: Sequence[int | None]) -> JointTask:
    places: dict[Operand, int] = {}
    made = []
    for number, pairs in enumerate(groups):
        recipe, task = pairs[0]
        parts = tuple(Part(*pair, number) for pair in pairs)
        own = [places.setdefault(operand, len(places)) for operand in task.inputs]
        made.append(Group(task, parts, own, shared[recipe]))
    every = tuple(part for group in made for part in group.parts)
    input_bits = sum(operand.dtype.bits for operand in places)
    output_bits = sum(part.task.out.bits for part in every)
    return _task_of(task, tuple(places), tuple(made), every, input_bits, output_bits)


def _task_of(
    task: Task,
    inputs: tuple[Operand, ...],
    groups: tuple[Group, ...],
    parts: tuple[Part, ...],
    input_bits: int,
    output_bits: int,
) -> JointTask:
    """The joint task of some parts, of which ``task`` is one."""
    only_measured = task.action is Action.MEASURE
    written, output_bits = ((), 0) if only_measured else (parts, output_bits)
    copied = task.action is Action.COPY
    return JointTask(task.name, task.count, inputs, groups, parts, written, input_bits, output_bits, copied)


def _has_shared_needs(plan: MergePlan) -> bool:
    """Whether a recipe has needs that all tensors of a model answer together: then each tensor has them."""
    return any(is_shared(need) for task in measured_tasks(plan)[:1] for need in plan.method.needs(task))


def _measured(tasks: Sequence[JointTask], recipe: int) -> tuple[tuple[int, int], ...]:
    """Numbers of tasks, and of groups in them, that are equal for recipes that measure the same."""
    return tuple(
        (number, place)
        for number, task in enumerate(tasks)
        for place, group in enumerate(task.groups)
        if group.task.action in _MEASURED and any(part.recipe == recipe for part in group.parts)
    )


def _shared(plans: Sequence[MergePlan], recipes: Sequence[int]) -> SharedGroup:
    needs = {
        need: None
        for number in recipes
        for task in measured_tasks(plans[number])
        for need in plans[number].method.needs(task)
        if is_shared(need)
    }
    tasks = sorted(measured_tasks(plans[recipes[0]]), key=lambda task: task.name)
    return SharedGroup(tuple(recipes), tuple(needs), tasks)
