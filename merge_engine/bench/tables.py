"""Results as tables for the terminal."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from merge_engine.bench.contestants import COPY, MERGEKIT
from merge_engine.bench.fit import Line, fit_line, median_seconds
from merge_engine.bench.measuring import Measurement
from merge_engine.bench.suite import Result


def case_table(result: Result) -> Table:
    """A column for each contestant."""
    runs = result.runs
    table = Table("", *runs)
    for column in table.columns[1:]:
        column.justify = "right"
    moved = result.merge.bytes_read + result.merge.bytes_written
    medians = {name: median_seconds(measured) for name, measured in runs.items()}

    def row(label: str, value: Callable[[list[Measurement]], float], digits: int = 2) -> None:
        table.add_row(label, *(f"{value(measured):,.{digits}f}" for measured in runs.values()))

    def median_row(label: str, field: str, unit: float) -> None:
        row(label, lambda measured: statistics.median(getattr(run, field) for run in measured) / unit)

    def most_row(label: str, field: str) -> None:
        row(label, lambda measured: max(getattr(run, field) for run in measured) / 2**20, 0)

    row("runs", len, 0)
    row("median seconds", median_seconds)
    row("least seconds", lambda measured: min(run.seconds for run in measured))
    row("most seconds", lambda measured: max(run.seconds for run in measured))
    if result.floor:
        floor = result.floor
        row(f"times the floor of {floor:.2f} s", lambda measured: median_seconds(measured) / floor)
    if COPY in medians:
        row("times the copy", lambda measured: median_seconds(measured) / medians[COPY])
    if MERGEKIT in medians:
        row("times faster than mergekit", lambda measured: medians[MERGEKIT] / median_seconds(measured))
    row("input + output, GB/s", lambda measured: moved / median_seconds(measured) / 1e9)
    median_row("CPU seconds", "cpu_seconds", 1)
    most_row("own memory, MiB", "peak_memory")
    most_row("with mapped files, MiB", "peak_resident")
    median_row("read from storage, GB", "disk_read", 1e9)
    median_row("written, GB", "disk_written", 1e9)
    return table


def fits(results: Iterable[Result]) -> dict[tuple[str, str, str], Line]:
    """The line of time over bytes by (method, state of the page cache, contestant), where there are enough."""
    points: defaultdict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        moved = result.merge.bytes_read + result.merge.bytes_written
        for name, measured in result.runs.items():
            key = (result.case.method, result.case.cache, name)
            points[key].append((moved, median_seconds(measured)))
    lines = {key: fit_line(values) for key, values in points.items()}
    return {key: line for key, line in lines.items() if line is not None}


def fit_table(results: Sequence[Result]) -> Table | None:
    """The lines of time over bytes as a table. None if there are too few cases for a line."""
    lines = fits(results)
    if not lines:
        return None
    table = Table("method", "cache", "", title="seconds = start + bytes / rate", title_justify="left")
    for heading in ("start, s", "rate, GB/s", "R squared"):
        table.add_column(heading, justify="right")
    for key, line in lines.items():
        table.add_row(*key, f"{line.start:.2f}", f"{line.rate / 1e9:.3f}", f"{line.r_squared:.4f}")
    return table
