"""From the tensors of the inputs to tasks: one for each output tensor, and every problem found.

Inputs are catalogues of operands, so that checkpoints on disk and state dicts in memory are planned by the same
rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_engine.dtypes import promote
from merge_engine.methods import Action, Method, Task
from merge_engine.operands import Operand
from merge_engine.recipe import Parameter, ParameterResolver, Recipe, layer_positions
from merge_engine.text import some

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Catalogue:
    """The tensors of one input, by name. ``label`` names the input in messages.

    ``tied`` says whether its head is its embedding; None if its config does not say.
    """

    label: str
    tensors: Mapping[str, Operand]
    tied: bool | None = False

    def find(self, name: str) -> str | None:
        """The name of the tensor to use for ``name``: the same, or the embedding for the head of a model without one.

        None if the input has neither.
        """
        if name in self.tensors:
            return name
        if self.tied is not False and name.endswith(HEAD):
            candidates = [other for other in self.tensors if other.endswith(EMBEDDINGS)]
            if len(candidates) == 1:
                return candidates[0]
        return None


@dataclass
class Planned:
    """All output tensors, in the order of the inputs' names.

    ``problems`` prevent the merge, one line each; ``notes`` are messages for the user, ``warnings`` say what may be
    wrong. ``untied`` says that some input has a head of its own.
    """

    tasks: list[Task] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    untied: bool = False


def make_tasks(
    recipe: Recipe, method: Method, base: Catalogue | None, models: Mapping[int, Catalogue]
) -> Planned:
    """Plan every output tensor.

    ``base`` is given if the method uses one; ``models`` are by recipe position, from 0. Problems are returned, not
    raised, except for ``RecipeError``: a parameter is wrong, or has no value for a tensor.
    """
    planned = Planned(problems=_count_problems(method, models))
    inputs = ([base] if base is not None else []) + list(models.values())
    names = list(dict.fromkeys(name for catalogue in inputs for name in catalogue.tensors))
    if not names:
        planned.problems.append("the inputs hold no tensors")
    make = _TaskMaker(recipe, method, names)
    absent: dict[int, list[str]] = {}
    for name in names:
        found = {i: used for i, model in models.items() if (used := model.find(name)) is not None}
        operands = [models[i].tensors[used] for i, used in found.items()]
        has_base = False
        if base is not None:
            base_name = base.find(name)
            if base_name is None:
                having = ", ".join(models[i].label for i in found)
                planned.problems.append(f"{name}: in {having}, but not in the base model {base.label}")
                continue
            operands.insert(0, base.tensors[base_name])
            has_base = True
        problem = _disagreement(name, operands)
        if problem:
            planned.problems.append(problem)
            continue
        if len(found) < len(models):
            for i in models.keys() - found.keys():
                absent.setdefault(i, []).append(name)
        if name.endswith(HEAD):
            owners = [models[i] for i in found] + ([base] if base is not None else [])
            planned.untied |= any(owner.tied is False or owner.find(name) != name for owner in owners)
        planned.tasks.append(make(name, tuple(operands), has_base, found))
    planned.notes += [
        f"{models[i].label} lacks {some(lacking)}; merged from the inputs that have them"
        for i, lacking in sorted(absent.items())
    ]
    merged = [task for task in planned.tasks if task.action is Action.MERGE]
    if recipe.arithmetic == "mergekit" and any(task.working.name == "float64" for task in merged):
        planned.problems.append("arithmetic: mergekit is for bfloat16, float16 and float32, not for float64")
    planned.problems += method.check(recipe, merged)
    return planned


class _TaskMaker:
    """Makes tasks, with the parameters that the recipe gives each."""

    def __init__(self, recipe: Recipe, method: Method, names: Sequence[str]):
        self._recipe = recipe
        self._resolver = ParameterResolver(recipe, method.parameters)
        self._positions = layer_positions(names)
        self._settings = _typed(method.Settings, method.parameters)
        self._common = _typed(method.Common, method.parameters)
        self._elements: dict[int, int] = {}  # complete when the last task is made

    def __call__(
        self, name: str, operands: tuple[Operand, ...], has_base: bool, found: Mapping[int, str]
    ) -> Task:
        shape, kind = operands[0].shape, operands[0].dtype
        at = self._positions[name]
        common = self._common(self._resolver.for_tensor(name, at))
        if not all(operand.dtype.mergeable for operand in operands):
            return Task(name, shape, kind, kind, Action.COPY, operands)
        working = self._recipe.working_dtype or promote(*(operand.dtype for operand in operands))
        out = self._recipe.output_dtype or working
        if not found:
            return Task(name, shape, working, out, Action.ROUND, operands)
        task = Task(
            name,
            shape,
            working,
            out,
            Action.MERGE,
            operands,
            has_base,
            tuple(found),
            tuple(self._settings(self._resolver.for_model(i, used, at)) for i, used in found.items()),
            common,
            self._recipe.seed,
            self._recipe.arithmetic == "mergekit",
            self._elements,
        )
        for i in found:
            self._elements[i] = self._elements.get(i, 0) + task.count
        return task


def _typed(kind: type, parameters: Sequence[Parameter]) -> Callable[[Mapping[str, Any]], Any]:
    """A function from values by parameter to an instance of ``kind``.

    The same mapping object gives the same instance.
    """
    attributes = {p.name: p.attribute or p.name for p in parameters}
    known: dict[int, tuple[Mapping[str, Any], Any]] = {}

    def make(values: Mapping[str, Any]) -> Any:
        before = known.get(id(values))
        if before is not None and before[0] is values:
            return before[1]
        made = kind(**{attributes[name]: value for name, value in values.items()})
        known[id(values)] = values, made
        return made

    return make


def _count_problems(method: Method, models: Mapping[int, Catalogue]) -> list[str]:
    if not models:
        return [f"{method.name}: there is no model to merge besides the base"]
    if method.max_models is not None and len(models) > method.max_models:
        return [f"{method.name}: takes at most {method.max_models} model(s), not {len(models)}"]
    return []


def _disagreement(name: str, operands: Sequence[Operand]) -> str | None:
    """The reason why these operands cannot be merged to one tensor; None if they can."""
    first = operands[0]
    if any(operand.shape != first.shape for operand in operands):
        shapes = ", ".join(f"{list(operand.shape)} in {operand.owner}" for operand in operands)
        return f"{name}: the shapes differ: {shapes}"
    kinds = {operand.dtype for operand in operands}
    if len(kinds) > 1 and not all(kind.mergeable for kind in kinds):
        dtypes = ", ".join(f"{operand.dtype} in {operand.owner}" for operand in operands)
        return f"{name}: these types cannot be merged with each other: {dtypes}"
    return None
