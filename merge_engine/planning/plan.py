"""The plan of a merge: every output tensor, the place of every output byte, and every problem.

Only headers, configs, tokenizers and a few short pieces of tensors are read, and nothing is written. A plan never
changes. It holds no open file and can be sent to another process. Memory and devices are decided by the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from merge_engine.checkpoint import (
    AdapterFiles,
    Checkpoint,
    OutputTensor,
    ShardLayout,
    check_output_folder,
    find_side_files,
    input_label,
    plan_shards,
    tie_flag,
)
from merge_engine.errors import CheckpointError, PlanError, RecipeError
from merge_engine.fit import Remarks, examine, unused_settings
from merge_engine.methods import Action, Method, Task, find_method
from merge_engine.planning.inputs import Inputs
from merge_engine.planning.intermediates import Intermediate, open_model, used_by
from merge_engine.planning.loadable import check_loadable
from merge_engine.planning.side_edits import OutputFiles, SideEdits
from merge_engine.planning.sources import slice_inputs, stack_config
from merge_engine.planning.tasks import Planned, make_tasks
from merge_engine.planning.templates import edit_template
from merge_engine.planning.tolerance import without_ignored_settings
from merge_engine.recipe import ModelReference, Recipe, resolvers
from merge_engine.storage import File
from merge_engine.text import some
from merge_engine.vocabulary import Alignment, plan_vocabulary


@dataclass(frozen=True)
class Input:
    """One input of a merge: its path, its fingerprint when its headers were read, and its config.json as a mapping.

    ``fingerprint`` changes when the checkpoint is rewritten. It follows from ``contents``, each weight file with a
    digest of its header, and from the ``adapter`` that was put into it (see ``Checkpoint``).
    """

    path: Path
    fingerprint: str
    config: Mapping[str, object]
    contents: tuple[tuple[File, str], ...] = ()
    adapter: AdapterFiles | None = None

    @property
    def label(self) -> str:
        """See ``Checkpoint.label``."""
        return input_label(self.path, self.adapter)


@dataclass(frozen=True)
class MergePlan:
    """A merge without problems: every output tensor has its inputs and its place.

    ``tasks`` are in the order of the donor's files. ``bases`` are the base models by role (see ``Stacks``), none for
    methods without one. ``models`` are by recipe position, from 0. The output gets tokenizer and config of the
    ``donor``, whose config here is that of the output's layers, without the keys that are wrong for it. ``untied`` says
    that the output has a head of its own although the config may tie it to the embedding. ``edits`` are the files that
    it has otherwise than the donor. ``notes`` are messages for the user, ``warnings`` say what may be wrong with these
    inputs. ``copies`` are the positions of the models that are copies of the base, of which a warning tells.
    ``intermediates`` are the outputs of other recipes that it is made of, in the order of their making.
    """

    recipe: Recipe
    method: Method
    bases: Mapping[str, Input]
    models: Mapping[int, Input]
    donor: Input
    tasks: tuple[Task, ...]
    shards: tuple[ShardLayout, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    untied: bool = False
    copies: frozenset[int] = frozenset()
    edits: SideEdits = field(default_factory=SideEdits)
    intermediates: tuple[Intermediate, ...] = ()

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The donor, the base models and the models; one may stand there several times."""
        return (self.donor, *self.bases.values(), *self.models.values())

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors.values())

    @cached_property
    def files(self) -> Collection[File]:
        """All input files, each once."""
        by_id = {id(f): f for task in self.tasks for operand in task.inputs for f in operand.files}
        return frozenset(by_id.values())

    @cached_property
    def bytes_by_file(self) -> Mapping[File, int]:
        """Bytes that each input file gives, read once. Of a tensor with a LoRA the base's file gives all."""
        found: dict[File, int] = {}
        for task in self.tasks:
            for operand in task.inputs:
                for file in operand.files[:1]:  # it holds nearly all bytes: those of a LoRA are few
                    found[file] = found.get(file, 0) + operand.stored_bytes
        return found

    @cached_property
    def shard_of(self) -> Mapping[str, int]:
        """The number of the shard, from 0, by the name of a tensor in it."""
        return {name: number for number, shard in enumerate(self.shards) for name in shard.tensors}

    def only(self, *shards: int) -> MergePlan:
        """The part of the plan that makes some shards, without the files beside the weights.

        ``shards`` are their numbers, from 0; ``IndexError`` if there is none.
        """
        made = tuple(self.shards[shard] for shard in shards)
        names = {name for shard in made for name in shard.tensors}
        tasks = tuple(task for task in self.tasks if task.name in names)
        return replace(self, tasks=tasks, shards=made, edits=SideEdits())


def make_plan(
    recipe: Recipe,
    output: Path | None,
    *,
    shard_size: int,
    overwrite: bool = False,
    lenient: bool = False,
    intermediates: Mapping[str, Intermediate] = MappingProxyType({}),
    opened: Mapping[ModelReference, Checkpoint] | None = None,
    taking: Callable[[Planned], object] | None = None,
) -> MergePlan:
    """Plan the merge of a recipe into a folder (None: into memory). ``shard_size`` in bytes.

    ``lenient`` ignores parameters that no method has, with a warning, as mergekit does without one. ``intermediates``
    are outputs of other recipes that this one may name, by their names. ``opened`` has all models that it may name, if
    they are open already: one object for each checkpoint. ``taking`` gets what the plan's tasks were made of.

    Raises ``RecipeError`` for an unknown method or wrong parameters, ``CheckpointError`` for inputs that cannot be
    read, and ``PlanError`` with every other problem at once.
    """
    method, recipe, ignored = checked(recipe, lenient)
    opened = open_all(recipe, intermediates) if opened is None else among(recipe, opened)
    named_donor = recipe.base_model or recipe.stacks.models[0]
    donor = opened[named_donor]
    slices = slice_inputs(recipe, method, opened, donor)
    vocabulary, unaligned = _vocabulary(recipe, opened, named_donor)
    planned = make_tasks(recipe, method, slices, vocabulary)
    order = {name: place for place, name in enumerate(donor.tensors)}
    tasks = sorted(planned.tasks, key=lambda task: order.get(task.name, len(order)))
    shards = plan_shards([OutputTensor(task.name, task.out, task.shape) for task in tasks], shard_size)
    bases = {role: opened[base] for role, base in recipe.stacks.bases.items() if method.uses_base}
    merged = sorted({i for inputs in slices for i in inputs.models})
    models = {i: opened[recipe.stacks.models[i]] for i in merged}
    findings = examine(recipe, bases, models, donor, stacked=bool(planned.origins))
    explained = (findings.explain_tensors and planned.names) or unaligned  # no names: the slices cannot be
    problems = [*findings.problems, *unaligned, *([] if explained else planned.problems)]
    config, about_layers = stack_config(_without(donor.config, findings.stale_keys), planned.origins)
    stacked = [stack.prefix for stack in planned.origins]
    loadable = check_loadable([task.name for task in tasks], donor.tensors, config, stacked)
    warnings = [*findings.warnings, *planned.warnings, *about_layers, *loadable]
    edits, beside = SideEdits(), Remarks()
    if vocabulary is not None:
        config, edits = dict(vocabulary.finish(config)), edits.then(vocabulary.written, vocabulary.dropped)
        problems += vocabulary.remarks.problems
        planned.notes += vocabulary.remarks.notes
        warnings += vocabulary.remarks.warnings
    if output is not None:
        try:
            side_files = find_side_files(donor.path)
            beside.warnings += side_files.warnings
            if findings.chat_template is not None:
                edits = edit_template(findings.chat_template, OutputFiles(side_files.carried, edits), beside)
        except CheckpointError as error:
            problems += error.problems
        folders = [checkpoint.path for checkpoint in opened.values()]
        folders += [checkpoint.adapter.path for checkpoint in opened.values() if checkpoint.adapter]
        problems += check_output_folder(output, folders, overwrite, sum(shard.size for shard in shards))
    if problems:
        raise PlanError(problems)
    if taking is not None:
        taking(planned)
    unused = unused_settings(recipe, method, planned.names)
    inputs = {id(checkpoint): _input(checkpoint) for checkpoint in opened.values()}
    return MergePlan(
        recipe,
        method,
        {role: inputs[id(base)] for role, base in bases.items()},
        {i: inputs[id(model)] for i, model in models.items()},
        replace(inputs[id(donor)], config=config),
        tuple(tasks),
        tuple(shards),
        (*_repeated(recipe, slices), *findings.notes, *planned.notes, *beside.notes),
        (*recipe.remarks, *ignored, *warnings, *beside.warnings, *unused),
        planned.untied and tie_flag(donor.config) is not False,
        findings.copies,
        edits,
        intermediates=used_by(recipe, intermediates),
    )


def measuring(plan: MergePlan, method: Method) -> MergePlan:
    """A plan for the tensors that ``plan`` merges: it answers the needs of ``method`` and writes nothing."""
    tasks = tuple(replace(task, action=Action.MEASURE) for task in plan.tasks if task.action is Action.MERGE)
    return replace(plan, method=method, tasks=tasks, shards=())


def checked(recipe: Recipe, lenient: bool) -> tuple[Method, Recipe, list[str]]:
    """The method, the recipe with only the settings that it has, and warnings about those that are left out.

    Raises all that is wrong without a look at the inputs.
    """
    method = find_method(recipe.merge_method)
    recipe, ignored = without_ignored_settings(recipe, method, lenient)
    resolvers(recipe, method.parameters)
    if problems := _without_base(recipe, method):
        raise PlanError(problems)
    return method, recipe, ignored


def check_recipe(
    recipe: Recipe,
    *,
    lenient: bool = False,
    intermediates: Mapping[str, Intermediate] = MappingProxyType({}),
    unknown: Collection[str] = (),
) -> None:
    """Check a recipe as far as this is possible without the outputs of the recipes with the names ``unknown``.

    Raises as ``make_plan`` does.
    """
    checked(recipe, lenient)
    open_all(recipe, intermediates, unknown)


def open_all(
    recipe: Recipe,
    intermediates: Mapping[str, Intermediate] = MappingProxyType({}),
    unknown: Collection[str] = (),
) -> dict[ModelReference, Checkpoint]:
    """Open every input once, even if the recipe names it several times, or by several paths.

    Those with the paths ``unknown`` are left out. Raises ``CheckpointError`` with all that cannot be opened.
    """
    opened: dict[ModelReference, Checkpoint] = {}
    by_files: dict[object, Checkpoint] = {}
    problems = []
    for reference in recipe.references:
        if reference.path in unknown:
            continue
        try:
            checkpoint = open_model(reference, intermediates)
            opened[reference] = by_files.setdefault(checkpoint.file_ids, checkpoint)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    return opened


def among(recipe: Recipe, opened: Mapping[ModelReference, Checkpoint]) -> dict[ModelReference, Checkpoint]:
    """Those of the opened models that the recipe merges. Raises ``RecipeError`` for others."""
    if strange := [str(reference) for reference in recipe.references if reference not in opened]:
        raise RecipeError(f"the recipe names {some(strange)}, but loaded are {some(list(map(str, opened)))}")
    return {reference: opened[reference] for reference in recipe.references}


def _vocabulary(
    recipe: Recipe, opened: Mapping[ModelReference, Checkpoint], donor: ModelReference
) -> tuple[Alignment | None, list[str]]:
    """What the recipe says of vocabularies, or the problems of the inputs' tokenizers."""
    try:
        return plan_vocabulary(recipe, opened, donor), []
    except CheckpointError as error:
        return None, error.problems


def _without_base(recipe: Recipe, method: Method) -> list[str]:
    """A problem if a slice has no base model and the method needs one."""
    without = [each.place for each in recipe.stacks.slices if each.base is None]
    if not (method.uses_base and method.requires_base and without):
        return []
    where = "" if recipe.slices is None and recipe.modules is None else f"{some(without)}: "
    return [f"{where}{method.name} needs a base_model: add the model that the others were tuned from"]


def _repeated(recipe: Recipe, slices: Sequence[Inputs]) -> list[str]:
    """A note for each model that is merged with itself."""
    notes: dict[str, list[str]] = {}
    for each, inputs in zip(recipe.stacks.slices, slices, strict=True):
        places: dict[int, list[str]] = {}
        for source in each.sources:
            if source.position in inputs.models:
                model = inputs.models[source.position]
                places.setdefault(id(model.tensors), [model.label]).append(
                    source.settings.place.removesuffix(".parameters")
                )
        for label, *same in places.values():
            if len(same) > 1:
                notes.setdefault(label, []).extend(same)
    return [f"{label} is merged more than once, as {some(same)}" for label, same in notes.items()]


def _input(checkpoint: Checkpoint) -> Input:
    return Input(
        checkpoint.path, checkpoint.fingerprint, checkpoint.config, checkpoint.contents, checkpoint.adapter
    )


def _without(config: Mapping[str, object], keys: Collection[str]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in keys}
