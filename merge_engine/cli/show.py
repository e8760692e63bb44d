"""Plans, progress and results for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from merge_engine.engine.limits import Limits
from merge_engine.engine.plan import Plan
from merge_engine.engine.usage import Usage
from merge_engine.observe.ledger import Stage
from merge_engine.observe.result import MergeResult

MEASURE = "`merge-engine doctor --measure FOLDER`"


class Progress:
    """A bar with throughput and time left on a terminal, nothing elsewhere."""

    def __init__(self, console: Console, doing: str = "merging"):
        self._bar = RichProgress(
            TextColumn(doing),
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


def plan(console: Console, planned: Plan, predicted: Usage) -> None:
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
        ("memory", f"{sum(planned.ring_bytes) / 2**20:,.0f} MiB of tensor data at a time"),
        *_usage(predicted),
        ("time", _expected(predicted)),
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
    if merged.usage is not None:
        rows += _usage(merged.usage)
    predicted = merged.predicted.seconds if merged.predicted is not None else None
    against = f" (predicted: {predicted:.2f} s)" if predicted is not None else ""
    rows.append(("merged", f"{merged.output} in {ledger.seconds:.2f} s{against}"))
    pairs(console, rows)


def limits(console: Console, folder: Path, found: Limits) -> None:
    """What a machine can do at best."""
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


def _expected(predicted: Usage) -> str:
    if predicted.seconds is None:
        return "not known until a first run of this kind on this machine, once its limits are measured"
    return (
        f"{predicted.seconds:.2f} s, if this machine computes as fast as it did in the last run of this kind"
    )


def _usage(usage: Usage) -> list[tuple[str, str]]:
    """What a merge uses of each resource, the floor, and what decides its time."""
    shares = usage.shares()
    rows = []
    for resource in usage.resources:
        if resource.limit is None or not resource.bytes:
            continue
        share = f"{shares[resource.name]:.0%} of its limit, " if resource.name in shares else ""
        rows.append(
            (
                resource.name,
                f"{share}{_gigabytes(resource.bytes)} at {resource.limit / 1e9:.2f} GB/s take {resource.seconds:.2f} s",
            )
        )
    if usage.floor is None:
        return [*rows, ("floor", f"not known; {MEASURE} measures this machine once, in seconds")]
    rows.append(("floor", f"{usage.floor:.2f} s"))
    if shares:
        bound = usage.bound_by
        busy = f", busy {shares[bound]:.0%} of the time" if bound in ("compute", "digest") else ""
        rows.append(("bound by", f"{bound or 'nothing alone'}{busy}"))
    return rows


def _stage(stage: Stage) -> str:
    if not stage.bytes:
        return f"{stage.seconds:.2f} s" if stage.seconds else "nothing"
    rate = stage.bytes / stage.seconds / 1e9 if stage.seconds else 0.0
    return f"{_gigabytes(stage.bytes)}, busy {stage.seconds:.2f} s, {rate:.2f} GB/s"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.3f} GB"
