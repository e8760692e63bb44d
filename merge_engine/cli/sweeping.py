"""``merge-engine sweep``: a recipe with every combination of some values, from one reading of the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from merge_engine.backends import backend_or_kind
from merge_engine.checkpoint import MANIFEST_NAME
from merge_engine.cli import show, terminal
from merge_engine.cli.interrupts import Interruptible
from merge_engine.cli.options import (
    SHARD_SIZE,
    BackendName,
    Device,
    Lenient,
    Memory,
    Overwrite,
    Quiet,
    RecipeFile,
    ShardSize,
    Threads,
)
from merge_engine.cli.terminal import cell, console
from merge_engine.engine.choosing import choose_device
from merge_engine.engine.run import parse_memory, plan_options
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.errors import OptionError, RecipeError
from merge_engine.observe.result import MergeResult, ModelCounts
from merge_engine.planning import Schedule
from merge_engine.recipe import load_recipe
from merge_engine.recipe.changes import parse_change
from merge_engine.sweeps import Grid, SweepResult, grid
from merge_engine.sweeps import sweep as merge_all
from merge_engine.sweeps.messages import with_labels
from merge_engine.sweeps.planning import SweepPlan, plan_sweep
from merge_engine.sweeps.recipes import in_folders
from merge_engine.sweeps.result import PAGE
from merge_engine.text import size_text


def sweep(
    recipe: RecipeFile,
    output: Annotated[
        Path, typer.Argument(readable=False, help="The folder that gets a folder for each recipe.")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE,...",
            help="Values of a parameter, of one model's (weight[1]), or of a key of the recipe. Repeat it: every "
            "combination is merged.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--plan", help="Show what would be merged, and merge nothing.")
    ] = False,
    device: Device = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    memory: Memory = None,
    shard_size: ShardSize = SHARD_SIZE,
    overwrite: Overwrite = False,
    lenient: Lenient = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write a page with all recipes.")
    ] = True,
    norms: Annotated[
        bool,
        typer.Option(
            "--norms", help="Show norms of task vectors on the page: reads inputs and outputs again."
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Merge a recipe with every combination of some values, from one reading of the inputs."""
    made = _grid(recipe, changes or [], lenient)
    if dry_run:
        planned = plan_sweep(in_folders(made, output), **plan_options(shard_size, overwrite, lenient))
        _show_plan(made, planned, device, backend, threads, memory)
        return
    folders = [member.folder or output for member in in_folders(made, output)]
    last = output / PAGE if report else folders[-1] / MANIFEST_NAME
    warned: set[str] = set()

    def warn(lines: Iterable[str]) -> None:
        new = [line for line in dict.fromkeys(lines) if line not in warned]
        show.warnings(new)
        warned.update(new)

    def start(schedule: Schedule) -> None:
        others = [set(plan.warnings) for plan in schedule.plans]
        warn(line for line in schedule.plan.warnings if all(line in other for other in others))
        progress.start(schedule)

    with Interruptible(last) as interruptible:
        with show.Progress(console, shown=not quiet) as progress:
            result = merge_all(
                made,
                output,
                report=report,
                norms=norms,
                device=device,
                backend=backend,
                threads=threads,
                memory=memory,
                shard_size=shard_size,
                overwrite=overwrite,
                lenient=lenient,
                on_schedule=start,
                progress=progress.advance,
            )
        interruptible.end()
        terminal.result_is_on_disk()
        merged = result.results.values()
        warn(with_labels(list(made), {i: each.warnings for i, each in enumerate(merged)}))
        if not quiet:
            _show_result(result)


def _grid(recipe: Path, changes: Sequence[str], lenient: bool) -> Grid:
    """The recipes that the options name. Raises ``OptionError`` with all problems of the options."""
    axes: dict[str, list[object]] = {}
    problems: list[str] = []
    for text in changes:
        try:
            name, values = parse_change(text)
        except RecipeError as error:
            problems += error.problems
            continue
        if name in axes:
            problems.append(f"{name}: is set twice; write --set {name}=VALUE,VALUE")
        axes[name] = values
    if not changes:
        problems.append("--set: name the values to merge with, such as --set density=0.2,0.5")
    if problems:
        raise OptionError(problems)
    return grid(load_recipe(recipe, lenient=lenient), **axes)


def _show_plan(
    made: Grid,
    planned: SweepPlan,
    device: str,
    backend: str,
    threads: int | None,
    memory: str | None,
) -> None:
    rows: list[tuple[str, str]] = []
    plans = [planned.plans[number] for number in planned.missing]
    if plans:
        first, *beside = plans
        notes: list[str] = []
        device_of = choose_device(first, planned.members[0].folder, backend, threads, device, notes)
        chosen = backend_or_kind(backend, threads, device_of, notes)
        with open_access(first, chosen, beside) as access:
            schedule = schedule_for(first, access, chosen, parse_memory(memory), beside=beside)
            rows = [
                ("backend", chosen.name),
                ("read", f"{size_text(schedule.bytes_read)} once for all"),
                ("write", f"{size_text(schedule.bytes_written)} in {len(plans):,} folder(s)"),
                *(("note", note) for note in notes),
            ]
        show.warnings(dict.fromkeys(line for plan in plans for line in plan.warnings))
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe", overflow="fold")
    table.add_column("output", overflow="fold")
    for number, member in enumerate(planned.members):
        there = " (complete)" if number in planned.complete else ""
        table.add_row(cell(member.label), cell(f"{member.folder}{there}"))
    console.print(table)
    show.pairs(console, [*rows, ("merge", f"{len(plans):,} of {len(made):,} recipe(s)")])


def _show_result(result: SweepResult) -> None:
    """A table of the recipes, with the counts of all models together, and the ledger."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe", overflow="fold")
    for heading in ("kept", "lost", "saved by slack"):
        table.add_column(heading, justify="right", overflow="fold")
    for label, merged in result.results.items():
        table.add_row(cell(label), *_shares(merged))
    console.print(table)
    count, ledger = len(result.results) - len(result.taken_over), result.ledger
    said = with_labels(list(result.results), {i: m.notes for i, m in enumerate(result.results.values())})
    rows = [*show.stages(ledger), *(("note", note) for note in (*said, *result.notes))]
    if result.taken_over:
        rows.append(("complete before", ", ".join(result.taken_over)))
    if result.page is not None:
        rows.append(("page", str(result.page)))
    each = f", {ledger.seconds / count:.2f} s each" if count else ""
    rows.append(("merged", f"{count:,} recipe(s) into {result.output} in {ledger.seconds:.2f} s{each}"))
    show.pairs(console, rows)


def _shares(merged: MergeResult) -> tuple[str, str, str]:
    """Kept entries of all models as a share of all their elements, lost and saved ones as a share of the kept."""
    total = sum(merged.counts.values(), start=ModelCounts())
    elements = sum(each.elements * len(each.counts) for each in merged.per_tensor)
    if not total.kept:
        return ("", "", "")
    return f"{total.kept / elements:.1%}", f"{total.lost_share:.1%}", f"{total.saved_share:.1%}"
