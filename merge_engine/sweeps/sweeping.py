"""Merge many recipes over the same inputs from one reading of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from merge_engine.arguments import path_of, switch_of, threads_of
from merge_engine.backends import Backend
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE
from merge_engine.engine.carrying import Progress, carry_out
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.collecting import seldom_collected
from merge_engine.engine.made_before import result_of_made
from merge_engine.engine.publishing import result_of
from merge_engine.engine.run import naming_memory, parse_memory, plan_options
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.sinks import FunctionSink, Receiver, Target
from merge_engine.engine.to_folders import merge_to_folders
from merge_engine.errors import OptionError, OutputError, ReportError
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult
from merge_engine.operands import Access
from merge_engine.planning import Schedule
from merge_engine.recipe import Recipe, RecipeSource
from merge_engine.sweeps.grids import Grid
from merge_engine.sweeps.planning import SweepPlan, plan_sweep
from merge_engine.sweeps.recipes import Member, in_folders, read_members
from merge_engine.sweeps.result import SweepResult

if TYPE_CHECKING:
    import torch

Recipes: TypeAlias = Mapping[str, RecipeSource] | Sequence[RecipeSource]
Outputs: TypeAlias = "str | Path | Sequence[str | Path] | Callable[[str, str, torch.Tensor], object]"

_WHOLE_MODEL = 2**62
"""A size of output files that puts all tensors into one: then they come in the order of the inputs."""


def sweep(
    recipes: Recipes,
    outputs: Outputs,
    *,
    report: bool = True,
    norms: bool = False,
    device: str = "auto",
    backend: str | Backend = "auto",
    threads: int | None = None,
    memory: int | str | None = None,
    shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    lenient: bool = False,
    on_schedule: Callable[[Schedule], None] | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Merge recipes over the same inputs, which are read once for all of them.

    ``recipes`` are a ``grid``, a mapping of labels to recipes, or a list of recipes. ``outputs``: a folder that gets a
    folder for each recipe, named after its label; a list of folders, one for each recipe; or a function that is called
    with each merged tensor: ``outputs(label, name, tensor)``. The function gets new tensors on the CPU that it may
    keep. It is called from one thread at a time, which is not the caller's; an exception that it raises ends the sweep
    and is raised. ``report`` writes a page that shows the recipes side by side into the folder; ``norms`` puts norms of
    task vectors on it, from one more reading for each recipe. For the other options see ``run``; ``memory`` is that of
    all outputs together.

    The bytes and the counts are those of single runs. An error ends the work for all recipes; outputs that are complete
    stay, and the same call goes on from what is complete.

    Raises ``MergeError`` as ``run`` does, before anything is read or written for all that is wrong with the recipes:
    also for recipes whose inputs differ.
    """
    with seldom_collected, naming_memory():
        options = plan_options(shard_size, overwrite, lenient)
        threads, budget, report = threads_of(threads), parse_memory(memory), switch_of("report", report)
        read = read_members(recipes, options["lenient"])
        members, home = _members(read, outputs)
        if switch_of("norms", norms) and not (report and home):
            raise OptionError("norms: stand on the page of a sweep, and this one writes none")
        if callable(outputs):
            options["shard_size"] = _WHOLE_MODEL
        planned = plan_sweep(members, **options)
        found = {
            number: result_of_made(planned.plans[number], folder)
            for number in planned.complete
            if (folder := members[number].folder) is not None
        }
        ledger = Ledger()
        if missing := planned.missing:
            first, *beside = (planned.plans[number] for number in missing)
            notes: list[str] = []
            chosen = choose_backend(first, members[missing[0]].folder, backend, threads, device, notes)
            with open_access(first, chosen, beside) as access:
                scheduled = schedule_for(
                    first, access, chosen, budget, beside=beside, whole_outputs=callable(outputs)
                )
                if on_schedule is not None:
                    on_schedule(scheduled)
                done = (
                    _to_function(planned, scheduled, outputs, chosen, access, notes, progress)
                    if callable(outputs)
                    else _to_folders(planned, scheduled, chosen, access, notes, progress, overwrite)
                )
            found |= dict(zip(missing, done, strict=True))
            ledger = _together(done)
    result = SweepResult(
        {member.label: found[number] for number, member in enumerate(members)},
        read,
        recipes.changes if isinstance(recipes, Grid) else {},
        ledger,
        home,
        tuple(members[number].label for number in sorted(planned.complete)),
    )
    if report and home is not None:
        try:
            result.page, _ = result.write_page(norms=norms)
        except (ReportError, OutputError) as error:  # matplotlib is an extra, and the models are there
            result.notes += error.problems
    return result


def _members(recipes: Mapping[str, Recipe], outputs: Outputs) -> tuple[list[Member], Path | None]:
    """The recipes with their places, and the folder that holds all of these, if there is one."""
    if callable(outputs):
        return [Member(label, recipe) for label, recipe in recipes.items()], None
    if isinstance(outputs, Sequence) and not isinstance(outputs, str):
        return in_folders(recipes, [path_of("outputs", each) for each in outputs]), None
    home = path_of("outputs", outputs)
    return in_folders(recipes, home), home


def _to_folders(
    planned: SweepPlan,
    scheduled: Schedule,
    backend: Backend,
    access: Access,
    notes: Sequence[str],
    progress: Progress | None,
    overwrite: bool,
) -> list[MergeResult]:
    members = [planned.members[number] for number in planned.missing]
    return merge_to_folders(
        scheduled,
        [member.folder for member in members if member.folder is not None],
        backend,
        access,
        notes,
        progress,
        overwrite,
        labels=[member.label for member in members],
    )


def _to_function(
    planned: SweepPlan,
    scheduled: Schedule,
    function: Callable[[str, str, torch.Tensor], object],
    backend: Backend,
    access: Access,
    notes: Sequence[str],
    progress: Progress | None,
) -> list[MergeResult]:
    receiver = Receiver(function)
    labels = [member.label for member in planned.members]
    sinks = [FunctionSink(plan, label, receiver) for plan, label in zip(planned.plans, labels, strict=True)]
    targets = [Target(sink) for sink in sinks]
    runs = carry_out(scheduled, backend, access, targets, progress, labels=labels)
    for sink in sinks:
        sink.finish()
    return [
        result_of(run.plan, run.results, run.trimmed_to, deepcopy(run.ledger), [*notes, *run.notes])
        for run in runs
    ]


def _together(results: Sequence[MergeResult]) -> Ledger:
    """The ledger of all recipes, which were merged at the same time and published one after the other."""
    ledger = deepcopy(results[0].ledger)
    for result in results[1:]:
        ledger.publish.seconds += result.ledger.publish.seconds
        ledger.seconds += result.ledger.publish.seconds
    return ledger
