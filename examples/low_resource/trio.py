"""Merge the shipped trio, with and without slack, evaluate all five models, and draw the report.

    python -m examples.low_resource.trio

Nothing is trained and nothing is fetched. Everything is written to ``out/`` beside this file.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.low_resource.errors import ExampleError, told
from examples.low_resource.evaluate import scores
from examples.low_resource.settings import HERE, MODELS, SHIPPED_CT
from examples.low_resource.summary import BPB, ENGLISH, TAMIL
from examples.low_resource.tasks import held_out_items
from examples.low_resource.training import load_model

ROOT = HERE.parents[1]
OUT = HERE / "out"
MERGED = {"TIES": "ties", "TIES + slack": "ties_elect"}
"""Names in the table, and recipes."""


def merge_engine(console: Console, *arguments: str) -> None:
    """Run merge-engine as a user would, in the root of the repository; the recipes' paths begin there."""
    console.print("merge-engine", *arguments)
    if (
        status := subprocess.run([sys.executable, "-m", "merge_engine", *arguments], cwd=ROOT).returncode
    ) != 0:
        sys.exit(status)


def table(models: dict[str, Path]) -> Table:
    """What the models can do, one row each."""
    questions = ", ".join(f"{len(items)} {' '.join(key)}" for key, items in held_out_items().items())
    result = Table(title=f"Accuracy (chance is .25; {questions}), and bits per byte", title_justify="left")
    found = {name: scores(load_model(folder)) for name, folder in models.items()}
    result.add_column("model")
    for measure in (*TAMIL, *ENGLISH, BPB):
        result.add_column(measure, justify="right")
    for name, measured in found.items():
        result.add_row(name, *(f"{measured[measure]:.3f}" for measure in (*TAMIL, *ENGLISH, BPB)))
    return result


def main() -> None:
    """Merge, evaluate, report."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    start = time.perf_counter()
    shipped = {"base": MODELS / "base", "CT": MODELS / f"ct-{SHIPPED_CT[-1]}", "SFT": MODELS / "sft"}
    for folder in shipped.values():
        if not (folder / "model.safetensors").is_file():
            raise ExampleError(
                f"{folder}: the shipped checkpoint is not there; restore it with `git checkout`"
            )
    for recipe in MERGED.values():
        place = (HERE / "recipes" / f"{recipe}.yaml").relative_to(ROOT)
        merge_engine(console, "run", f"{place}", f"{(OUT / recipe).relative_to(ROOT)}", "--overwrite")
    merge_engine(console, "report", f"{(OUT / MERGED['TIES + slack']).relative_to(ROOT)}")
    console.print("evaluating base, CT, SFT and both merges ...")
    console.print(table(shipped | {name: OUT / recipe for name, recipe in MERGED.items()}))
    page = OUT / MERGED["TIES + slack"] / "merge_report.html"
    console.print(f"Open {page} in a browser to see what the election discarded.")
    console.print(f"All in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    told(main)
