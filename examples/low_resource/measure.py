"""Stages 7 and 8 for one seed: merge by every recipe at every CT budget, and evaluate every model.

    python -m examples.low_resource.measure 0

Results are written to ``runs/seed-N/results.json``, each when it is known. Results in the file are not measured
again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.low_resource.errors import ExampleError, told
from examples.low_resource.evaluate import scores
from examples.low_resource.merging import SFT, Variant, merge
from examples.low_resource.settings import BPB_TEXTS, CT_SNAPSHOTS, ITEMS, RECIPES, SLACKS, WORDS
from examples.low_resource.train import seed_folder
from examples.low_resource.training import MARKER, load_model

VARIANTS = (
    Variant("average"),
    Variant("task_arithmetic"),
    Variant("upweighted_sum"),
    Variant("ties"),
    *(Variant(recipe, slack) for recipe, values in SLACKS.items() for slack in values),
)
CT_THEN_SFT = "CT then SFT"
Row = dict[str, Any]
"""One model: ``method``, ``ct_steps`` (None without CT), ``scores``, and for TIES SFT's ``counts``."""


def models(folder: Path, budgets: Sequence[int]) -> Iterator[tuple[str, int | None, Callable[[], Row]]]:
    """Every model that is measured: its method, its CT budget, and what makes its row."""
    last = CT_SNAPSHOTS[-1]
    yield "base", None, lambda: {"scores": scores(load_model(folder / "base"))}
    yield "SFT", None, lambda: {"scores": scores(load_model(folder / "sft"))}
    if (folder / "ct-then-sft").is_dir():
        yield CT_THEN_SFT, last, lambda: {"scores": scores(load_model(folder / "ct-then-sft"))}
    for steps in budgets:
        yield "CT", steps, lambda steps=steps: {"scores": scores(load_model(folder / f"ct-{steps}"))}
        for variant in VARIANTS:
            yield variant.label, steps, lambda v=variant, steps=steps: merged_row(v, folder, steps)


def merged_row(variant: Variant, folder: Path, ct_steps: int) -> Row:
    """Merge, count and evaluate."""
    tensors, result = merge(variant, folder, ct_steps)
    model = load_model(folder / "base")
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, strict=False)
    row: Row = {"scores": scores(model)}
    if variant.recipe.startswith("ties"):
        c = result.counts[SFT]
        row["counts"] = {
            "kept": c.kept,
            "lost": c.lost,
            "saved_by_trim": c.saved_by_trim,
            "saved_by_sign": c.saved_by_sign,
        }
    return row


def measure(folder: Path, budgets: Sequence[int], results: Path) -> list[Row]:
    """Measure all models of a folder that ``results`` lacks. Returns all rows."""
    made_of = _identity(folder, budgets)
    rows: list[Row] = []
    if results.exists():
        found = json.loads(results.read_text())
        if found["identity"] != made_of:
            raise ExampleError(
                f"{results}: of other checkpoints, recipes or settings; remove it to measure anew"
            )
        rows = found["rows"]
    known = {(row["method"], row["ct_steps"]) for row in rows}
    for method, steps, make in models(folder, budgets):
        if (method, steps) not in known:
            rows.append({"method": method, "ct_steps": steps, **make()})
            part = results.with_suffix(".part")
            part.write_text(json.dumps({"identity": made_of, "rows": rows}, indent=1) + "\n")
            part.replace(results)
            print(f"{folder.name}: {method}{'' if steps is None else f' at {steps} steps of CT'}", flush=True)
    return rows


def _identity(folder: Path, budgets: Sequence[int]) -> str:
    """A digest of what the rows follow from: checkpoints, recipes and items."""
    names = ["base", "sft", *(f"ct-{steps}" for steps in budgets)]
    absent = [name for name in names if not (folder / name / "model.safetensors").is_file()]
    if absent:
        raise ExampleError(
            f"{folder}: half done, it lacks {', '.join(absent)}; `python -m examples.low_resource.study` goes on"
        )
    digest = hashlib.sha256(repr((sorted(ITEMS.items()), BPB_TEXTS, WORDS, VARIANTS)).encode())
    for recipe in sorted(RECIPES.glob("*.yaml")):
        digest.update(recipe.read_bytes())
    for name in names:
        marker = folder / name / MARKER
        digest.update((marker if marker.is_file() else folder / name / "model.safetensors").read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Measure the seeds that are named."""
    if len(sys.argv) < 2 or not all(argument.isdecimal() for argument in sys.argv[1:]):
        raise ExampleError("name the seeds to measure, such as `python -m examples.low_resource.measure 0 1`")
    for seed in map(int, sys.argv[1:]):
        folder = seed_folder(seed)
        measure(folder, CT_SNAPSHOTS, folder / "results.json")


if __name__ == "__main__":
    told(main)
