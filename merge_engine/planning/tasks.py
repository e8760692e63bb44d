"""From the tensors of the inputs to tasks: one for each output tensor, and every problem found.

Inputs are catalogues of operands, so that checkpoints on disk and state dicts in memory are planned by the same
rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_engine.dtypes import promote
from merge_engine.fit import Remarks, SliceNames
from merge_engine.methods import Action, Method, Task
from merge_engine.operands import Operand
from merge_engine.planning.buffers import Buffers
from merge_engine.planning.experts import match_experts
from merge_engine.planning.inputs import Catalogue, Inputs, examples
from merge_engine.planning.names import examine_names, match_names
from merge_engine.planning.modules import Stack
from merge_engine.planning.selection import Selection, pattern_for
from merge_engine.planning.shapes import Disagreements
from merge_engine.planning.slicing import Origin, Part, Slicing
from merge_engine.planning.ties import find_ties
from merge_engine.recipe import Parameter, Recipe, exclude_key, resolvers
from merge_engine.text import some


@dataclass
class Planned(Remarks):
    """All output tensors, in the order of the inputs' names, and what is said about them.

    ``untied`` says that some input has a head of its own. ``origins`` are those of the layers that are not of whole
    models. ``names`` has for each slice the names that settings are for.
    """

    tasks: list[Task] = field(default_factory=list)
    untied: bool = False
    origins: Mapping[Stack, Sequence[Origin]] = field(default_factory=dict)
    names: list[SliceNames] = field(default_factory=list)


def make_tasks(recipe: Recipe, method: Method, slices: Sequence[Inputs]) -> Planned:
    """Plan every output tensor.

    ``slices`` are the inputs of each slice of the recipe, in order, with all tensors of each model and with one
    reference: the one whose names the output gets. Problems are returned, not raised, except for ``RecipeError``: a
    parameter is wrong, or has no value for a tensor. Raises ``CheckpointError`` if the bytes of a head that may be
    tied cannot be read.
    """
    planned = Planned(allowed=recipe.allow)
    make = _TaskMaker(recipe, method)
    planned.problems += _count_problems(recipe, method, slices)
    named = _named(recipe, slices, planned)
    problems: list[str] = []
    slicing = Slicing(recipe.stacks, named, problems)
    if problems:
        planned.problems += problems
        return planned
    of_ties = Remarks()
    ties = find_ties(named, slicing.giver, of_ties)
    twins: dict[str, list[str]] = {}
    for twin, name in ties.twins.items():
        twins.setdefault(name, []).append(twin)
    passed = ties.once | ties.twins.keys()
    lacking, buffers, disagreements = _Lacking(), Buffers(), Disagreements()
    told: set[str] = set()
    for part in slicing.parts(ties.sources):
        inputs = part.inputs
        explained = examine_names(inputs, planned, told)
        make.begin(part)
        held: list[tuple[int | None, Mapping[str, Operand]]] = [
            (i, model.tensors) for i, model in inputs.models.items()
        ]
        if inputs.base is not None:
            held.insert(0, (None, inputs.base.tensors))
        for name in part.positions:
            if name in passed:
                continue
            if buffers.has(name, inputs):
                operand = None if inputs.reference is None else inputs.reference.tensors.get(name)
                if operand is not None:
                    planned.tasks.append(_copy(name, operand))
                continue
            found: list[int] = []
            operands: list[Operand] = []
            for position, tensors in held:
                operand = tensors.get(name)
                if operand is not None:
                    operands.append(operand)
                    if position is not None:
                        found.append(position)
            if inputs.base is not None and len(found) == len(operands):
                lacking.in_base(name, inputs, found, explained)
            elif not disagreements.add(name, operands):
                lacking.in_models(name, inputs, found, explained)
                for one in (name, *twins.get(name, ())):
                    planned.tasks.append(make(one, tuple(operands), inputs.base is not None, found, name))
        planned.names.append(SliceNames(part.positions, _own_names(part), part.layers))
    planned.untied = ties.untied
    planned.origins = slicing.origins()
    planned.notes += [*of_ties.notes, *buffers.notes(), *lacking.notes()]
    planned.warnings += of_ties.warnings
    planned.problems += [*lacking.problems(), *disagreements.problems()]
    merged = [task for task in planned.tasks if task.action is Action.MERGE]
    if recipe.arithmetic == "mergekit" and any(task.working.name == "float64" for task in merged):
        planned.problems.append("arithmetic: mergekit is for bfloat16, float16 and float32, not for float64")
    planned.problems += method.check(recipe, merged)
    return planned


def _named(recipe: Recipe, given: Sequence[Inputs], planned: Planned) -> list[Inputs]:
    """The inputs without what the recipe leaves out, under the names that the output has."""
    selection = Selection(recipe)
    named = match_names(selection.apply(given, planned), planned)
    named = selection.exclude(match_experts(named, planned))
    planned.warnings += selection.unused()
    if not any(catalogue.tensors for inputs in given for catalogue in inputs.merged()):
        planned.problems.append("the inputs hold no tensors")
    elif not any(catalogue.tensors for inputs in named for catalogue in inputs.merged()):
        planned.problems.append("tensors.exclude: no tensor is left to merge; leave out fewer")
    return named


def _own_names(part: Part) -> dict[int, Collection[str]]:
    """The names that each model itself has for the tensors of a part, by recipe position."""
    return {
        i: [part.own_names[i].get(name, name) for name in model.tensors] if i in part.own_names else model.names
        for i, model in part.inputs.models.items()
    }


def _copy(name: str, operand: Operand) -> Task:
    return Task(name, operand.shape, operand.dtype, operand.dtype, Action.COPY, (operand,))


class _Lacking:
    """Collects the tensors that some inputs lack, but those that another message explains."""

    def __init__(self) -> None:
        self._in_models: dict[str, list[str]] = {}
        self._in_base: dict[tuple[str, ...], tuple[Catalogue, list[str]]] = {}

    def in_models(self, name: str, inputs: Inputs, found: Sequence[int], explained: Collection[str]) -> None:
        """Keep a tensor that only the models in ``found`` have."""
        if len(found) < len(inputs.models) and name not in explained:
            for i, model in inputs.models.items():
                if i not in found:
                    self._in_models.setdefault(model.label, []).append(name)

    def in_base(self, name: str, inputs: Inputs, found: Sequence[int], explained: Collection[str]) -> None:
        """Keep a tensor that the base lacks."""
        base = inputs.base
        if base is not None and name not in explained:
            having = (base.label, *(inputs.models[i].label for i in found))
            self._in_base.setdefault(having, (base, []))[1].append(name)

    def notes(self) -> Iterator[str]:
        """A note for each model that lacks tensors."""
        for label, names in self._in_models.items():
            yield f"{label} lacks {some(names)}; merged from the inputs that have them"

    def problems(self) -> Iterator[str]:
        """A problem for tensors that the base lacks, which have no task vector."""
        for (_, *having), (base, names) in self._in_base.items():
            yield (
                f"{examples(names)}: in {', '.join(having)}, but not in the base model {base.label}; to merge without "
                f"what the base lacks, add {exclude_key(pattern_for(names, base.names))} to the recipe"
            )


class _TaskMaker:
    """Makes tasks, with the parameters that the recipe gives each. ``begin`` says which slice the next ones are of."""

    def __init__(self, recipe: Recipe, method: Method):
        self._recipe = recipe
        self._resolvers = resolvers(recipe, method.parameters)
        self._settings = _typed(method.Settings, method.parameters)
        self._common = _typed(method.Common, method.parameters)
        self._elements: dict[int, int] = {}  # complete when the last task is made

    def begin(self, part: Part) -> None:
        """Take the parameters of this slice from now on."""
        self._part = part
        self._resolver = self._resolvers[part.number]

    def __call__(
        self,
        name: str,
        operands: tuple[Operand, ...],
        has_base: bool,
        found: Sequence[int],
        same: str,
    ) -> Task:
        """The task for a tensor, with the parameters and the draws of ``same``, which may be another name."""
        shape, kind = operands[0].shape, operands[0].dtype
        at = self._part.positions[same]
        common = self._common(self._resolver.for_tensor(same, at))
        kinds = [kind, *(operand.dtype for operand in operands if operand.dtype is not kind)]
        if not all(each.mergeable for each in kinds):
            return Task(name, shape, kind, kind, Action.COPY, operands)
        working = self._recipe.working_dtype or promote(*kinds)
        out = self._recipe.output_dtype or working
        if not found:
            return Task(name, shape, working, out, Action.ROUND, operands)
        own = self._part.own_names
        settings = (self._resolver.for_model(i, own.get(i, {}).get(same, same), at) for i in found)
        task = Task(
            name,
            shape,
            working,
            out,
            Action.MERGE,
            operands,
            has_base,
            tuple(found),
            tuple(map(self._settings, settings)),
            common,
            self._recipe.seed,
            self._recipe.arithmetic == "mergekit",
            self._elements,
            same if same != name else None,
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


def _count_problems(recipe: Recipe, method: Method, slices: Sequence[Inputs]) -> list[str]:
    """The slices with more or fewer models than the method takes."""
    problems = []
    for each, inputs in zip(recipe.stacks.slices, slices, strict=True):
        where = "" if each.place == "models" else f"{each.place}: "
        count = len(inputs.models)
        if not count:
            problems.append(f"{where}{method.name}: there is no model to merge besides the base")
        elif method.max_models is not None and count > method.max_models:
            problems.append(f"{where}{method.name}: takes at most {method.max_models} model(s), not {count}")
    return problems
