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
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml
from mergekit_oracle import stable_sorting


def main(jobs: str, results: str) -> None:
    """Do all jobs: ``folder``, ``config``, ``output`` and ``several``. The results have each error, or nothing."""
    torch.set_num_threads(1)
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
