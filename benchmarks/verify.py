"""``merge-engine verify`` beside a bare read of the same files, in turns: warm and cold.

    python -m benchmarks.verify [--size 1.1b] [--rounds 7]

Both read every weight file of an output once, on the same number of threads. The bare read copies 1 MiB at a time
into a buffer of its thread, which stays in the processor's cache, and looks at nothing.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import merge_engine as me
from merge_engine.bench.checkpoints import Family, cache_folder, weight_files
from merge_engine.bench.measuring import cool, empty, warm
from merge_engine.inspect.reading import threads

PIECE = 1 << 20
SHARE = 16 * PIECE  # what a thread reads in one go, as ``verify`` does


def bare_read(files: list[Path]) -> None:
    """Read every byte once."""
    opened = [os.open(file, os.O_RDONLY) for file in files]
    work = [(one, at) for one in opened for at in range(0, os.fstat(one).st_size, SHARE)]

    def read(share: tuple[int, int], buffer: memoryview) -> None:
        descriptor, start = share
        for at in range(start, start + SHARE, PIECE):
            if os.preadv(descriptor, [buffer], at) < PIECE:
                return

    def worker(first: int) -> None:
        buffer = memoryview(mmap.mmap(-1, PIECE))
        for share in work[first :: threads()]:
            read(share, buffer)

    with ThreadPoolExecutor(threads()) as pool:
        list(pool.map(worker, range(threads())))
    for descriptor in opened:
        os.close(descriptor)


def verify(output: Path) -> None:
    """The command without the start of its process."""
    found = me.verify(output)
    if not found.complete:
        raise SystemExit("\n".join(found.lines))


def seconds(do: Callable[[], None]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def main() -> None:
    """Print the rates of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    base, (tuned,) = Family(cache_folder(), options.size).make(1)
    output = cache_folder() / "merge-engine-verify"
    empty(output)
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in (base, tuned)]
    me.run({"merge_method": "linear", "models": models}, output, shard_size="1GB")
    files = weight_files(output)
    nbytes = sum(file.stat().st_size for file in files)
    print(f"{nbytes / 1e9:.2f} GB in {len(files)} files, {threads()} threads, median of {options.rounds}")
    contestants = {"bare read": partial(bare_read, files), "verify": partial(verify, output)}
    try:
        for state, prepare in {"warm": warm, "cold": cool}.items():
            taken: dict[str, list[float]] = {name: [] for name in contestants}
            for number in range(options.rounds):
                turns = list(contestants) if number % 2 else list(reversed(contestants))
                for name in turns:
                    prepare(files)
                    taken[name].append(seconds(contestants[name]))
            rates = {name: nbytes / statistics.median(values) / 1e9 for name, values in taken.items()}
            ratio = rates["verify"] / rates["bare read"]
            print(f"{state}: " + ", ".join(f"{n} {r:.2f} GB/s" for n, r in rates.items()) + f": {ratio:.2f}")
    finally:
        empty(output)
        output.rmdir()


if __name__ == "__main__":
    main()
