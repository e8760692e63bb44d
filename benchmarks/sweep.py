"""A sweep of TIES recipes beside single runs of them, in turns, over inputs in the page cache.

    python -m benchmarks.sweep [--size 0.5b] [--recipes 10] [--rounds 3] [--outputs /dev/shm/sweep]

Three things are done in turns: one run into a folder; the sweep into folders; the sweep to a function that does
nothing. Beside the seconds stand those of the processor, which other processes on the machine change little, and what
each stage of the last sweep was busy with. ``floor`` is the time to write the bytes of all outputs and to do nothing
else, as a copy from memory by one thread.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import merge_engine as me
from merge_engine.bench.checkpoints import Family, cache_folder, weight_bytes, weight_files
from merge_engine.bench.contestants import Merge
from merge_engine.bench.measuring import warm
from merge_engine.observe.ledger import Ledger

PIECE = 16 << 20


def main() -> None:
    """Print medians, in seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--recipes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--outputs", type=Path, default=Path("/dev/shm/merge_engine_sweep"))
    options = parser.parse_args()
    base, tuned = Family(cache_folder(), options.size).make(2)
    files = [file for folder in (base, *tuned) for file in weight_files(folder)]
    slacks = [0, 2]
    densities = [round(0.1 + 0.8 * i / -(-options.recipes // 2), 3) for i in range(-(-options.recipes // 2))]
    recipe = Merge("ties", base, tuple(tuned)).recipe()
    grid = dict(list(me.grid(recipe, density=densities, sign_slack=slacks).items())[: options.recipes])
    first = next(iter(grid.values()))
    how = {"device": "cpu", "threads": options.threads}
    ledgers: dict[str, Ledger] = {}

    def one_run() -> None:
        ledgers["one run"] = me.run(first, options.outputs / "one", **how).ledger

    def to_folders() -> None:
        ledgers["to folders"] = me.sweep(grid, options.outputs, report=False, **how).ledger

    def to_function() -> None:
        ledgers["to a function"] = me.sweep(grid, lambda label, name, tensor: None, **how).ledger

    contestants = {"one run": one_run, "to folders": to_folders, "to a function": to_function}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, do in contestants.items():
            shutil.rmtree(options.outputs, ignore_errors=True)
            warm(files)
            taken[name].append(seconds(do))
    shutil.rmtree(options.outputs, ignore_errors=True)
    written = options.recipes * weight_bytes(base)
    wall, processor = (statistics.median(each) for each in zip(*taken["one run"], strict=True))
    print(
        f"{options.recipes} recipes, {weight_bytes(base) / 1e9:.2f} GB each; "
        f"floor {floor(options.outputs, written):.2f} s"
    )
    for name, each in taken.items():
        seconds_, processor_ = (statistics.median(numbers) for numbers in zip(*each, strict=True))
        print(
            f"{name:14} {seconds_:7.2f} s ({seconds_ / wall:.2f} of a run), processor {processor_:7.2f} s "
            f"({processor_ / processor:.2f}), read {ledgers[name].read.bytes / 1e9:.2f} GB"
        )
        stages = ledgers[name].stages().items()
        print("  ", ", ".join(f"{stage} {s.bytes / 1e9:.2f} GB in {s.seconds:.2f} s" for stage, s in stages))


def floor(folder: Path, nbytes: int) -> float:
    """Seconds to write so many bytes, over and over into the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    data = memoryview(bytearray(b"x" * PIECE))
    with (folder / "floor").open("wb", buffering=0) as file:
        start = time.perf_counter()
        for at in range(0, nbytes, PIECE):
            file.seek(at % (1 << 30))
            file.write(data)
        taken = time.perf_counter() - start
    shutil.rmtree(folder)
    return taken


def seconds(do: Callable[[], None]) -> tuple[float, float]:
    """How long a call takes, and for how long it keeps processors busy."""
    start, busy = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - start, time.process_time() - busy


if __name__ == "__main__":
    main()
