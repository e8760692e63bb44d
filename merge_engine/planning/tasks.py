"""From the tensors of the inputs to tasks: one for each output tensor, and every problem found.

Inputs are catalogues of operands, so that checkpoints on disk and state dicts in memory are planned by the same
rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from merge_engine.checkpoint import LayerOrigin
from merge_engine.dtypes import promote
from merge_engine.fit import Remarks, SliceNames
from merge_engine.methods import Action, Method, Task
from merge_engine.operands import Operand
from merge_engine.planning.buffers import Buffers
from merge_engine.planning.experts import match_experts
from merge_engine.planning.inputs import Catalogue, Inputs
from merge_engine.planning.lacking import Lacking, count_problems
from merge_engine.planning.modules import Stack
from merge_engine.planning.names import examine_names, match_names
from merge_engine.planning.selection import Selection
from merge_engine.planning.shapes import Disagreements, stacked_vocabularies
from merge_engine.planning.slicing import Cut, Slicing
from merge_engine.planning.ties import find_ties
from merge_engine.recipe import Parameter, Recipe, resolvers
from merge_engine.vocabulary import Alignment


@dataclass
class Planned(Remarks):
    """All output tensors, in the order of the inputs' names, and what is said about them.

    ``makings`` are what they are made of, whatever the settings say. ``untied`` says that some input has a head of its
    own. ``origins`` are those of the layers that are not of whole models. ``names`` has for each slice the names that
    settings are for.
    """

    tasks: list[Task] = field(default_factory=list)
    makings: list[Making | Task] = field(default_factory=list)
    untied: bool = False
    origins: Mapping[Stack, Sequence[LayerOrigin]] = field(default_factory=dict)
    names: list[SliceNames] = field(default_factory=list)


def make_tasks(
    recipe: Recipe, method: Method, slices: Sequence[Inputs], vocabulary: Alignment | None = None
) -> Planned:
    """Plan every output tensor.

    ``slices`` are the inputs of each slice of the recipe, in order, with all tensors of each model and with one
    reference: the one whose names the output gets. ``vocabulary`` gives embeddings and heads the rows of the output.
    Problems are returned, not raised, except for ``RecipeError``: a parameter is wrong, or has no value for a tensor.
    Raises ``CheckpointError`` if the bytes of a head that may be tied cannot be read.
    """
    planned = Planned(allowed=recipe.allow)
    planned.problems += count_problems(recipe, method, slices)
    named = _named(recipe, slices, planned)
    problems: list[str] = []
    slicing = Slicing(recipe.stacks, named, problems)
    if problems:
        planned.problems += problems
        return planned
    slicing.check(planned)
    of_ties = Remarks()
    ties = find_ties(named, slicing.giver, of_ties)
    twins: dict[str, list[str]] = {}
    for twin, name in ties.twins.items():
        twins.setdefault(name, []).append(twin)
    passed = ties.once | ties.twins.keys()
    gatherer, buffers = _Gatherer(method, vocabulary), Buffers()
    told: set[str] = set()
    of_slices: dict[int, dict[str, Operand]] = {}
    for cut in slicing.cuts(ties.sources):
        inputs = cut.inputs
        gatherer.begin(inputs, examine_names(inputs, planned, told))
        for name in cut.positions:
            if name in passed:
                continue
            if buffers.has(name, inputs):
                operand = None if inputs.reference is None else inputs.reference.tensors.get(name)
                if operand is not None:
                    planned.makings.append(_copy(name, operand))
            elif (gathered := gatherer.gather(name)) is not None:
                of_slices.setdefault(cut.number, {})[name] = gathered.operands[0]
                planned.makings += [Making(cut, one, gathered, name) for one in (name, *twins.get(name, ()))]
        planned.names.append(SliceNames(cut.positions, _own_names(cut), cut.layers))
    planned.untied = ties.untied
    planned.origins = slicing.origins()
    planned.notes += [*of_ties.notes, *buffers.notes(), *gatherer.lacking.notes()]
    planned.warnings += of_ties.warnings
    planned.problems += [*gatherer.lacking.problems(), *gatherer.disagreements.problems()]
    if len(of_slices) > 1:
        planned.problems += stacked_vocabularies(of_slices, named)
    planned.tasks = with_settings(recipe, method, planned.makings, planned.problems)
    return planned


def with_settings(
    recipe: Recipe, method: Method, makings: Sequence[Making | Task], problems: list[str]
) -> list[Task]:
    """The tasks of a recipe, from what they are made of. Adds to ``problems`` what its settings make impossible.

    Raises ``RecipeError`` if a parameter is wrong, or has no value for a tensor.
    """
    make = _TaskMaker(recipe, method)
    tasks = [making if isinstance(making, Task) else make(making) for making in makings]
    merged = [task for task in tasks if task.action is Action.MERGE]
    if recipe.arithmetic == "mergekit" and any(task.working.name == "float64" for task in merged):
        problems.append("arithmetic: mergekit is for bfloat16, float16 and float32, not for float64")
    problems += method.check(recipe, merged)
    return tasks


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


def _own_names(cut: Cut) -> dict[int, Collection[str]]:
    """The names that each model itself has for the tensors of a slice, by recipe position."""
    return {
        i: [cut.own_names[i].get(name, name) for name in model.tensors] if i in cut.own_names else model.names
        for i, model in cut.inputs.models.items()
    }


def _copy(name: str, operand: Operand) -> Task:
    return Task(name, operand.shape, operand.dtype, operand.dtype, Action.COPY, (operand,))


class _Gathered(NamedTuple):
    """What an output tensor is made of: operands, the base's first if ``has_base``, and the positions of the models."""

    operands: list[Operand]
    has_base: bool
    found: list[int]


class Making(NamedTuple):
    """What an output tensor is made of, with the parameters and the draws of ``same``, which may be another name."""

    cut: Cut
    name: str
    gathered: _Gathered
    same: str


class _Gatherer:
    """Looks up what output tensors are made of, and collects what is wrong with it.

    ``begin`` says which slice the next ones are of.
    """

    def __init__(self, method: Method, vocabulary: Alignment | None):
        self._method, self._vocabulary = method, vocabulary
        self.lacking, self.disagreements = Lacking(method), Disagreements()

    def begin(self, inputs: Inputs, explained: Collection[str]) -> None:
        """Take these inputs from now on. ``explained`` are the names that another message explains."""
        self.lacking.begin(inputs, explained)
        self._has_base = inputs.base is not None
        self._held: list[tuple[int | None, Catalogue]] = list(inputs.models.items())
        if inputs.base is not None:
            self._held.insert(0, (None, inputs.base))

    def gather(self, name: str) -> _Gathered | None:
        """What a tensor is made of; None if it cannot be merged.

        A tensor that too few inputs have is copied from one of them, if the method says so.
        """
        operands: list[Operand] = []
        labels: list[str] = []
        found: list[int] = []
        for position, given in self._held:
            operand = given.tensors.get(name)
            if operand is not None:
                operands.append(operand)
                labels.append(given.label)
                if position is not None:
                    found.append(position)
        method, lacking = self._method, self.lacking
        base_lacks = self._has_base and len(found) == len(operands)
        too_few = base_lacks or len(found) < method.min_models
        is_lone = too_few and len(operands) == 1 and method.if_lacking == "lone"
        if base_lacks and not is_lone:
            lacking.in_base(name, found)
            return None
        if self._vocabulary is not None:
            operands = self._vocabulary.align(name, operands, labels, self._has_base and not base_lacks)
        if is_lone:
            lacking.copied(name, found)
            return _Gathered(operands, False, [])
        if self.disagreements.add(name, operands):
            return None
        if 0 < len(found) < method.min_models:
            if not self._has_base or method.if_lacking != "base":
                lacking.in_too_few(name, found)
                return None
            lacking.copied(name, [])
            return _Gathered(operands[:1], True, [])
        lacking.in_models(name, found)
        return _Gathered(operands, self._has_base, found)


class _TaskMaker:
    """Makes tasks, with the parameters that the recipe gives each."""

    def __init__(self, recipe: Recipe, method: Method):
        self._recipe = recipe
        self._resolvers = resolvers(recipe, method.parameters)
        self._settings = _typed(method.Settings, method.parameters)
        self._common = _typed(method.Common, method.parameters)
        self._elements: dict[int, int] = {}  # complete when the last task is made

    def __call__(self, making: Making) -> Task:
        """The task for a tensor."""
        cut, name, gathered, same = making
        resolver = self._resolvers[cut.number]
        operands, found = tuple(gathered.operands), gathered.found
        shape, kind = operands[0].shape, operands[0].dtype
        at = cut.positions[same]
        common = self._common(resolver.for_tensor(same, at))
        kinds = [kind, *(operand.dtype for operand in operands if operand.dtype is not kind)]
        if not all(each.mergeable for each in kinds):
            return Task(name, shape, kind, kind, Action.COPY, operands)
        working = self._recipe.working_dtype or promote(*kinds)
        out = self._recipe.output_dtype or working
        if not found:
            return Task(name, shape, working, out, Action.ROUND, operands)
        own = cut.own_names
        settings = (resolver.for_model(i, own.get(i, {}).get(same, same), at) for i in found)
        task = Task(
            name,
            shape,
            working,
            out,
            Action.MERGE,
            operands,
            gathered.has_base,
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
