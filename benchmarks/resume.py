"""A merge that was killed when nine tenths of its shards were complete: how long does the same command take then?

    python -m benchmarks.resume [--size 1.1b] [--rounds 5]

Inputs are in the page cache. Times are those of whole processes; in brackets, those of the merge alone, without the
start of Python and the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

import merge_engine as me
from merge_engine.bench.checkpoints import Family, cache_folder, weight_bytes, weight_files
from merge_engine.bench.contestants import Merge
from merge_engine.bench.measuring import warm
from merge_engine.checkpoint import MANIFEST_NAME

SHARDS = 20  # or a few more, because a tensor is in one shard


def main() -> None:
    """Print medians, and the share of the time that a resumed merge takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base, tuned = Family(cache_folder(), options.size).make(2)
    warm([file for folder in (base, *tuned) for file in weight_files(folder)])
    output = cache_folder() / "resumed"
    for method in ("ties", "linear"):
        recipe = output.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(Merge(method, base, tuple(tuned)).recipe()))
        command = [sys.executable, "-m", "merge_engine", "run", str(recipe), str(output), "--device", "cpu"]
        command += ["--shard-size", str(weight_bytes(base) // SHARDS)]
        number = len(me.plan(recipe, shard_size=weight_bytes(base) // SHARDS).shards)
        whole, rest = [], []
        for _ in range(options.rounds):
            shutil.rmtree(output, ignore_errors=True)
            whole.append(seconds(command, output))
            kill_late(command, output, number * 9 // 10)
            rest.append(seconds(command, output))
        shutil.rmtree(output)
        recipe.unlink()
        (a, alone), (b, rest_alone) = (
            map(statistics.median, zip(*taken, strict=True)) for taken in (whole, rest)
        )
        print(
            f"{method}: {a:.2f} s, resumed at {number * 9 // 10} of {number} shards {b:.2f} s: {b / a:.0%} "
            f"({alone:.2f} s, {rest_alone:.2f} s: {rest_alone / alone:.0%})"
        )


def seconds(command: list[str], output: Path) -> tuple[float, float]:
    """How long a command takes, and its merge alone."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    taken = time.perf_counter() - start
    return taken, json.loads((output / MANIFEST_NAME).read_bytes())["ledger"]["seconds"]


def kill_late(command: list[str], output: Path, complete: int) -> None:
    """Begin a merge, and kill it when so many shards are complete."""
    shutil.rmtree(output, ignore_errors=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(output.glob("*.record.part"))) < complete:
        if process.poll() is not None:
            raise SystemExit("the merge ended before it could be killed; take a larger --size")
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
