"""The plan of a merge: every output tensor, the place of every output byte, and every problem.

Only headers and configs are read, and heads that may be copies of the embedding. Nothing is written. A plan never
changes. It holds no open file and can be sent to another process. Memory and devices are decided by the schedule.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from merge_engine.checkpoint import (
    Checkpoint,
    OutputTensor,
    ShardLayout,
    check_output_folder,
    locate,
    open_checkpoint,
    plan_shards,
    tie_flag,
)
from merge_engine.errors import CheckpointError, PlanError
from merge_engine.fit import examine
from merge_engine.methods import Action, Method, Task, find_method
from merge_engine.planning.inputs import Catalogue
from merge_engine.planning.tasks import make_tasks
from merge_engine.recipe import ModelReference, Recipe
from merge_engine.storage import File


@dataclass(frozen=True)
class Input:
    """One input of a merge: its path, its fingerprint when its headers were read, and its config.json as a mapping.

    ``fingerprint`` changes when the checkpoint is rewritten (see ``Checkpoint.fingerprint``).
    """

    path: Path
    fingerprint: str
    config: Mapping[str, object]


@dataclass(frozen=True)
class MergePlan:
    """A merge without problems: every output tensor has its inputs and its place.

    ``tasks`` are in the order of the donor's files. ``base`` is None for methods without one. ``models`` are by
    recipe position, from 0. The output gets config and tokenizer of the ``donor``. ``untied`` says that the output
    has a head of its own although the config may tie it to the embedding. ``notes`` are messages for the user,
    ``warnings`` say what may be wrong with these inputs.
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

    def only(self, shard: int) -> MergePlan:
        """The part of the plan that makes one shard.

        ``shard`` is its number, from 0; ``IndexError`` if there is none.
        """
        names = self.shards[shard].tensors.keys()
        return replace(
            self,
            tasks=tuple(task for task in self.tasks if task.name in names),
            shards=(self.shards[shard],),
        )


def make_plan(recipe: Recipe, output: Path | None, *, shard_size: int, overwrite: bool = False) -> MergePlan:
    """Plan the merge of a recipe into a folder (None: into memory). ``shard_size`` in bytes.

    Raises ``RecipeError`` for an unknown method or wrong parameters, ``CheckpointError`` for inputs that cannot be
    read, and ``PlanError`` with every other problem at once.
    """
    method = find_method(recipe.merge_method)
    opened = _open_all(recipe)
    base = None
    if method.uses_base:
        if recipe.base_model is None:
            raise PlanError(
                [f"{method.name} needs a base_model: add the model that the others were tuned from"]
            )
        base = opened[recipe.base_model]
    models = {i: opened[entry.model] for i, entry in enumerate(recipe.models)}
    if base is not None:  # a base listed among the models is still the base
        models = {i: model for i, model in models.items() if model is not base}
    donor = opened[recipe.base_model or recipe.models[0].model]
    catalogues = {i: _catalogue(model, i) for i, model in models.items()}
    of_donor = next((catalogues[i] for i, model in models.items() if model is donor), _catalogue(donor))
    planned = make_tasks(recipe, method, None if base is None else _catalogue(base), catalogues, of_donor)
    order = {name: place for place, name in enumerate(donor.tensors)}
    tasks = sorted(planned.tasks, key=lambda task: order.get(task.name, len(order)))
    shards = plan_shards([OutputTensor(task.name, task.out, task.shape) for task in tasks], shard_size)
    findings = examine(recipe, base, models, donor)
    problems = [*findings.problems, *planned.problems]
    if output is not None:
        folders = [checkpoint.path for checkpoint in opened.values()]
        problems += check_output_folder(output, folders, overwrite, sum(shard.size for shard in shards))
    if problems:
        raise PlanError(problems)
    inputs = {id(checkpoint): _input(checkpoint) for checkpoint in opened.values()}
    return MergePlan(
        recipe,
        method,
        None if base is None else inputs[id(base)],
        {i: inputs[id(model)] for i, model in models.items()},
        inputs[id(donor)],
        tuple(tasks),
        tuple(shards),
        tuple(planned.notes),
        (*findings.warnings, *planned.warnings),
        planned.untied and tie_flag(donor.config) is not False,
    )


def measuring(plan: MergePlan, method: Method) -> MergePlan:
    """A plan for the tensors that ``plan`` merges: it answers the needs of ``method`` and writes nothing."""
    tasks = tuple(replace(task, action=Action.MEASURE) for task in plan.tasks if task.action is Action.MERGE)
    return replace(plan, method=method, tasks=tasks, shards=())


def _open_all(recipe: Recipe) -> dict[ModelReference, Checkpoint]:
    """Open every input once, even if the recipe names it several times."""
    opened: dict[ModelReference, Checkpoint] = {}
    problems = []
    references = [entry.model for entry in recipe.models]
    if recipe.base_model is not None:
        references.insert(0, recipe.base_model)
    for reference in dict.fromkeys(references):
        try:
            opened[reference] = open_checkpoint(locate(reference.path, reference.revision))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return opened


def _input(checkpoint: Checkpoint) -> Input:
    return Input(checkpoint.path, checkpoint.fingerprint, checkpoint.config)


def _catalogue(checkpoint: Checkpoint, position: int | None = None) -> Catalogue:
    return Catalogue(str(checkpoint.path), checkpoint.tensors, tie_flag(checkpoint.config), position)
