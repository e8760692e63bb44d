"""Tables and a progress bar for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from merge_engine.backends import Backend
from merge_engine.cli.terminal import cell, say
from merge_engine.engine.over_link import STAGING
from merge_engine.observe.ledger import Ledger, Stage
from merge_engine.observe.result import MergeResult
from merge_engine.planning import Input, MergePlan, Schedule, named
from merge_engine.storage import Way
from merge_engine.text import printable, size_text, without_common_folder

if TYPE_CHECKING:
    from merge_engine.bench.limits import Limits

MEASURE = "`merge-engine doctor --measure FOLDER`"


class Progress:
    """A bar with throughput and time left on a terminal, nothing elsewhere."""

    def __init__(self, console: Console, doing: str = "merging", shown: bool = True):
        self._bar = RichProgress(
            TextColumn(doing),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task: TaskID | None = None

    def start(self, schedule: Schedule) -> None:
        """Show the bar for the work of a schedule."""
        self.start_bytes(schedule.bytes_read)

    def start_bytes(self, nbytes: int) -> None:
        """Show the bar for so many bytes."""
        if self._task is not None:  # of a recipe before
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("merge", total=nbytes)

    def advance(self, nbytes: int) -> None:
        """Move the bar by ``nbytes`` of input."""
        if self._task is not None:
            self._bar.advance(self._task, nbytes)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def warnings(lines: Iterable[str]) -> None:
    """Print warnings to stderr, one line each."""
    say("warning", lines)


def lines(console: Console, texts: Iterable[str]) -> None:
    """Print texts as they are, each on a line of its own, however long."""
    for text in texts:
        console.print(Text(printable(text)), soft_wrap=True)


def pairs(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print a table of two columns."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for left, right in rows:
        table.add_row(left, cell(right))
    console.print(table)


def plan(
    console: Console,
    schedule: Schedule,
    output: Path | None,
    way: Way,
    backend: Backend | type[Backend],
    notes: Iterable[str],
) -> None:
    """Print a schedule: inputs, output, bytes, memory and the floor."""
    planned = schedule.plan
    elements = sum(task.count for task in planned.tasks)
    streamed = sum(schedule.chunk_elements(task) < task.count for task in schedule.tasks)
    past = " past the page cache" if way == "direct" else " in place" if schedule.budget.in_place else ""
    rows = [
        *([("recipe", planned.recipe.name)] if planned.recipe.name is not None else []),
        ("method", planned.method.name),
        ("base", ", ".join(_path(base, planned) for base in planned.bases.values()) or "none"),
        *((f"model {i}", _path(model, planned)) for i, model in planned.models.items()),
        ("config and tokenizer", _path(planned.donor, planned)),
        ("tensors", f"{len(planned.tasks):,} with {elements:,} elements; {streamed:,} streamed in pieces"),
        ("backend", backend.name),
        ("read", f"{size_text(schedule.bytes_read)}{past}"),
        *_link(schedule, backend),
        ("write", f"{size_text(planned.bytes_written)} in {len(planned.shards):,} file(s)"),
        ("memory", _memory(schedule, backend)),
        *_floor(schedule, output, way, backend),
        *(("note", note) for note in (*planned.notes, *notes)),
    ]
    pairs(console, rows)


def result(console: Console, merged: MergeResult) -> None:
    """Print the counts and the ledger of a merge."""
    if merged.counts:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("model", overflow="fold")
        for heading in ("kept", "lost to the election", "saved by trim slack", "saved by sign slack"):
            table.add_column(heading, justify="right", overflow="fold")
        labels = without_common_folder([merged.models[model] for model in merged.counts])
        for label, c in zip(labels, merged.counts.values(), strict=True):
            lost = f"{c.lost:,} ({c.lost / c.kept:.1%})" if c.kept else "0"
            table.add_row(
                cell(label),
                f"{c.kept:,}",
                lost,
                f"{c.saved_by_trim:,}",
                f"{c.saved_by_sign:,}",
            )
        console.print(table)
    ledger = merged.ledger
    rows = stages(ledger)
    rows += [("note", note) for note in merged.notes]
    rows.append(("bound by", ledger.bound_by or "nothing alone"))
    rows.append(("merged", f"{merged.output} in {ledger.seconds:.2f} s"))
    pairs(console, rows)


def stages(ledger: Ledger) -> list[tuple[str, str]]:
    """Rows for the stages of a merge."""
    return [(name, _stage(stage)) for name, stage in ledger.stages().items()]


def limits(console: Console, folder: Path, found: Limits) -> None:
    """Print the limits of this machine, with those of the disk of ``folder``."""
    disk = found.disk(folder)
    rates = [
        ("disk read", disk and disk.read),
        ("direct read", disk and disk.direct),
        ("page cache", disk and disk.cached),
        ("disk write", disk and disk.write),
        ("memory", found.memory),
        ("link to the device", found.link),
    ]
    pairs(console, [(name, f"{rate / 1e9:.2f} GB/s at best") for name, rate in rates if rate])


def _path(given: Input, planned: MergePlan) -> str:
    return named(given.label, planned.intermediates)


def _floor(
    schedule: Schedule, output: Path | None, way: Way, backend: Backend | type[Backend]
) -> list[tuple[str, str]]:
    """Rows for the least time of each resource, and the floor, if the limits of this machine were measured."""
    from merge_engine.bench.floor import floor, resources
    from merge_engine.bench.limits import load_limits

    limits = load_limits()
    if limits.memory is None:
        return [("floor", f"not known; {MEASURE} measures this machine once, in seconds")]
    found = resources(schedule, way, output, limits, backend)
    rows = [
        (
            resource.name,
            f"{size_text(resource.bytes)} at {resource.limit / 1e9:.2f} GB/s take {resource.seconds:.2f} s",
        )
        for resource in found
        if resource.limit is not None and resource.bytes
    ]
    seconds = floor(found)
    if seconds is None:
        return [*rows, ("floor", f"not known; {MEASURE} measures a disk once, in seconds")]
    return [*rows, ("floor", f"{seconds:.2f} s to move the bytes")]


def _link(schedule: Schedule, backend: Backend | type[Backend]) -> list[tuple[str, str]]:
    if not backend.has_link:
        return []
    return [("link", f"{size_text(schedule.bytes_up)} up, {size_text(schedule.bytes_down)} down")]


def _memory(schedule: Schedule, backend: Backend | type[Backend]) -> str:
    where = f" on the device, {STAGING / 2**20:,.0f} MiB on the host" if backend.has_link else ""
    return f"{sum(schedule.ring_bytes) / 2**20:,.0f} MiB of tensor data at a time{where}"


def _stage(stage: Stage) -> str:
    if not stage.bytes:
        return f"{stage.seconds:.2f} s" if stage.seconds else "nothing"
    rate = stage.bytes / stage.seconds / 1e9 if stage.seconds else 0.0
    return f"{size_text(stage.bytes)}, busy {stage.seconds:.2f} s, {rate:.2f} GB/s"
