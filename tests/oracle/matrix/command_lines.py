"""Recipes by the real command lines: two processes, and the same words but for the name of the tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from matrix.comparing import compare_weights
from matrix.shapes import Shape

OPTIONS = ("--copy-tokenizer", "--allow-crimes", "--out-shard-size", "1B", "--lazy-unpickle")
"""What the notebook gives with which most published merges were made."""


def run_both(folder: Path, oracle: str, shapes: Sequence[Shape]) -> list[str]:
    """Run each recipe with both tools in ``folder``, print what came out, and return what failed."""
    tools = {"mergekit-yaml": [str(Path(oracle).with_name("mergekit-yaml"))]}
    tools["merge-engine mergekit-yaml"] = [sys.executable, "-m", "merge_engine", "mergekit-yaml"]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    failed = []
    print(f"\nThe command lines: TOOL recipe.yaml merged {' '.join(OPTIONS)}\n")
    print("| recipe | mergekit-yaml | merge-engine mergekit-yaml | weights as they come |\n|" + " --- |" * 4)
    for number, shape in enumerate(shapes):
        recipe = folder / f"recipe{number}.yaml"
        recipe.write_text(shape.text("bf16"))
        codes, outputs = [], []
        for name, words in tools.items():
            outputs.append(folder / f"{name.split()[0]}{number}")
            command = [*words, str(recipe), str(outputs[-1]), *OPTIONS]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            codes.append("merged" if done.returncode == 0 else f"exit code {done.returncode}")
            if done.returncode:
                failed.append(f"{shape.title}: {name}: {done.stderr.strip().splitlines()[-1]}")
        same = str(compare_weights(outputs[1], outputs[0], None)) if codes == ["merged", "merged"] else ""
        drawn = "other draws" if shape.expect == "draws" else same
        print(f"| {shape.title} | {' | '.join(codes)} | {drawn} |")
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)
    return failed
