"""The processor time of a merge by kind of work, from samples by perf.

    python -m benchmarks.cycles [--method ties] [--size 1.1b] [--output FOLDER]

Needs Linux's perf, and the checkpoints that `merge-engine bench` makes. Inputs are in the page cache.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from merge_engine.bench.checkpoints import Family, cache_folder, weight_files
from merge_engine.bench.contestants import MERGE_ENGINE, METHODS, Merge, command
from merge_engine.bench.measuring import empty, warm

SAMPLES_PER_SECOND = 997
PARTS = (  # name, library and function, the latter as regular expressions; the first that matches counts
    ("rank search and histograms", "_native", "RankSearch|EdgeCounter|bin_tile|key_tile|find_|count_"),
    ("consensus, combine and the rest of the kernels", "_native", ""),
    ("digests", "xxhash", ""),
    ("Linux: copies out of the page cache", "kernel", "copy_to_iter|copy_page_to|rep_movs"),
    ("Linux: copies into files", "kernel", "copy_from_iter|copy_page_from|copy_folio_from"),
    ("Linux: new memory", "kernel", "clear_page|clear_huge|fault|alloc_pages|get_page_from"),
    ("Linux: the rest", "kernel", ""),
    ("Python", "python|_ctypes|pydantic|_queue|_struct|_json|libc", ""),
    ("anything else", "", ""),
)


def record(arguments: list[str], file: Path) -> None:
    """Run a command and sample what all of its threads do."""
    sampling = [
        "perf",
        "record",
        "-q",
        "-e",
        "cpu-clock",
        "-F",
        str(SAMPLES_PER_SECOND),
        "-o",
        str(file),
        "--",
    ]
    done = subprocess.run([*sampling, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr or done.stdout}")


def samples_by_part(file: Path) -> Counter[str]:
    """How many samples fell into every part."""
    fields = ["perf", "script", "-i", str(file), "-F", "ip,sym,dso"]
    lines = subprocess.run(fields, capture_output=True, text=True, check=True).stdout.splitlines()
    samples: Counter[str] = Counter()
    for line in filter(str.strip, lines):
        symbol, _, library = line.strip().rpartition(" (")
        part = next(
            name for name, where, what in PARTS if re.search(where, library) and re.search(what, symbol)
        )
        samples[part] += 1
    return samples


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", default="ties", choices=METHODS)
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--output", type=Path, default=cache_folder(), help="where to write")
    options = parser.parse_args()
    base, models = Family(cache_folder(), options.size).make(2)
    merge = Merge(options.method, base, tuple(models))
    warm(file for folder in merge.folders for file in weight_files(folder))
    work = options.output / "merge-engine-cycles"
    empty(work)
    try:
        with tempfile.TemporaryDirectory() as folder:
            record(command(MERGE_ENGINE, merge, work), Path(folder) / "perf.data")
            samples = samples_by_part(Path(folder) / "perf.data")
    finally:
        shutil.rmtree(work)
    total = samples.total()
    seconds = total / SAMPLES_PER_SECOND
    print(f"{options.method}, {options.size}, 2 models, warm: {seconds:.2f} seconds of processor time\n")
    for name, _, _ in PARTS:
        print(f"{name:48}{samples[name] / SAMPLES_PER_SECOND:6.2f} s {samples[name] / total:6.1%}")


if __name__ == "__main__":
    main()
