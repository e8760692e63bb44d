"""Plans, progress and results for people."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from merge_engine.engine.ledger import Stage
from merge_engine.engine.plan import Plan
from merge_engine.engine.result import MergeResult


class Progress:
    """A bar with throughput and time left on a terminal, nothing elsewhere."""

    def __init__(self, console: Console):
        self._bar = RichProgress(
            TextColumn("merging"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def start(self, plan: Plan) -> None:
        """The work is known."""
        self._task = self._bar.add_task("merge", total=plan.bytes_read)

    def advance(self, nbytes: int) -> None:
        """So many more bytes of input are done."""
        if self._task is not None:
            self._bar.advance(self._task, nbytes)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def pairs(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Two columns."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for left, right in rows:
        table.add_row(left, Text(right))
    console.print(table)


def plan(console: Console, planned: Plan) -> None:
    """What a merge would do."""
    elements = sum(tensor.count for shard in planned.shards for tensor in shard.tensors.values())
    streamed = sum(planned.chunk_elements(job) < job.count for job in planned.jobs)
    rows = [
        ("method", planned.method.name),
        ("base", str(planned.base.path) if planned.base is not None else "none"),
        *((f"model {i}", str(model.path)) for i, model in planned.models.items()),
        ("config and tokenizer", str(planned.donor.path)),
        ("tensors", f"{len(planned.jobs):,} with {elements:,} elements; {streamed:,} streamed in pieces"),
        ("read", _gigabytes(planned.bytes_read)),
        ("write", f"{_gigabytes(planned.bytes_written)} in {len(planned.shards):,} file(s)"),
        ("memory", f"{planned.ring_bytes / 2**20:,.0f} MiB of tensor data at a time"),
        *(("note", note) for note in planned.notes),
    ]
    pairs(console, rows)


def result(console: Console, merged: MergeResult) -> None:
    """What a merge did."""
    if merged.counts:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in (
            "model",
            "kept",
            "lost to the election",
            "saved by trim slack",
            "saved by sign slack",
        ):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for model, c in merged.counts.items():
            lost = f"{c.lost:,} ({c.lost / c.kept:.1%})" if c.kept else "0"
            table.add_row(
                Text(merged.models[model]),
                f"{c.kept:,}",
                lost,
                f"{c.saved_by_trim:,}",
                f"{c.saved_by_sign:,}",
            )
        console.print(table)
    ledger = merged.ledger
    rows = [(name, _stage(stage)) for name, stage in ledger.stages().items()]
    rows += [("note", note) for note in merged.notes]
    rows.append(("merged", f"{merged.output} in {ledger.seconds:.2f} s"))
    pairs(console, rows)


def _stage(stage: Stage) -> str:
    if not stage.bytes:
        return f"{stage.seconds:.2f} s"
    rate = stage.bytes / stage.seconds / 1e9 if stage.seconds else 0.0
    return f"{_gigabytes(stage.bytes)}, busy {stage.seconds:.2f} s, {rate:.2f} GB/s"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3f} GB"
