"""Merges streamed over a device: the bytes of the CPU, in bounded device memory, also after errors.

The device is emulated, and does all work as late as it may (tests/emulated_cuda).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adversarial import quantised_models
from emulated_cuda.backend import EmulatedCudaBackend, set_schedule

import merge_engine as me
from merge_engine.errors import DeviceMemoryError, NonFiniteError

SHAPES = {"embed.weight": (300, 64), "layers.0.w": (64, 64), "layers.0.norm": (64,), "layers.1.w": (65, 33)}
METHODS = {
    "ties": {"density": 0.3, "trim_slack": 0.05, "sign_slack": 0.5, "weight": 0.5},
    "dare_ties": {"density": 0.4, "weight": 0.7},
    "della": {"density": 0.5, "epsilon": 0.2, "weight": 0.5},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.1, "ties": "index", "weight": 1.0},
    "task_arithmetic": {"weight": 0.4},
    "linear": {"weight": 0.5},
}


@pytest.fixture(scope="module")
def backend() -> EmulatedCudaBackend:
    return EmulatedCudaBackend()


@pytest.fixture
def recipe(save_checkpoint) -> dict:
    states = [{}, {}, {}]
    for name, shape in SHAPES.items():
        base, tuned = quantised_models(torch.Size(shape).numel(), 2, torch.bfloat16, seed=len(name))
        for state, values in zip(states, (base, *tuned), strict=True):
            state[name] = values.view(shape)
    base, a, b = (str(save_checkpoint(name, state)) for name, state in zip("bxy", states, strict=True))
    return {"base_model": base, "models": [{"model": a}, {"model": b}], "seed": 3}


def digest(folder: Path) -> str:
    return json.loads((folder / "merge_manifest.json").read_text())["digest"]


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_and_counts_as_the_cpu(backend, recipe: dict, tmp_path: Path, method: str) -> None:
    recipe |= {"merge_method": method, "parameters": METHODS[method]}
    expected = me.run(recipe, tmp_path / "cpu", device="cpu")
    for memory in ("400MB", "200KB"):  # at once, and in pieces
        merged = me.run(recipe, tmp_path / memory, backend=backend, memory=memory)
        assert digest(tmp_path / memory) == digest(tmp_path / "cpu")
        assert merged.counts == expected.counts


@pytest.mark.parametrize("seed", range(1, 7))
def test_whichever_stream_gets_on(backend, recipe: dict, tmp_path: Path, seed: int) -> None:
    """Streams are late in the other tests. Here each has done some more of its work whenever work is handed in."""
    recipe |= {"merge_method": "ties", "parameters": METHODS["ties"]}
    expected = me.run(recipe, tmp_path / "cpu", device="cpu")
    set_schedule(seed)
    try:
        merged = me.run(recipe, tmp_path / "cuda", backend=backend, memory="200KB")
    finally:
        set_schedule(0)
    assert digest(tmp_path / "cuda") == digest(tmp_path / "cpu")
    assert merged.counts == expected.counts


@pytest.mark.parametrize("scope", ("tensor", "model"))
def test_one_threshold_for_a_model(backend, recipe: dict, scope: str) -> None:
    parameters = {"density": 0.2, "trim_slack": 0.1, "weight": 0.5, "trim_scope": scope}
    recipe |= {"merge_method": "ties", "parameters": parameters}
    expected = me.run(recipe, device="cpu")
    merged = me.run(recipe, backend=backend)
    assert all(torch.equal(merged.tensors[name], expected.tensors[name]) for name in SHAPES)
    assert merged.counts == expected.counts


def test_less_device_memory_means_smaller_pieces(backend, recipe: dict, monkeypatch) -> None:
    recipe |= {"merge_method": "ties", "parameters": METHODS["ties"]}
    expected = me.run(recipe, device="cpu")
    monkeypatch.setattr("merge_engine.engine.run.SMALLEST_DEVICE_MEMORY", 1000)
    monkeypatch.setattr("merge_engine.backends.cuda.mirror.HEADROOM", 0)
    free = 100_000
    monkeypatch.setattr(backend._native, "free_memory", lambda device: free)
    merged = me.run(recipe, backend=backend, memory="1MB")
    assert any("short of memory" in note for note in merged.notes)
    assert all(torch.equal(merged.tensors[name], expected.tensors[name]) for name in SHAPES)
    free = 100
    with pytest.raises(DeviceMemoryError, match=r"CUDA device 0 has less than .* of free memory"):
        me.run(recipe, backend=backend, memory="1MB")


def test_nan_is_found_on_the_device(backend, recipe: dict, save_checkpoint, tmp_path: Path) -> None:
    base = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    base["layers.0.w"][3, 3] = float("nan")
    recipe |= {"merge_method": "ties", "parameters": METHODS["ties"]}
    recipe["base_model"] = str(save_checkpoint("broken", base))
    with pytest.raises(NonFiniteError, match=r"layers\.0\.w holds 1 NaN"):
        me.run(recipe, tmp_path / "out", backend=backend)
    assert not list(tmp_path.glob("out/*.safetensors*"))
    assert not backend._mirror.attached


def test_resident_tensors(backend, recipe: dict, monkeypatch) -> None:
    monkeypatch.setattr("merge_engine.engine.resident._backend_for", lambda *_: backend)
    base, tuned = quantised_models(5001, 2, torch.bfloat16)
    merged = me.merge_tensors(base, tuned, "ties", density=0.3, trim_slack=0.1)
    monkeypatch.undo()
    assert torch.equal(merged, me.merge_tensors(base, tuned, "ties", density=0.3, trim_slack=0.1))
