"""Merges streamed over a device: the bytes of the CPU, in bounded device memory, also after errors.

The device is emulated, and does all work as late as it may (tests/emulated_cuda).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import quantised_models
from emulated_cuda.backend import EmulatedCudaBackend, load, set_schedule

import merge_engine as me
from merge_engine.engine.mover import READ_THREADS, WRITE_THREADS
from merge_engine.engine.scheduling import SMALLEST_DEVICE_MEMORY
from merge_engine.errors import DeviceMemoryError, NonFiniteError, PlanError
from merge_engine.planning import DEFAULT_MEMORY
from merge_engine.storage import PAGE

SHAPES = {"embed.weight": (300, 64), "layers.0.w": (64, 64), "layers.0.norm": (64,), "layers.1.w": (65, 33)}
METHODS = {
    "ties": {"density": 0.3, "trim_slack": 0.05, "sign_slack": 0.5, "weight": 0.5},
    "dare_ties": {"density": 0.4, "weight": 0.7},
    "della": {"density": 0.5, "epsilon": 0.2, "weight": 0.5},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.1, "ties": "index", "weight": 1.0},
    "task_arithmetic": {"weight": 0.4},
    "linear": {"weight": 0.5},
    "nuslerp": {"weight": 0.5, "nuslerp_flatten": False},
    "multislerp": {"weight": 0.5},
    "model_stock": {"filter_wise": True},
    "nearswap": {"t": 0.001},
    "ramplus_tl": {"epsilon": 0.001},
    "sce": {"select_topk": 0.3, "ties": "index"},
    "arcee_fusion": {},
}
ONE_READING = ("linear", "task_arithmetic", "nearswap", "nuslerp", "model_stock")
"""Methods that measure nothing, or lines of their own, which are merged as they are measured."""


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


def with_method(recipe: dict, method: str) -> dict:
    """What differs in a recipe for this method, which may take one model only."""
    models = recipe["models"][: me.METHODS[method].max_models]
    return {"merge_method": method, "parameters": METHODS[method], "models": models}


def digest(folder: Path) -> str:
    return json.loads((folder / "merge_manifest.json").read_text())["digest"]


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_and_counts_as_the_cpu(backend, recipe: dict, tmp_path: Path, method: str) -> None:
    recipe |= with_method(recipe, method)
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
    monkeypatch.setattr("merge_engine.engine.carrying.SMALLEST_DEVICE_MEMORY", 1000)
    monkeypatch.setattr("merge_engine.backends.cuda.link.HEADROOM", 0)
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
    assert not backend._link.attached


def test_resident_tensors(backend, recipe: dict, monkeypatch) -> None:
    monkeypatch.setattr("merge_engine.engine.resident._backend_for", lambda *_: backend)
    base, tuned = quantised_models(5001, 2, torch.bfloat16)
    merged = me.merge_tensors(base, tuned, "ties", density=0.3, trim_slack=0.1)
    monkeypatch.undo()
    assert torch.equal(merged, me.merge_tensors(base, tuned, "ties", density=0.3, trim_slack=0.1))


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging buffers and blocks of digests so small that tensors take several, and end in the middle of one."""
    buffer = 32 << 10
    for name in ("batches.BATCH", "over_link.BUFFER"):
        monkeypatch.setattr(f"merge_engine.engine.{name}", buffer)
    monkeypatch.setattr("merge_engine.engine.pipeline.STAGING", (READ_THREADS + WRITE_THREADS) * buffer)
    for name in ("engine.over_link.BLOCK", "observe.digests.BLOCK"):
        monkeypatch.setattr(f"merge_engine.{name}", 25_000)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", ("120KB", "300KB", "400MB"))
def test_tensors_larger_than_a_buffer(
    backend, recipe: dict, tmp_path: Path, method: str, memory: str
) -> None:
    recipe |= with_method(recipe, method)
    me.run(recipe, tmp_path / "cpu", device="cpu", shard_size="20KB")
    me.run(recipe, tmp_path / "cuda", backend=backend, memory=memory, shard_size="20KB")
    assert digest(tmp_path / "cuda") == digest(tmp_path / "cpu")


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("method", METHODS)
def test_inputs_go_up_once_if_they_fit(backend, recipe: dict, tmp_path: Path, method: str) -> None:
    recipe |= with_method(recipe, method)
    size = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    inputs = len(recipe["models"]) + (method != "linear")
    for memory in ("400MB", "120KB"):
        merged = me.run(recipe, tmp_path / memory, backend=backend, memory=memory)
        schedule = me.schedule(me.plan(recipe), backend=backend, memory=memory)
        assert (merged.ledger.up.bytes, merged.ledger.down.bytes) == (schedule.bytes_up, schedule.bytes_down)
        assert merged.ledger.down.bytes == size
        assert (merged.ledger.up.bytes == inputs * size) == (memory == "400MB" or method in ONE_READING)


def test_what_is_only_copied_does_not_cross_the_link(backend, save_checkpoint, tmp_path: Path) -> None:
    """Nor does it need room on the device."""
    ids = torch.arange(300_000)
    states = [{"ids": ids, "w": torch.ones(5)}, {"ids": ids.clone(), "w": torch.zeros(5)}]
    folders = [str(save_checkpoint(name, state)) for name, state in zip("ab", states, strict=True)]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f, "parameters": {"weight": 1}} for f in folders],
    }
    expected = me.run(recipe, tmp_path / "cpu", device="cpu", memory="100KB")
    merged = me.run(recipe, tmp_path / "cuda", backend=backend, memory="100KB")
    assert digest(tmp_path / "cuda") == digest(tmp_path / "cpu")
    assert [t.elements for t in merged.per_tensor] == [t.elements for t in expected.per_tensor]
    assert merged.ledger.up.bytes == 2 * 5 * 4
    states[1]["ids"][-1] = 0
    recipe["models"][1]["model"] = str(save_checkpoint("c", states[1]))
    with pytest.raises(
        PlanError, match=r"ids: .* must be the same in all inputs, but .*/c differs from .*/a"
    ):
        me.run(recipe, tmp_path / "differing", backend=backend)
    assert not list(tmp_path.glob("differing/*.safetensors*"))


class Full:
    """The native module, on a device where one allocation fails: the one with number ``fails``, from 0.

    ``first`` is the number of bytes that are asked for first: memory for inputs and outputs.
    """

    def __init__(self) -> None:
        self.made, self.fails, self.first = 0, -1, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(load(), name)

    def DeviceMemory(self, queue: Any, **asked: Any) -> Any:
        self.first = self.first or asked["nbytes"]
        self.made += 1
        if self.made == self.fails + 1:
            raise MemoryError
        return load().DeviceMemory(queue, **asked)


@pytest.mark.parametrize("method", ("ties", "della", "breadcrumbs_ties"))
def test_a_device_that_is_full(recipe: dict, tmp_path: Path, monkeypatch, method: str) -> None:
    """Whichever allocation fails: the first means smaller pieces, a later one an error, and no output."""
    monkeypatch.setattr("merge_engine.engine.carrying.SMALLEST_DEVICE_MEMORY", 1000)
    recipe |= {"merge_method": method, "parameters": METHODS[method]}
    me.run(recipe, tmp_path / "cpu", device="cpu")
    native = Full()
    backend = EmulatedCudaBackend(native)
    me.run(recipe, tmp_path / "cuda", backend=backend, memory="200KB")
    assert digest(tmp_path / "cuda") == digest(tmp_path / "cpu")
    made = native.made
    for fails in range(made):
        native.made, native.fails = 0, fails
        output = tmp_path / f"out{fails}"
        if fails == 0:
            merged = me.run(recipe, output, backend=backend, memory="400KB")
            assert any("short of memory" in note for note in merged.notes)
            assert digest(output) == digest(tmp_path / "cpu")
            continue
        with pytest.raises(DeviceMemoryError, match="CUDA device 0 ran out of memory; give the merge less"):
            me.run(recipe, output, backend=backend, memory="200KB")
        assert not list(output.glob("*"))


def test_device_memory_is_within_the_budget(recipe: dict) -> None:
    recipe |= {"merge_method": "ties", "parameters": METHODS["ties"]}
    for memory in (80_000, 120_000, 300_000, 10**9):
        native = Full()
        me.run(recipe, backend=EmulatedCudaBackend(native), memory=memory)
        assert native.first <= memory + 8 * PAGE


def test_the_budget_follows_the_device(backend, recipe: dict, monkeypatch) -> None:
    recipe |= {"merge_method": "ties", "parameters": METHODS["ties"]}
    plan = me.plan(recipe)
    for free, budget in ((80 << 30, 20 << 30), (1 << 20, SMALLEST_DEVICE_MEMORY)):
        monkeypatch.setattr(backend._native, "free_memory", lambda device, free=free: free)
        assert me.schedule(plan, backend=backend).budget.memory == budget
        assert me.schedule(plan, backend=backend, memory="1GB").budget.memory == 10**9
    assert me.schedule(plan, device="cpu").budget.memory == DEFAULT_MEMORY
