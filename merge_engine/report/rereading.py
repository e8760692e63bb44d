"""Read the inputs of a finished merge once more, to measure what its manifest does not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merge_engine.engine.carrying import carry_out
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.sinks import Target
from merge_engine.errors import ReportError
from merge_engine.methods import Answers, Method, Task
from merge_engine.planning import MergePlan, Schedule, make_plan, measuring
from merge_engine.recipe import ModelReference, Recipe
from merge_engine.report.record import Record
from merge_engine.text import some


def plan_again(record: Record) -> MergePlan:
    """The plan of a finished merge, from the inputs where it found them.

    Raises ``ReportError`` if an input is no longer at its path or has been rewritten, and other ``MergeError`` if it
    cannot be read.
    """
    merge = make_plan(at_paths(record), None, shard_size=2**62)
    for given in (*merge.bases.values(), *merge.models.values()):
        if record.inputs[given.label].fingerprint != given.fingerprint:
            raise ReportError(f"{given.label}: has been rewritten since it was merged")
    return merge


def measure_all(
    merge: MergePlan,
    method: Method,
    answered: Callable[[Task, Answers], None],
    on_schedule: Callable[[Schedule], None] = lambda schedule: None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Read the inputs of a plan as a merge does, and answer the needs of ``method``.

    ``answered`` is called with each tensor and its answers. For ``on_schedule`` and ``progress`` see ``run``.
    """
    plan = measuring(merge, method)
    backend = choose_backend(plan, None)
    with open_access(plan, backend) as access:
        schedule = schedule_for(plan, access, backend)
        on_schedule(schedule)
        carry_out(schedule, backend, access, [Target()], progress, answered)


def at_paths(record: Record) -> Recipe:
    """The recipe with the local paths of its inputs, so that a name on the hub is not downloaded again."""
    labels = {role: label for label, entry in record.inputs.items() for role in entry.roles}
    paths = {role: record.inputs[label].paths(label) for role, label in labels.items()}
    if removed := sorted({pair[0] for pair in paths.values()} & record.removed):
        raise ReportError(f"{some(removed)}: made by other recipes and removed; --intermediate-dir keeps it")
    missing = [
        path for pair in paths.values() for path in pair if path is not None and not Path(path).exists()
    ]
    if missing:
        raise ReportError(
            f"{missing[0]}: no longer there, seen from the folder that this command is started in"
        )
    stacks = record.recipe.stacks
    if not {*stacks.bases, *map(str, record.labels)} <= paths.keys():
        raise ReportError("the manifest does not say which input was what")
    # A model without a role of its own is a base, which the recipe also lists as a model.
    base = _reference(*paths["base"])
    models = {
        model: _reference(*paths[str(i)]) if str(i) in paths else base
        for i, model in enumerate(stacks.models)
    }
    bases = {model: _reference(*paths[role]) for role, model in stacks.bases.items()}
    return record.recipe.replacing(models | bases)


def _reference(path: str, lora: str | None) -> ModelReference:
    return ModelReference(path=path, lora=None if lora is None else ModelReference(path=lora))
