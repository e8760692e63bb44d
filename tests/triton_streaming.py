"""Whole runs with the triton backend. interpreted.py starts it in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adversarial import quantised_models
from conftest import SaveCheckpoint
from test_invariance import digests

import merge_engine as me
from merge_engine.backends import create_backend
from merge_engine.backends.operations import Found, FoundBand, RankMask
from merge_engine.backends.reference import ReferenceBackend
from merge_engine.dtypes import BF16
from merge_engine.errors import BackendError
from merge_engine.kernels.masks import LOW_FIRST, LOW_LAST

SHAPES = {"embedding": (40, 200), "norm": (211,), "projection": (30, 160), "scale": (), "nothing": (0, 4)}
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
    for backend, memory in (("cpu", "384MB"), ("triton", "200KB")):
        result = me.run(recipe, tmp_path / backend, backend=backend, memory=memory)
        results[backend] = (digests(tmp_path / backend), result.counts)
    assert results["triton"] == results["cpu"]
    assert results["cpu"][0].keys() == SHAPES.keys()


def test_shares_of_draws_are_exact() -> None:
    """floor(2^32 * kept / equal), also where the product needs more than 64 bits."""
    shares = ((1, 3), (2**33 + 1, 2**34 + 5), (2**40 - 1, 2**40), (5, 5), (0, 9), (1, 2**40))
    bands = [FoundBand(RankMask(1, kept + 3), Found(7, 3, equal)) for kept, equal in shares]
    expected = [solved.mask.low_positions for solved in ReferenceBackend().bands(bands, BF16)]
    rows = [solved.mask.row for solved in create_backend("triton").bands(bands, BF16)]
    assert [(int(row[LOW_FIRST.value]), int(row[LOW_LAST.value])) for row in rows] == expected


def test_what_it_cannot_do_is_said(save_checkpoint: SaveCheckpoint) -> None:
    folders = [str(save_checkpoint(name, {"x": torch.ones(3)})) for name in "ab"]
    recipe = {
        "merge_method": "linear",
        "arithmetic": "mergekit",
        "models": [{"model": folder, "parameters": {"weight": 0.5}} for folder in folders],
    }
    expected = me.run(recipe, backend="cpu").tensors
    merged = me.run(recipe, backend="triton").tensors
    assert expected is not None and merged is not None and torch.equal(merged["x"], expected["x"])
    with pytest.raises(BackendError, match="needs contiguous tensors"):
        create_backend("triton").tensor(torch.ones(4, 4).T)
