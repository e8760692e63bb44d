"""The floor of a cold and a warm TIES merge, and the bytes and seconds of each stage.

    python -m benchmarks.ledger [--size 1.1b]

Measures the limits of this machine first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from merge_engine.bench.checkpoints import Family, cache_folder, weight_files
from merge_engine.bench.contestants import MERGE_ENGINE, Merge, command
from merge_engine.bench.measuring import cool, empty, warm


def call(*arguments: object) -> str:
    """What merge-engine prints. Stops when it fails."""
    line = [sys.executable, "-m", "merge_engine", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"})
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(line)} failed: {done.stderr}")
    return done.stdout


def main() -> None:
    """Print plans and ledgers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="1.1b")
    base, models = Family(cache_folder(), parser.parse_args().size).make(2)
    merge = Merge("ties", base, tuple(models))
    files = [file for folder in merge.folders for file in weight_files(folder)]
    work = cache_folder() / "merge-engine-ledger"
    empty(work)
    command(MERGE_ENGINE, merge, work)  # writes the recipe
    recipe, output = work / "recipe.yaml", work / "output"
    call("doctor", "--measure", work)
    try:
        for state, prepare in {"cold": cool, "warm": warm}.items():
            prepare(files)
            for what in ("plan", "run"):
                shown = call(what, recipe, output, "--overwrite").replace(str(output), "output")
                print(f"# {what}, {state}\n\n{_without_paths(shown, merge)}\n")
    finally:
        empty(work)
        work.rmdir()


def _without_paths(text: str, merge: Merge) -> str:
    """Where the checkpoints are on this machine is of no interest."""
    folders = {str(path) for folder in merge.folders for path in (folder, Path(folder).parent)}
    return "\n".join(line.rstrip() for line in text.splitlines() if not any(f in line for f in folders))


if __name__ == "__main__":
    main()
