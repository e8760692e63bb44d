"""Merges over a link: the bytes of a merge in the host's memory, whatever the sizes of tensors, buffers and budgets.

The device here is the CPU behind a link, so that there are many cases in little time; tests/test_cuda_streaming.py
has an emulated one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import DTYPES, quantised_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import merge_engine as me
from merge_engine.backends.cpu import CpuBackend
from merge_engine.engine.mover import READ_THREADS, WRITE_THREADS
from merge_engine.errors import OutputError

KIB = 1 << 10
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "ties": {"density": 0.3, "trim_slack": 0.1, "weight": 0.5},
    "breadcrumbs": {"density": 0.4, "ties": "index", "trim_scope": "model", "weight": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2, "weight": 0.5},
}


class Linked(CpuBackend):
    """The CPU as a device: its memory is filled and emptied only by copies, which are counted."""

    name = "linked"
    has_link = True
    reads_in_place = False
    depth = 3

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.up = self.down = self.attached = self.copies = 0
        self._lock = threading.Lock()
        self.before_copy: Callable[[int], None] = lambda number: None

    def attach(self, nbytes: int, scratch: int, staging: memoryview) -> memoryview:
        self.attached = nbytes
        return super().attach(nbytes, scratch, staging)

    def _count(self) -> None:
        with self._lock:
            self.copies += 1
            number = self.copies
        self.before_copy(number)

    def upload(self, source: memoryview, target: memoryview) -> None:
        self._count()
        super().upload(source, target)

    def download(self, source: memoryview, target: memoryview) -> None:
        self._count()
        super().download(source, target)


@pytest.fixture(params=(32 * KIB, 100_000 // 4096 * 4096), ids=str)
def buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging buffers so small that tensors take several, and blocks of digests that no buffer ends with."""
    for name in ("batches.BATCH", "over_link.BUFFER"):
        monkeypatch.setattr(f"merge_engine.engine.{name}", request.param)
    monkeypatch.setattr(
        "merge_engine.engine.pipeline.STAGING", (READ_THREADS + WRITE_THREADS) * request.param
    )
    for name in ("engine.over_link.BLOCK", "observe.digests.BLOCK"):
        monkeypatch.setattr(f"merge_engine.{name}", 50_000)


def save(folder: Path, sizes: list[int], dtype: torch.dtype) -> list[str]:
    """A base and two models with tensors of so many elements, in rows of 64 where that works out.

    One tensor is only copied, and the first is unchanged.
    """
    states: list[dict[str, torch.Tensor]] = [{"ids": torch.arange(9000)} for _ in range(3)]
    for number, size in enumerate(sizes):
        base, tuned = quantised_models(size, 2, dtype, seed=number)
        for state, values in zip(states, (base, *tuned) if number else (base,) * 3, strict=True):
            state[f"layers.{number}.w"] = values.clone().view(
                -1, 64 if size and size % 64 == 0 else max(size, 1)
            )
    for name, state in zip("oab", states, strict=True):
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    return [str(folder / name) for name in "oab"]


def recipe_of(method: str, folders: list[str], **keys: Any) -> dict[str, Any]:
    base, *models = folders
    merged: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": model} for model in models],
        "parameters": METHODS[method],
    }
    return merged | ({} if method == "linear" else {"base_model": base}) | keys


def outcome(recipe: dict[str, Any], output: Path, **options: Any) -> tuple[Any, ...]:
    """All that must not depend on the way."""
    merged = me.run(recipe, output, **options)
    files = {file.name: file.read_bytes() for file in output.glob("*.safetensors")}
    return files, merged.counts, [tensor.elements for tensor in merged.per_tensor]


@pytest.mark.usefixtures("buffers")
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sizes=st.lists(
        st.integers(0, 1000).map(lambda rows: 64 * rows) | st.integers(0, 4000), min_size=1, max_size=6
    ),
    method=st.sampled_from(sorted(METHODS)),
    dtype=st.sampled_from(DTYPES),
    memory=st.integers(300, 3000).map(lambda kilobytes: kilobytes * 1000),
    shard_size=st.integers(10_000, 400_000),
)
def test_the_bytes_of_the_host(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    method: str,
    dtype: torch.dtype,
    memory: int,
    shard_size: int,
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    recipe = recipe_of(method, save(folder, sizes, dtype))
    expected = outcome(recipe, folder / "host", device="cpu", shard_size=shard_size)
    backend = Linked()
    found = outcome(recipe, folder / "link", backend=backend, memory=memory, shard_size=shard_size)
    assert found == expected
    in_memory = me.run(recipe, backend=backend, memory=memory)
    assert in_memory.tensors is not None
    assert all(
        torch.equal(t, me.run(recipe, device="cpu").tensors[name]) for name, t in in_memory.tensors.items()
    )
    schedule = me.schedule(me.plan(recipe), backend=backend, memory=memory)
    ledger = in_memory.ledger
    assert (ledger.up.bytes, ledger.down.bytes) == (schedule.bytes_up, schedule.bytes_down)
    assert backend.attached <= memory + 8 * 4096


@pytest.mark.usefixtures("buffers")
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_that_fails(tmp_path: Path, method: str) -> None:
    """Whichever of them does: the run ends with its error, and without an output."""
    recipe = recipe_of(method, save(tmp_path, [38_400, 5, 3000], torch.bfloat16))
    backend = Linked()
    me.run(recipe, tmp_path / "out", backend=backend, memory="400KB")
    copies = backend.copies

    def fail_at(number: int) -> None:
        if number == fails:
            raise OSError(f"copy {number} failed")

    backend.before_copy = fail_at
    for fails in {1, 2, copies // 2, copies - 1, copies}:
        backend.copies = 0
        with pytest.raises(OSError, match=f"copy {fails} failed"):
            me.run(recipe, tmp_path / f"out{fails}", backend=backend, memory="400KB")
        assert not list(tmp_path.glob(f"out{fails}/*"))


@pytest.mark.usefixtures("buffers")
def test_a_sink_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("ties", save(tmp_path, [38_400, 5, 3000], torch.bfloat16))

    def full(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr("merge_engine.checkpoint.writer.CheckpointWriter.write_batch", full)
    with pytest.raises(OutputError, match="the disk is full"):
        me.run(recipe, tmp_path / "out", backend=Linked(), memory="400KB")


def test_directions_at_the_same_time(tmp_path: Path) -> None:
    """While outputs of one tensor come down, inputs of the next go up."""
    recipe = recipe_of("ties", save(tmp_path, [0, *[32_000] * 6], torch.bfloat16))
    backend, seen = Linked(), set()
    under_way: set[str] = set()

    class Slow(Linked):
        def _slowly(self, way: str) -> None:
            under_way.add(way)
            seen.add(frozenset(under_way))
            time.sleep(0.05)
            under_way.discard(way)

        def upload(self, source: memoryview, target: memoryview) -> None:
            self._slowly("up")
            super().upload(source, target)

        def download(self, source: memoryview, target: memoryview) -> None:
            self._slowly("down")
            super().download(source, target)

    backend = Slow()
    me.run(recipe, backend=backend, memory="700KB")
    assert frozenset(("up", "down")) in seen
