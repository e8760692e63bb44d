"""Merge the same checkpoints with merge_engine, mergekit and a bare copy, in turns.

    python -m benchmarks.compare --size 1.1b --methods ties,linear --rounds 5 --mergekit PATH/mergekit-yaml

The engines take turns, so that whatever else the machine does meets all of them, and medians are compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import cache_folder, input_files, make_checkpoints
from benchmarks.engines import (
    COPY,
    MERGE_ENGINE,
    MERGEKIT,
    MERGEKIT_VARIABLE,
    METHODS,
    Merge,
    check_output,
    command,
    engines,
)
from benchmarks.measuring import Measurement, cool, empty, measure, warm
from benchmarks.results import save
from benchmarks.shapes import ARCHITECTURES

Runs = dict[str, list[Measurement]]


def interleave(merge: Merge, work: Path, rounds: dict[str, int], mergekit: str | None, cold: bool) -> Runs:
    """Run every engine as often as ``rounds`` says, in turns. Returns the measurements by engine."""
    files = input_files(merge.folders)
    runs: Runs = {engine: [] for engine in rounds}
    try:
        for number in range(max(rounds.values())):
            for engine in (engine for engine, wanted in rounds.items() if number < wanted):
                empty(work)
                argv = command(engine, merge, work, mergekit)
                (cool if cold else warm)(files)
                runs[engine].append(measure(argv, work / "output"))
                check_output(engine, merge, work)
    finally:
        shutil.rmtree(work)
    return runs


def median_seconds(runs: Runs, engine: str) -> float | None:
    """Median time of an engine, None if it did not run."""
    return _median(runs[engine]) if runs.get(engine) else None


def summarise(merge: Merge, runs: Runs) -> dict[str, Any]:
    """Everything about one method, as plain numbers: seconds, bytes, and ratios of median times."""
    ours, mergekit, copy = (median_seconds(runs, engine) for engine in (MERGE_ENGINE, MERGEKIT, COPY))
    ratios = {}
    if ours and copy:
        ratios["merge_engine / copy"] = round(ours / copy, 3)
    if ours and mergekit:
        ratios["mergekit / merge_engine"] = round(mergekit / ours, 2)
    return {
        "recipe": {"parameters": METHODS[merge.method][0], "models": len(merge.models)},
        "bytes_read": merge.bytes_read,
        "bytes_written": merge.bytes_written,
        "ratios": ratios,
        "runs": {engine: [_rounded(run) for run in measured] for engine, measured in runs.items()},
    }


def table(merge: Merge, runs: Runs, title: str) -> Table:
    """A column for each engine."""
    result = Table("", *runs, title=title)
    for column in result.columns[1:]:
        column.justify = "right"
    copy, mergekit = median_seconds(runs, COPY), median_seconds(runs, MERGEKIT)
    moved = merge.bytes_read + merge.bytes_written

    def row(label: str, value: Callable[[list[Measurement]], float | None], digits: int = 2) -> None:
        values = [value(measured) for measured in runs.values()]
        result.add_row(label, *("" if x is None else f"{x:,.{digits}f}" for x in values))

    row("rounds", len, 0)
    row("median seconds", _median)
    row("least seconds", lambda measured: min(run.seconds for run in measured))
    row("most seconds", lambda measured: max(run.seconds for run in measured))
    row("times the copy", lambda measured: _median(measured) / copy if copy else None)
    row("times faster than mergekit", lambda measured: mergekit / _median(measured) if mergekit else None)
    row("input + output, GB/s", lambda measured: moved / _median(measured) / 1e9)
    row("CPU seconds", lambda measured: statistics.median(run.cpu_seconds for run in measured))
    row("own memory, MiB", lambda measured: max(run.peak_memory for run in measured) / 2**20, 0)
    row("with mapped files, MiB", lambda measured: max(run.peak_resident for run in measured) / 2**20, 0)
    row("read from disk, GB", lambda measured: statistics.median(run.disk_read for run in measured) / 1e9)
    row("written, GB", lambda measured: statistics.median(run.disk_written for run in measured) / 1e9)
    return result


def _median(measured: list[Measurement]) -> float:
    return statistics.median(run.seconds for run in measured)


def _rounded(run: Measurement) -> dict[str, float]:
    return {name: round(value, 3) for name, value in asdict(run).items()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare merge_engine with mergekit and a bare copy.")
    parser.add_argument("--size", choices=ARCHITECTURES, default="1.1b")
    parser.add_argument("--models", type=int, default=2, help="number of fine-tunes (default 2)")
    parser.add_argument("--methods", default="ties,linear", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", default=os.environ.get(MERGEKIT_VARIABLE), help="path of mergekit-yaml")
    parser.add_argument("--mergekit-rounds", type=int, default=1, help="it takes minutes (default 1)")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache first")
    parser.add_argument("--output", type=Path, help="folder to write merged models to, and empty again")
    options = parser.parse_args()
    options.methods = options.methods.split(",")
    if unknown := set(options.methods) - METHODS.keys():
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    """Measure, print a table for each method, write the JSON."""
    options, console = _options(), Console()
    base, models = make_checkpoints(options.size, options.models)
    state = "cold" if options.cold else "warm"
    work = (options.output or cache_folder()) / "benchmark-output"
    summaries = {}
    for method in options.methods:
        merge = Merge(method, base, tuple(models))
        rounds = {
            engine: options.mergekit_rounds if engine == MERGEKIT else options.rounds
            for engine in engines(options.mergekit)
        }
        runs = interleave(merge, work, rounds, options.mergekit, options.cold)
        console.print(
            table(merge, runs, f"{method}, {options.size}, {options.models} models, {state} inputs")
        )
        summaries[method] = summarise(merge, runs)
    subject = f"compare-{options.size}-{state}"
    results = {"size": options.size, "inputs": state, "methods": summaries}
    console.print(f"written to {save(subject, options.mergekit, results)}")


if __name__ == "__main__":
    main()
