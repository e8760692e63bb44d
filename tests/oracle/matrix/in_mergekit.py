"""Runs mergekit's command lines on a list of recipes, in one process. Needs an environment with mergekit.

usage: python in_mergekit.py JOBS.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml
from mergekit_oracle import stable_sorting


def in_order(self: MergeConfiguration) -> list[ModelReference]:
    """The models of a recipe in its order, the base first. mergekit's own order is that of a set: chance."""
    models: dict[ModelReference, None] = {}
    modules = list((self.modules or {}).values())
    slices = [*(self.slices or []), *(each for module in modules for each in module.slices or [])]
    listed = [*(self.models or []), *(each for module in modules for each in module.models or [])]
    bases = [self.base_model] if self.base_model else []
    sources = [source.model for each in slices for source in each.sources]
    models.update(dict.fromkeys([*bases, *(entry.model for entry in listed), *sources]))
    return list(models)


def main(jobs: str, results: str) -> None:
    """Do all jobs: ``folder``, ``config``, ``output`` and ``several``. The results have each error, or nothing."""
    torch.set_num_threads(1)
    MergeConfiguration.referenced_models = in_order
    written = Path(results).resolve()
    found = {}
    for job in json.loads(Path(jobs).read_text()):
        os.chdir(job["folder"])
        given = ["--random-seed", "0", "--quiet", "--lora-merge-cache", job["output"] + "-lora"]
        start = time.perf_counter()
        try:
            with stable_sorting():
                if job["several"]:
                    parts = ["-I", job["output"] + "-parts", "--out-path", job["output"]]
                    mergekit_multi.main(args=[job["config"], *parts, *given], standalone_mode=False)
                else:
                    mergekit_yaml.main(args=[job["config"], job["output"], *given], standalone_mode=False)
        except Exception as error:
            found[job["output"]] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        print(f"{time.perf_counter() - start:6.1f} s  {job['output']}", flush=True)
    written.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
