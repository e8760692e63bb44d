"""The output of the command line, as a reader sees it: one transcript for each case, in tests/snapshots/cli.

``pytest --update-snapshots`` writes them again. Six substitutions make them the same on every machine:

- spaces at the end of a line are cut off, because rich fills lines with them;
- measured seconds and rates become ``_`` (``busy _ s, _ GB/s``);
- the stage that a run was bound by becomes ``_``;
- the bytes that a run read become ``_``: files used in place do not count, and the machine decides which those are;
- versions of packages become ``VERSION``;
- the findings of ``doctor`` about this machine become ``_``.

Each case runs in a process of its own, in a folder with ``recipe.yaml`` and three small checkpoints. No two
magnitudes of a task vector are equal, so that no draw decides what is kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import SNAPSHOTS, SaveCheckpoint, Snapshot

RECIPE = """\
merge_method: ties
base_model: models/base
models:
  - model: models/maths
  - model: models/code
parameters:
  weight: 0.5
  density: 0.2
"""
THREE_PROBLEMS = """\
merge_method: ties
base_model: models/base
models:
  - model: models/maths
    parameters: {weight: true}
  - model: models/code
parameters:
  weight: heavy
  densty: 0.2
"""
DOCUMENTS = """\
name: both
merge_method: linear
models: [{model: models/maths}, {model: models/code}]
parameters: {weight: 0.5}
---
merge_method: ties
base_model: models/base
models: [{model: both}, {model: models/code, revision: main}]
parameters: {weight: 0.5, density: 0.2, t: 0.5}
"""
SCORER = """\
def evaluate(merge):
    return merge.recipe.parameters["density"], 0.2


def evaluate_both(merge):
    return dict.fromkeys(["large", "small"], merge.recipe.parameters["density"])
"""
SEARCH = "search recipe.yaml found --device cpu --space density=0.1..0.9 --evaluate scorer:evaluate"
SUBSTITUTIONS = [
    (r" +$", ""),
    (r"^(read +)(nothing|.*busy.*)", r"\1_"),
    (r"^(bound by +).*", r"\1_"),
    (r"\d+\.\d+ (s|GB/s)\b", r"_ \1"),
    (r"^\d+\.[\w.+]+$", "VERSION"),
    (r"^(merge_engine +)[\w.+]+, Python [\w.+]+", r"\1VERSION, Python VERSION"),
    (r"\b(torch|huggingface_hub|triton) \d[\w.+]*", r"\1 VERSION"),
    (r"^(machine +).*", r"\1_"),
    (r"^(backend cpu +instruction set ).*", r"\1_"),
    (r"^(backend (cuda|triton) +).*", r"\1_"),
]
MAIN = "import sys; sys.argv[0] = 'merge-engine'; from merge_engine.cli import main; main()"


class Case(NamedTuple):
    """A command line and its conditions."""

    arguments: str
    recipe: str = RECIPE
    columns: int = 100
    encoding: str = "utf-8"
    after: str = ""  # a command line that runs before


CASES = {
    "help": Case("--help", columns=80),
    "help-run": Case("run --help", columns=80),
    "help-plan": Case("plan --help", columns=80),
    "help-report": Case("report --help", columns=80),
    "help-doctor": Case("doctor --help", columns=80),
    "help-verify": Case("verify --help", columns=80),
    "help-sweep": Case("sweep --help", columns=80),
    "sweep": Case("sweep recipe.yaml grid --set density=0.1,0.3 --set dtype=float32,null --device cpu"),
    "sweep-plan": Case("sweep recipe.yaml grid --set density=0.1,0.3 --plan --device cpu"),
    "sweep-goes-on": Case(
        "sweep recipe.yaml grid --set density=0.1,0.3 --device cpu --no-report",
        after="sweep recipe.yaml grid --set density=0.1 --device cpu --quiet",
    ),
    "sweep-with-problems": Case(
        "sweep recipe.yaml grid --set densty=1 --set density=0.1,2 --set dtype=bfloat17 --set weight[2]=1"
    ),
    "sweep-of-nothing": Case("sweep recipe.yaml grid --set density --set sign_slack= --set sign_slack=1"),
    "sweep-of-documents": Case("sweep recipe.yaml grid --set density=0.1,0.2", recipe=DOCUMENTS),
    "help-diff": Case("diff --help", columns=80),
    "help-bench": Case("bench --help", columns=80),
    "help-search": Case("search --help", columns=80),
    "help-narrow": Case("report --help", columns=40),
    "help-ascii": Case("report --help", columns=80, encoding="ascii"),
    "help-mergekit-yaml": Case("mergekit-yaml --help", columns=100),
    "help-mergekit-multi": Case("mergekit-multi --help", columns=100),
    "help-mergekit-pytorch": Case("mergekit-pytorch --help", columns=100),
    "version": Case("--version"),
    "plan-documents": Case("plan recipe.yaml merged", recipe=DOCUMENTS),
    "plan-documents-with-problems": Case(
        "plan recipe.yaml", recipe=DOCUMENTS.replace("maths", "math").replace("ties", "tise")
    ),
    "plan-circle": Case("plan recipe.yaml", recipe=DOCUMENTS.replace("models/maths", "both")),
    "mergekit-yaml": Case(
        "mergekit-yaml recipe.yaml merged --device cpu --copy-tokenizer --lazy-unpickle --allow-crimes "
        "--out-shard-size 1B --low-cpu-memory --trust-remote-code --random-seed 7 --read-to-gpu --multi-gpu "
        "--num-threads 1"
    ),
    "mergekit-yaml-quiet": Case(
        "mergekit-yaml recipe.yaml merged --quiet --no-write-model-card --device cpu",
        recipe=DOCUMENTS.replace("weight: 0.5, d", "lamda: 1, weight: 0.5, d"),
    ),
    "mergekit-multi": Case(
        "mergekit-multi recipe.yaml -I parts --out-path merged --device cpu -v", recipe=DOCUMENTS
    ),
    "mergekit-multi-without-out-path": Case("mergekit-multi recipe.yaml -I parts", recipe=DOCUMENTS),
    "mergekit-yaml-pickles": Case("mergekit-yaml recipe.yaml merged --no-safe-serialization"),
    "doctor": Case("doctor", columns=200),
    "plan": Case("plan recipe.yaml merged"),
    "plan-narrow": Case("plan recipe.yaml merged", columns=40),
    "plan-wide": Case("plan recipe.yaml merged", columns=200),
    "run": Case("run recipe.yaml merged --device cpu"),
    "run-without-output": Case("run recipe.yaml"),
    "run-into-what-is-there": Case("run recipe.yaml models/base"),
    "run-not-utf-8": Case("run recipe.yaml 合并 --device cpu", encoding="latin-1"),
    "report": Case("report merged", after="run recipe.yaml merged --device cpu"),
    "report-without-manifest": Case("report models/base"),
    "verify": Case("verify merged --inputs", after="run recipe.yaml merged --device cpu"),
    "verify-without-manifest": Case("verify models/base"),
    "diff": Case("diff models/base models/code"),
    "diff-json": Case("diff models/base models/code --json"),
    "diff-of-the-same": Case("diff models/base models/base"),
    "diff-without-a-model": Case("diff models/base ./models/coed"),
    "search": Case(f"{SEARCH} --trials 4"),
    "search-front": Case(f"{SEARCH}_both --direction large=maximize --direction small=minimize --trials 2"),
    "search-with-problems": Case(
        f"{SEARCH} --space densty=0..1 --space weight=4..9 --space lambda=-1..nan --direction up"
    ),
    "search-of-another-space": Case(f"{SEARCH} --space seed=0..9", after=f"{SEARCH} --trials 1"),
    "three-problems": Case("plan recipe.yaml", recipe=THREE_PROBLEMS),
    "no-recipe": Case("plan recpe.yaml"),
    "no-model": Case("plan recipe.yaml", recipe=RECIPE.replace("models/code", "./models/coed")),
    "no-method": Case("plan recipe.yaml", recipe=RECIPE.replace("ties", "tise")),
    "no-backend": Case("run recipe.yaml merged --backend gpu"),
    "no-size": Case("plan recipe.yaml --memory lots"),
    "no-such-method-in-bench": Case("bench --methods tise"),
    "no-such-option": Case("plan recipe.yaml --colour"),
    "option-out-of-range": Case("run recipe.yaml merged --threads 0"),
}


@pytest.fixture
def folder(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    names = ("model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)))
    base = {name: torch.arange(64.0).reshape(8, 8) for name in names}
    save_checkpoint("models/base", base)
    for factor, name in ((7, "maths"), (29, "code")):
        change = (torch.arange(64.0) * factor % 64 - 31.25).reshape(8, 8) / 64
        save_checkpoint(f"models/{name}", {key: value + change for key, value in base.items()})
    return tmp_path


def transcript(case: Case, folder: Path) -> str:
    """The output of a case, marked if it is not stdout, and its exit code if it is not 0."""
    (folder / "recipe.yaml").write_text(case.recipe)
    (folder / "scorer.py").write_text(SCORER)
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {
        "COLUMNS": str(case.columns),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
        "PYTHONIOENCODING": case.encoding,
        "PYTHONUTF8": "1",
    }

    def run(arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", MAIN, *arguments.split()]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, encoding=case.encoding
        )

    if case.after:
        assert run(case.after).returncode == 0
    done = run(case.arguments)
    errors = f"[stderr]\n{done.stderr}" if done.stderr else ""
    code = f"[exit code {done.returncode}]\n" if done.returncode else ""
    text = f"$ merge-engine {case.arguments}\n{done.stdout}{errors}{code}"
    for pattern, replacement in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


@pytest.mark.parametrize("name", CASES)
def test_transcript(name: str, folder: Path, assert_snapshot: Snapshot) -> None:
    assert_snapshot(f"cli/{name}.txt", transcript(CASES[name], folder))


def test_every_snapshot_has_a_case() -> None:
    assert {file.stem for file in (SNAPSHOTS / "cli").iterdir()} == set(CASES)
