"""The whole study: train, merge and evaluate every seed, then tables and figure. One command, all stages.

    python -m examples.low_resource.study

Seeds run side by side, one on each core (or on the GPU, one after the other). Finished parts are not done again:
after an interruption the same command continues.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

from examples.low_resource import settings
from examples.low_resource.errors import ExampleError, told
from examples.low_resource.measure import measure
from examples.low_resource.plot import draw
from examples.low_resource.tables import write_tables
from examples.low_resource.tokenizer import load_tokenizer
from examples.low_resource.train import seed_folder
from merge_engine.bench.machine import describe

ROOT = settings.HERE.parents[1]
RESULTS = settings.HERE / "results.json"


def run_seed(seed: int) -> bool:
    """Train and measure one seed in processes of its own, which print what they do. Whether they succeeded."""
    return all(
        subprocess.run(
            [sys.executable, "-m", f"examples.low_resource.{stage}", str(seed)], cwd=ROOT
        ).returncode
        == 0
        for stage in ("train", "measure")
    )


def used_settings() -> dict[str, object]:
    """The numbers of ``settings.py`` that results depend on."""
    stages = {name: asdict(getattr(settings, name)) for name in ("BASE", "CT", "SFT")}
    names = ("HELD_OUT_PAIRS", "HELD_OUT_ENGLISH", "VOCABULARY", "MODEL", "SEQUENCE", "BATCH", "BASE_TEXT")
    names += ("CT_TEXT", "CT_SNAPSHOTS", "SFT_BATCH", "WORDS", "BPB_TEXTS", "SLACKS")
    items = {" ".join(key): limit for key, limit in settings.ITEMS.items()}
    return stages | {name: getattr(settings, name) for name in names} | {"ITEMS": items}


def main() -> None:
    """Run all seeds, then write the results, the tables and the figure."""
    load_tokenizer()  # so that what is missing is said once
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))) as pool:
        done = list(pool.map(run_seed, settings.SEEDS))
    if not all(done):
        raise ExampleError("not every seed is done; what went wrong is said above; the same command goes on")
    seeds = {
        seed: measure(seed_folder(seed), settings.CT_SNAPSHOTS, seed_folder(seed) / "results.json")
        for seed in settings.SEEDS
    }
    content = {"settings": used_settings(), **describe({"disk": settings.HERE}, None), "seeds": seeds}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    write_tables()
    print(f"results in {RESULTS}, figure in {draw()}")


if __name__ == "__main__":
    told(main)
