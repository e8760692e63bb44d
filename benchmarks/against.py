"""This version in turns with another one, and with a bare copy: the speed of a change.

    python -m benchmarks.against PYTHON [--cases ties-warm,moe] [--rounds 5] [--save FILE]

PYTHON is the interpreter of an environment in which the other version is installed. Checkpoints are those of
``merge-engine bench``. Each case prints medians, and the median ratio of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from merge_engine.bench.checkpoints import CHANGED, Family, cache_folder, weight_files
from merge_engine.bench.contestants import COPY, MERGE_ENGINE, Merge, command
from merge_engine.bench.machine import describe
from merge_engine.bench.measuring import Measurement, claim_memory, cool, empty, measure, warm
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE


class Case(NamedTuple):
    """A merge: shape, method, state of the page cache, whether to a RAM disk, and bytes of an output file.

    ``changed`` is the share of entries that fine-tunes change before they are rounded.
    """

    size: str
    method: str
    cache: str = "warm"
    in_memory: bool = False
    shard_size: int = DEFAULT_SHARD_SIZE
    density: float | None = None
    changed: float = CHANGED


CHANGED_OF_ZEROS = {17: 1.0, 50: 0.605, 80: 0.242}
"""The share of entries to change for per cents of task vector entries that are zero."""
METHODS = ("ties", "linear", "dare_ties", "della")
CASES = {
    **{f"{method}-{cache}": Case("1.1b", method, cache) for method in METHODS for cache in ("warm", "cold")},
    "moe": Case("moe", "ties"),
    "many": Case("many", "ties"),
    **{f"{method}-shards": Case("1.1b", method, "warm", True, 500_000_000) for method in METHODS},
    "small": Case("tiny", "ties"),
    **{
        f"ties-{density}-zeros-{zeros}": Case("1.1b", "ties", density=density, changed=changed)
        for zeros, changed in CHANGED_OF_ZEROS.items()
        for density in (0.2, 0.5)
    },
}


def main() -> None:
    """Print a table, and save every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    os.environ["PYTHONSAFEPATH"] = (
        "1"  # or the version in the current folder would be imported, not those installed
    )
    results = {}
    print(
        f"{'case':20}{'this':>9}{'other':>9}{'copy':>9}{'this/other':>12}{'this/copy':>11}{'cpu s':>8}{'MiB':>6}"
    )
    for name in options.cases.split(","):
        runs = run_case(CASES[name], options.other, options.rounds)
        results[name] = {who: [asdict(run) for run in done] for who, done in runs.items()}
        print(row(name, runs), flush=True)
    if options.save:
        about = describe({"checkpoints": cache_folder()}, None)
        options.save.write_text(json.dumps({**about, "cases": results}, indent=1) + "\n")


def run_case(case: Case, other: Path, rounds: int) -> dict[str, list[Measurement]]:
    """Every contestant as often as there are rounds, in turns."""
    base, models = Family(cache_folder(), case.size, changed=case.changed).make(2)
    merge = Merge(case.method, base, tuple(models), case.density)
    files = [file for folder in merge.folders for file in weight_files(folder)]
    work = (Path("/dev/shm") if case.in_memory else cache_folder()) / "merge-engine-against"
    prepare = warm if case.cache == "warm" else cool
    runs: dict[str, list[Measurement]] = {"this": [], "other": [], "copy": []}
    try:
        for turn in range(rounds + 1):  # the first is not counted
            # The disk is busy for a while after a copy: nobody is always the next.
            for who in [*runs, *runs][turn % len(runs) :][: len(runs)]:
                empty(work)
                contestant = COPY if who == "copy" else MERGE_ENGINE
                line: list[Any] = command(contestant, merge, work, shard_size=case.shard_size)
                if who == "other":
                    line[0] = str(other)
                prepare(files)
                if case.in_memory:
                    claim_memory(merge.bytes_written + (1 << 30))
                found = measure(line, work / "output")
                if turn:
                    runs[who].append(found)
    finally:
        empty(work)
        work.rmdir()
    return runs


def row(name: str, runs: dict[str, list[Measurement]]) -> str:
    """Medians of seconds, of the ratios of neighbours, and of this version's processor time and own memory."""

    def median(who: str) -> float:
        return statistics.median(run.seconds for run in runs[who])

    def ratio(who: str) -> float:
        return statistics.median(a.seconds / b.seconds for a, b in zip(runs["this"], runs[who], strict=True))

    cpu = statistics.median(run.cpu_seconds for run in runs["this"])
    memory = max(run.peak_memory for run in runs["this"]) / 2**20
    return (
        f"{name:20}{median('this'):9.2f}{median('other'):9.2f}{median('copy'):9.2f}"
        f"{ratio('other'):12.2f}{ratio('copy'):11.2f}{cpu:8.2f}{memory:6.0f}"
    )


if __name__ == "__main__":
    main()
