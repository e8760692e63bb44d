"""Peak memory of a merge, by number of models and by size of model.

    python -m benchmarks.memory --sizes 0.5b,1.1b,3b --models 2,5,10

Sizes are measured with the smallest number of models, numbers of models at the first size. All fine-tunes
of a size are one file under several names, which changes nothing about memory and spares the disk.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import cache_folder, make_checkpoints
from benchmarks.engines import MERGE_ENGINE, METHODS, Merge, check_output, command
from benchmarks.measuring import empty, measure
from benchmarks.results import save
from benchmarks.shapes import ARCHITECTURES


@dataclass(frozen=True)
class Row:
    """One run: bytes of all inputs, the most memory it had of its own and with mapped files, seconds."""

    size: str
    models: int
    input_bytes: int
    peak_memory: int
    peak_resident: int
    seconds: float


def measure_all(method: str, sizes: list[str], models: list[int], work: Path) -> Iterator[Row]:
    """Measure each size and each number of models."""
    cases = [(size, models[0]) for size in sizes] + [(sizes[0], count) for count in models[1:]]
    try:
        for size, count in cases:
            base, folders = make_checkpoints(size, count, distinct=1)
            merge = Merge(method, base, tuple(folders))
            empty(work)
            run = measure(command(MERGE_ENGINE, merge, work), work / "output")
            check_output(MERGE_ENGINE, merge, work)
            yield Row(
                size, count, merge.bytes_read, run.peak_memory, run.peak_resident, round(run.seconds, 3)
            )
    finally:
        shutil.rmtree(work)


def table(rows: list[Row], method: str) -> Table:
    """A row for each run."""
    result = Table(title=f"peak memory, {method}")
    result.add_column("size")
    for heading in ("models", "inputs\nGB", "own memory\nMiB", "VmHWM\nMiB", "seconds"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.size,
            str(row.models),
            f"{row.input_bytes / 1e9:.2f}",
            f"{row.peak_memory / 2**20:.0f}",
            f"{row.peak_resident / 2**20:.0f}",
            f"{row.seconds:.2f}",
        )
    return result


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Measure the peak memory of merge_engine.")
    parser.add_argument("--sizes", default="0.5b,1.1b,3b", help=f"of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--models", default="2,5,10", help="numbers of models, the smallest first")
    parser.add_argument("--method", choices=METHODS, default="ties")
    options = parser.parse_args()
    models = [int(count) for count in options.models.split(",")]
    work = cache_folder() / "benchmark-output"
    rows = list(measure_all(options.method, options.sizes.split(","), models, work))
    console = Console()
    console.print(table(rows, options.method))
    results = {"method": options.method, "rows": [asdict(row) for row in rows]}
    console.print(f"written to {save('memory', None, results)}")


if __name__ == "__main__":
    main()
