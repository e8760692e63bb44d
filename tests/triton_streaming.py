"""Whole runs with the triton backend. Started by test_triton_conformance.py, in an environment that interprets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adversarial import quantised_models
from conftest import SaveCheckpoint
from test_invariance import digests

import merge_engine as me

SHAPES = {"embedding": (40, 200), "norm": (211,), "projection": (30, 160), "scale": ()}
METHODS = {
    "ties": {"trim_slack": 0.15, "sign_slack": 0.4, "density": 0.4},
    "ties by index": {"ties": "index", "density": 0.3, "rescale": "true"},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.4},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1},
    "linear": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_gives_the_bytes_of_the_cpu_backend(
    method: str, save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    models: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name, shape in SHAPES.items():
        base, tuned = quantised_models(torch.Size(shape).numel(), 2, torch.bfloat16)
        for model, tensor in zip(models, (base, *tuned), strict=True):
            model[name] = tensor.view(shape)
    folders = [save_checkpoint(f"m{i}", model, shards=2) for i, model in enumerate(models)]
    entries = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(folders[1:], (0.7, 0.4), strict=True)
    ]
    recipe = {
        "merge_method": method.split()[0],
        "models": entries,
        "parameters": METHODS[method],
        **({} if method == "linear" else {"base_model": str(folders[0])}),
    }
    results = {}
    for backend, memory in (("cpu", "384MB"), ("triton", "150KB")):
        result = me.run(recipe, tmp_path / backend, backend=backend, memory=memory)
        results[backend] = (digests(tmp_path / backend), result.counts)
    assert results["triton"] == results["cpu"]
    assert results["cpu"][0].keys() == SHAPES.keys()
