"""Stacked models load in transformers with all tensors, and each layer is what it was in its own model.

transformers runs in an environment of its own (tests/oracle/README.md).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import merge_engine as me

pytestmark = pytest.mark.oracle

SCRIPT = Path(__file__).parent / "oracle" / "stacked_models.py"
LLAMA_LIKE = ("qwen2", "gemma2", "gemma3", "qwen2_moe", "deepseek_v3", "smollm3", "lfm2")
PATHS: dict[str, dict[str | None, str]] = {
    **{name: {None: "model.layers"} for name in LLAMA_LIKE},
    **{name: {None: "transformer.h"} for name in ("gpt2", "gpt_neo")},
    "bert": {None: "bert.encoder.layer"},
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
    "whisper": {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
}
"""Where the layers of each module are, by its name."""

CUTS = (((0, 0, 4), (1, 3, 6)), ((1, 1, 6),))
"""Models, and the ranges of layers: stacked, and pruned."""


@pytest.fixture
def python() -> str:
    found = os.environ.get("MERGE_ENGINE_ORACLE")
    if not found:
        pytest.skip("MERGE_ENGINE_ORACLE is not set (tests/oracle/README.md)")
    return found


def run(python: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [python, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def recipe(
    folder: Path, name: str, module: str | None, cut: tuple[tuple[int, int, int], ...]
) -> dict[str, Any]:
    slices = [
        {"sources": [{"model": str(folder / f"{name}-{i}"), "layer_range": [start, end]}]}
        for i, start, end in cut
    ]
    if module is None:
        return {"merge_method": "passthrough", "slices": slices}
    whole = {"models": [{"model": str(folder / f"{name}-0")}]}
    modules = {each: whole for each in PATHS[name] if each is not None} | {module: {"slices": slices}}
    return {"merge_method": "passthrough", "base_model": str(folder / f"{name}-0"), "modules": modules}


def test_stacked_models_load_in_transformers(python: str, tmp_path: Path) -> None:
    run(python, "make", tmp_path)
    job = {}
    for name, paths in PATHS.items():
        for module, path in paths.items():
            for cut in CUTS:
                title = f"{name}-{module or 'all'}-{'-'.join(map(str, cut))}"
                out = tmp_path / title
                me.run(recipe(tmp_path, name, module, cut), out)
                layers = [
                    [str(tmp_path / f"{name}-{i}"), n] for i, start, end in cut for n in range(start, end)
                ]
                job[title] = {"stacked": str(out), "path": path, "layers": layers}
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert run(python, "check", tmp_path / "job.json").strip() == ""
