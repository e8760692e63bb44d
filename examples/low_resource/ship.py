"""Round the checkpoints of one seed to float16 and place them in ``models/``, which the repository holds.

    python -m examples.low_resource.ship

Then every model is measured again from the rounded checkpoints, and the changes by rounding are printed.
"""

from __future__ import annotations

import json
import shutil

import torch

from examples.low_resource.errors import told
from examples.low_resource.measure import measure
from examples.low_resource.settings import MODELS, RUNS, SHIPPED_CT, SHIPPED_SEED
from examples.low_resource.summary import LOST, MEASURES, value
from examples.low_resource.tokenizer import load_tokenizer
from examples.low_resource.train import seed_folder
from examples.low_resource.training import load_model


def write_models() -> None:
    """The shipped checkpoints, rounded to float16."""
    (RUNS / "shipped.json").unlink(missing_ok=True)
    source = seed_folder(SHIPPED_SEED)
    for name in ("base", "sft", *(f"ct-{steps}" for steps in SHIPPED_CT)):
        model = load_model(source / name).to(torch.float16)
        shutil.rmtree(MODELS / name, ignore_errors=True)
        model.save_pretrained(MODELS / name)
    load_tokenizer().save_pretrained(MODELS / "base")


def compare() -> None:
    """Measure the rounded checkpoints and print the largest changes."""
    exact = json.loads((seed_folder(SHIPPED_SEED) / "results.json").read_text())["rows"]
    rounded = measure(MODELS, SHIPPED_CT, RUNS / "shipped.json")
    for measured in (*MEASURES, LOST):
        rows = [row for row in rounded if measured != LOST or "counts" in row]
        changes = [
            value(rows, row["method"], row["ct_steps"], measured)
            - value(exact, row["method"], row["ct_steps"], measured)
            for row in rows
        ]
        print(f"{measured}: no model of {len(rows)} changes by more than {max(map(abs, changes)):.4f}")


def main() -> None:
    """Round, write, compare."""
    write_models()
    compare()


if __name__ == "__main__":
    told(main)
