"""From the tensors of the inputs to tasks: one for each output tensor, and every problem found.

Inputs are catalogues of operands, so that checkpoints on disk and state dicts in memory are planned by the same
rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_engine.dtypes import promote
from merge_engine.fit import Remarks
from merge_engine.methods import Action, Method, Task
from merge_engine.operands import Operand
from merge_engine.planning.buffers import Buffers
from merge_engine.planning.inputs import Catalogue, Inputs, examples
from merge_engine.planning.names import examine_names, match_names
from merge_engine.planning.selection import Selection, pattern_for
from merge_engine.planning.shapes import Disagreements
from merge_engine.planning.ties import find_ties
from merge_engine.recipe import Parameter, Recipe, exclude_key, layer_positions, resolvers
from merge_engine.text import some
from merge_engine.vocabulary import Alignment


@dataclass
class Planned(Remarks):
    """All output tensors, in the order of the inputs' names, and what is said about them.

    ``untied`` says that some input has a head of its own.
    """

    tasks: list[Task] = field(default_factory=list)
    untied: bool = False


def make_tasks(
    recipe: Recipe,
    method: Method,
    base: Catalogue | None,
    models: Mapping[int, Catalogue],
    donor: Catalogue | None = None,
    vocabulary: Alignment | None = None,
) -> Planned:
    """Plan every output tensor.

    ``base`` is given if the method uses one; ``models`` are by recipe position, from 0. The output has the names of
    the base, else of the ``donor``, else of the first model. ``vocabulary`` gives embeddings and heads the rows of the
    output. Problems are returned, not raised, except for
    ``RecipeError``: a parameter is wrong, or has no value for a tensor. Raises ``CheckpointError`` if the bytes of a
    head that may be tied cannot be read.
    """
    planned = Planned(problems=_count_problems(method, models), allowed=recipe.allow)
    reference = base or donor or next(iter(models.values()), None)
    inputs = _named(recipe, Inputs(base, models, reference), planned)
    names = list(dict.fromkeys(name for catalogue in inputs.merged() for name in catalogue.tensors))
    make = _TaskMaker(recipe, method, names)
    lacking = _Lacking(inputs, examine_names(inputs, planned))
    ties = find_ties(inputs, planned)
    buffers, disagreements = Buffers(inputs), Disagreements()
    given: list[tuple[int | None, Catalogue]] = [(i, model) for i, model in inputs.models.items()]
    if inputs.base is not None:
        given.insert(0, (None, inputs.base))
    held = [(i, catalogue.tensors, ties.sources[id(catalogue)]) for i, catalogue in given]
    for name in names:
        if name in ties.once:
            continue
        if buffers.has(name):
            operand = buffers.of_reference(name)
            if operand is not None:
                planned.tasks.append(_copy(name, operand))
            continue
        same = ties.twins.get(name, name)
        found: dict[int, str] = {}
        operands: list[Operand] = []
        for position, tensors, sources in held:
            used = sources.get(same, same)
            operand = tensors.get(used)
            if operand is not None:
                operands.append(operand)
                if position is not None:
                    found[position] = used
        if inputs.base is not None and len(found) == len(operands):
            lacking.in_base(name, found)
            continue
        if vocabulary is not None:
            operands = vocabulary.align(name, operands, inputs.base is not None)
        if not disagreements.add(name, operands):
            lacking.in_models(name, found)
            planned.tasks.append(make(name, tuple(operands), inputs.base is not None, found, same))
    planned.untied = ties.untied
    planned.notes += [*buffers.notes(), *lacking.notes()]
    planned.problems += [*lacking.problems(), *disagreements.problems()]
    merged = [task for task in planned.tasks if task.action is Action.MERGE]
    if recipe.arithmetic == "mergekit" and any(task.working.name == "float64" for task in merged):
        planned.problems.append("arithmetic: mergekit is for bfloat16, float16 and float32, not for float64")
    planned.problems += method.check(recipe, merged)
    return planned


def _named(recipe: Recipe, given: Inputs, planned: Planned) -> Inputs:
    """The inputs without what the recipe leaves out, under the names that the output has."""
    selection = Selection(recipe)
    inputs = selection.exclude(match_names(selection.apply(given, planned), planned))
    planned.warnings += selection.unused()
    if not any(catalogue.tensors for catalogue in given.merged()):
        planned.problems.append("the inputs hold no tensors")
    elif not any(catalogue.tensors for catalogue in inputs.merged()):
        planned.problems.append("tensors.exclude: no tensor is left to merge; leave out fewer")
    return inputs


def _copy(name: str, operand: Operand) -> Task:
    return Task(name, operand.shape, operand.dtype, operand.dtype, Action.COPY, (operand,))


class _Lacking:
    """Collects the tensors that some inputs lack, but those that another message explains."""

    def __init__(self, inputs: Inputs, explained: Collection[str]):
        self._inputs, self._explained = inputs, explained
        self._in_models: dict[int, list[str]] = {}
        self._in_base: dict[tuple[str, ...], list[str]] = {}

    def in_models(self, name: str, found: Mapping[int, str]) -> None:
        """Keep a tensor that only the models in ``found`` have."""
        if len(found) < len(self._inputs.models) and name not in self._explained:
            for i in self._inputs.models.keys() - found.keys():
                self._in_models.setdefault(i, []).append(name)

    def in_base(self, name: str, found: Mapping[int, str]) -> None:
        """Keep a tensor that the base lacks."""
        if name not in self._explained:
            having = tuple(self._inputs.models[i].label for i in found)
            self._in_base.setdefault(having, []).append(name)

    def notes(self) -> Iterator[str]:
        """A note for each model that lacks tensors."""
        for i, names in sorted(self._in_models.items()):
            yield f"{self._inputs.models[i].label} lacks {some(names)}; merged from the inputs that have them"

    def problems(self) -> Iterator[str]:
        """A problem for tensors that the base lacks, which have no task vector."""
        base = self._inputs.base
        if base is None:
            return
        for having, names in self._in_base.items():
            yield (
                f"{examples(names)}: in {', '.join(having)}, but not in the base model {base.label}; to merge without "
                f"what the base lacks, add {exclude_key(pattern_for(names, base.names))} to the recipe"
            )


class _TaskMaker:
    """Makes tasks, with the parameters that the recipe gives each."""

    def __init__(self, recipe: Recipe, method: Method, names: Sequence[str]):
        self._recipe = recipe
        self._resolver = resolvers(recipe, method.parameters)[0]
        self._positions = layer_positions(names)
        self._settings = _typed(method.Settings, method.parameters)
        self._common = _typed(method.Common, method.parameters)
        self._elements: dict[int, int] = {}  # complete when the last task is made

    def __call__(
        self,
        name: str,
        operands: tuple[Operand, ...],
        has_base: bool,
        found: Mapping[int, str],
        same: str,
    ) -> Task:
        """The task for a tensor, with the parameters and the draws of ``same``, which may be another name."""
        shape, kind = operands[0].shape, operands[0].dtype
        at = self._positions[same]
        common = self._common(self._resolver.for_tensor(same, at))
        kinds = [kind, *(operand.dtype for operand in operands if operand.dtype is not kind)]
        if not all(each.mergeable for each in kinds):
            return Task(name, shape, kind, kind, Action.COPY, operands)
        working = self._recipe.working_dtype or promote(*kinds)
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


def _count_problems(method: Method, models: Mapping[int, Catalogue]) -> list[str]:
    if not models:
        return [f"{method.name}: there is no model to merge besides the base"]
    if method.max_models is not None and len(models) > method.max_models:
        return [f"{method.name}: takes at most {method.max_models} model(s), not {len(models)}"]
    return []
