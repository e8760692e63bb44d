"""Whole runs with the triton backend, interpreted (test_triton_conformance.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adversarial import quantised_models
from conftest import SaveCheckpoint
from test_invariance import digests

import merge_engine as me
from merge_engine.backends import Backend, create_backend
from merge_engine.backends.operations import Found, FoundBand, RankMask
from merge_engine.backends.reference import ReferenceBackend
from merge_engine.backends.triton import TritonBackend
from merge_engine.dtypes import BF16
from merge_engine.errors import BackendError, DeviceMemoryError
from merge_engine.kernels.masks import LOW_FIRST, LOW_LAST

SHAPES = {"embedding": (40, 200), "norm": (211,), "projection": (30, 160), "scale": (), "nothing": (0, 4)}
METHODS = {
    "ties": {"trim_slack": 0.15, "sign_slack": 0.4, "density": 0.4},
    "ties by index": {"ties": "index", "density": 0.3, "rescale": "true"},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.4},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1},
    "linear": {},
    "ramplus_tl": {"epsilon": 0.001},
    "sce": {"select_topk": 0.3},
}


class Linked(TritonBackend):
    """The interpreter's memory behind a link, as that of a GPU is."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.has_link = 3, True

    attach, upload, download = Backend.attach, Backend.upload, Backend.download


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
    weighted = any(parameter.name == "weight" for parameter in me.METHODS[method.split()[0]].parameters)
    entries = [
        {"model": str(folder), "parameters": {"weight": weight} if weighted else {}}
        for folder, weight in zip(folders[1:], (0.7, 0.4), strict=True)
    ]
    recipe = {
        "merge_method": method.split()[0],
        "models": entries,
        "parameters": METHODS[method],
        **({} if method == "linear" else {"base_model": str(folders[0])}),
    }
    results = {}
    for title, backend, memory in (
        ("cpu", "cpu", "384MB"),
        ("triton", "triton", "384MB"),
        ("link", Linked(), "200KB"),
    ):
        result = me.run(recipe, tmp_path / title, backend=backend, memory=memory)
        results[title] = (digests(tmp_path / title), result.counts)
    assert results["triton"] == results["link"] == results["cpu"]
    assert results["cpu"][0].keys() == SHAPES.keys()


def test_shares_of_draws_are_exact() -> None:
    """floor(2^32 * kept / equal), also where the product needs more than 64 bits."""
    shares = ((1, 3), (2**33 + 1, 2**34 + 5), (2**40 - 1, 2**40), (5, 5), (0, 9), (1, 2**40))
    bands = [FoundBand(RankMask(1, kept + 3), Found(7, 3, equal)) for kept, equal in shares]
    expected = [solved.mask.low_positions for solved in ReferenceBackend().bands(bands, BF16)]
    rows = [solved.mask.row for solved in create_backend("triton").bands(bands, BF16)]
    assert [(int(row[LOW_FIRST.value]), int(row[LOW_LAST.value])) for row in rows] == expected


def test_a_gpu_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    backend = create_backend("triton")
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(DeviceMemoryError, match="ran out of memory; give the merge less of it"):
        backend.new_counts(0, [None])


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
