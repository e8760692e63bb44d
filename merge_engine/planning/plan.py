"""The plan of a merge: every output tensor, the place of every output byte, and every problem.

Only headers, configs, tokenizers and a few short pieces of tensors are read, and nothing is written. A plan never
changes. It holds no open file and can be sent to another process. Memory and devices are decided by the schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from merge_engine.checkpoint import (
    Checkpoint,
    OutputTensor,
    ShardLayout,
    check_output_folder,
    find_side_files,
    locate,
    open_checkpoint,
    plan_shards,
    tie_flag,
)
from merge_engine.errors import CheckpointError, PlanError
from merge_engine.fit import examine, unused_settings
from merge_engine.methods import Action, Method, Task, find_method
from merge_engine.planning.inputs import Catalogue
from merge_engine.planning.loadable import check_loadable
from merge_engine.planning.tasks import make_tasks
from merge_engine.recipe import ModelReference, Recipe
from merge_engine.storage import File
from merge_engine.text import shown, some
from merge_engine.vocabulary import Alignment, plan_vocabulary


@dataclass(frozen=True)
class Input:
    """One input of a merge: its path, its fingerprint when its headers were read, and its config.json as a mapping.

    ``fingerprint`` changes when the checkpoint is rewritten. It follows from ``contents``, each weight file with a
    digest of its header (see ``Checkpoint``).
    """

    path: Path
    fingerprint: str
    config: Mapping[str, object]
    contents: tuple[tuple[File, str], ...] = ()


@dataclass(frozen=True)
class SideEdits:
    """Files beside the weights that the output has otherwise than the donor: ``written`` by name, and ``dropped``."""

    written: Mapping[str, bytes] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MergePlan:
    """A merge without problems: every output tensor has its inputs and its place.

    ``tasks`` are in the order of the donor's files. ``base`` is None for methods without one. ``models`` are by
    recipe position, from 0. The output gets tokenizer and config of the ``donor``, whose config here lacks the keys
    that are wrong for the output. ``untied`` says that the output has a head of its own although the config may tie
    it to the embedding. ``edits`` are the files that it has otherwise than the donor. ``notes`` are messages for the
    user, ``warnings`` say what may be wrong with these inputs. ``copies`` are the positions of the models that are
    copies of the base, of which a warning tells.
    """

    recipe: Recipe
    method: Method
    base: Input | None
    models: Mapping[int, Input]
    donor: Input
    tasks: tuple[Task, ...]
    shards: tuple[ShardLayout, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    untied: bool = False
    copies: frozenset[int] = frozenset()
    edits: SideEdits = field(default_factory=SideEdits)

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
    def shard_of(self) -> Mapping[str, int]:
        """The number of the shard, from 0, by the name of a tensor in it."""
        return {name: number for number, shard in enumerate(self.shards) for name in shard.tensors}

    def only(self, *shards: int) -> MergePlan:
        """The part of the plan that makes some shards.

        ``shards`` are their numbers, from 0; ``IndexError`` if there is none.
        """
        made = tuple(self.shards[shard] for shard in shards)
        names = {name for shard in made for name in shard.tensors}
        return replace(self, tasks=tuple(task for task in self.tasks if task.name in names), shards=made)


def make_plan(recipe: Recipe, output: Path | None, *, shard_size: int, overwrite: bool = False) -> MergePlan:
    """Plan the merge of a recipe into a folder (None: into memory). ``shard_size`` in bytes.

    Raises ``RecipeError`` for an unknown method or wrong parameters, ``CheckpointError`` for inputs that cannot be
    read, and ``PlanError`` with every other problem at once.
    """
    method = find_method(recipe.merge_method)
    if unsupported := _unsupported(recipe):
        raise PlanError(unsupported)
    opened = _open_all(recipe)
    base = None
    if method.uses_base:
        if recipe.base_model is None:
            raise PlanError(
                [f"{method.name} needs a base_model: add the model that the others were tuned from"]
            )
        base = opened[recipe.base_model]
    models = {i: opened[model] for i, model in enumerate(recipe.stacks.models)}
    if base is not None:  # a base listed among the models is still the base, however its path is written
        models = {i: model for i, model in models.items() if model.file_ids != base.file_ids}
    named_donor = recipe.base_model or recipe.stacks.models[0]
    donor = opened[named_donor]
    catalogues = {i: _catalogue(model, i) for i, model in models.items()}
    of_donor = next((catalogues[i] for i, model in models.items() if model is donor), _catalogue(donor))
    vocabulary, unaligned = _vocabulary(recipe, opened, named_donor)
    planned = make_tasks(
        recipe, method, None if base is None else _catalogue(base), catalogues, of_donor, vocabulary
    )
    order = {name: place for place, name in enumerate(donor.tensors)}
    tasks = sorted(planned.tasks, key=lambda task: order.get(task.name, len(order)))
    shards = plan_shards([OutputTensor(task.name, task.out, task.shape) for task in tasks], shard_size)
    findings = examine(recipe, base, models, donor)
    explained = findings.explain_tensors or unaligned
    problems = [*findings.problems, *unaligned, *([] if explained else planned.problems)]
    config: Mapping[str, object] = _without(donor.config, findings.stale_keys)
    edits = SideEdits()
    if vocabulary is not None:
        config, edits = vocabulary.finish(config), SideEdits(vocabulary.written, vocabulary.dropped)
        problems += vocabulary.remarks.problems
        findings.notes += vocabulary.remarks.notes
        findings.warnings += vocabulary.remarks.warnings
    loadable = check_loadable([task.name for task in tasks], donor.tensors, donor.config)
    warnings = [*findings.warnings, *planned.warnings, *loadable]
    if output is not None:
        try:
            warnings += find_side_files(donor.path).warnings
        except CheckpointError as error:
            problems += error.problems
        folders = [checkpoint.path for checkpoint in opened.values()]
        problems += check_output_folder(output, folders, overwrite, sum(shard.size for shard in shards))
    if problems:
        raise PlanError(problems)
    unused = unused_settings(recipe, method, models.keys(), [task.name for task in tasks])
    inputs = {id(checkpoint): _input(checkpoint) for checkpoint in opened.values()}
    return MergePlan(
        recipe,
        method,
        None if base is None else inputs[id(base)],
        {i: inputs[id(model)] for i, model in models.items()},
        replace(inputs[id(donor)], config=config),
        tuple(tasks),
        tuple(shards),
        (*_ignored_keys(recipe), *_repeated(models), *findings.notes, *planned.notes),
        (*warnings, *unused),
        planned.untied and tie_flag(donor.config) is not False,
        findings.copies,
        edits,
    )


def measuring(plan: MergePlan, method: Method) -> MergePlan:
    """A plan for the tensors that ``plan`` merges: it answers the needs of ``method`` and writes nothing."""
    tasks = tuple(replace(task, action=Action.MEASURE) for task in plan.tasks if task.action is Action.MERGE)
    return replace(plan, method=method, tasks=tasks, shards=())


def _open_all(recipe: Recipe) -> dict[ModelReference, Checkpoint]:
    """Open every input once, even if the recipe names it several times."""
    opened: dict[ModelReference, Checkpoint] = {}
    problems = []
    for reference in recipe.references:
        try:
            opened[reference] = open_checkpoint(locate(reference.path, reference.revision))
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    return opened


def _vocabulary(
    recipe: Recipe, opened: Mapping[ModelReference, Checkpoint], donor: ModelReference
) -> tuple[Alignment | None, list[str]]:
    """What the recipe says of vocabularies, or the problems of the inputs' tokenizers."""
    try:
        return plan_vocabulary(recipe, opened, donor), []
    except CheckpointError as error:
        return None, error.problems


def _unsupported(recipe: Recipe) -> list[str]:
    """A line for each part of the recipe that cannot be done yet."""
    slices = list(recipe.stacks.slices)
    keys = [key for key in ("chat_template",) if getattr(recipe, key) is not None]
    if len(slices) > 1 or any(source.layers is not None for source in slices[0].sources):
        keys.append("slices")
    return [f"{shown(key)} is not supported yet" for key in keys]


def _ignored_keys(recipe: Recipe) -> list[str]:
    return [f'the key "{key}" is ignored: no result depends on it' for key in recipe.ignored]


def _repeated(models: Mapping[int, Checkpoint]) -> list[str]:
    """A note for each model that is listed several times."""
    places: dict[object, list[int]] = {}
    for i, model in models.items():
        places.setdefault(model.file_ids, []).append(i)
    return [
        f"{models[same[0]].path} is merged more than once, as {some([f'models[{i}]' for i in same])}"
        for same in places.values()
        if len(same) > 1
    ]


def _input(checkpoint: Checkpoint) -> Input:
    return Input(checkpoint.path, checkpoint.fingerprint, checkpoint.config, checkpoint.contents)


def _without(config: Mapping[str, object], keys: Collection[str]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in keys}


def _catalogue(checkpoint: Checkpoint, position: int | None = None) -> Catalogue:
    return Catalogue(str(checkpoint.path), checkpoint.tensors, tie_flag(checkpoint.config), position)
