"""The way in which a run reads its inputs: only their size and the available memory decide it."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint
from emulated_cuda.backend import EmulatedCudaBackend
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import merge_engine as me
from merge_engine.backends import Backend
from merge_engine.backends.cpu import CpuBackend
from merge_engine.bench.limits import DiskLimits, Limits, save_limits
from merge_engine.checkpoint import open_checkpoint
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.operands import Access, Stored
from merge_engine.planning import DEFAULT_MEMORY, DEVICE_PIECE, PIECE, MergePlan
from merge_engine.storage import File, Mount, OpenFiles, Way, choose_way, mount_of, reading

PLENTY, NOTHING = 1 << 40, 0
SHAPE = (800, 700)  # in bfloat16 above what is too small to be read past the page cache
NBYTES = 2 * 800 * 700


@given(st.lists(st.integers(0, 1 << 40), max_size=5), st.integers(0, 1 << 42))
def test_half_of_the_available_memory(sizes: list[int], available: int) -> None:
    files = [File(Path(f"/models/{number}"), size, 0, number) for number, size in enumerate(sizes)]
    assert choose_way(files, available) == ("cached" if sum(sizes) <= available / 2 else "direct")


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5), st.integers(0, 1 << 42), st.randoms())
def test_the_choice_knows_neither_order_nor_other_runs(sizes: list[int], available: int, draw: Any) -> None:
    """More memory never sends a run past the page cache, and more files never into it."""
    files = [File(Path(f"/models/{number}"), size, 0, number) for number, size in enumerate(sizes)]
    way = choose_way(files, available)
    draw.shuffle(files)
    assert choose_way(files, available) == choose_way(frozenset(files), available) == way
    if way == "cached":
        assert choose_way(files, available + 1) == choose_way(files[1:], available) == "cached"
    else:
        assert choose_way(files, available - 1) == "direct"


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, object]:
    base, a = (save_checkpoint(name, {"w": torch.randn(SHAPE).bfloat16()}) for name in ("base", "a"))
    return {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(a), "parameters": {"weight": 1, "density": 0.5}}],
    }


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests are."""
    monkeypatch.setattr(Mount, "in_memory", False)


def test_files_on_a_ram_disk_take_no_memory(
    recipe: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "available_memory", lambda: NOTHING)
    for in_memory, way in ((True, "cached"), (False, "direct")):
        monkeypatch.setattr(Mount, "in_memory", in_memory)
        with open_access(me.plan(recipe), CpuBackend) as access:
            assert access.way == way


@pytest.mark.parametrize(
    ("backend", "available", "local", "way", "in_place"),
    (
        (CpuBackend, PLENTY, True, "cached", True),
        (CpuBackend, PLENTY, False, "cached", False),  # a network is read a page at a time through mappings
        (
            EmulatedCudaBackend,
            PLENTY,
            True,
            "cached",
            False,
        ),  # a device takes its inputs from memory of our own
        (CpuBackend, NOTHING, True, "direct", False),
        (CpuBackend, NOTHING, False, "direct", False),
        (EmulatedCudaBackend, NOTHING, True, "direct", False),
    ),
)
def test_what_is_used_in_place(
    recipe: dict[str, object],
    backend: type[Backend],
    available: int,
    local: bool,
    way: Way,
    in_place: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a backend as for its class, which a plan is shown with where nothing runs."""
    monkeypatch.setattr(reading, "available_memory", lambda: available)
    monkeypatch.setattr(Mount, "local", local)
    plan = me.plan(recipe)
    for chosen in (backend, backend()):
        with open_access(plan, chosen) as access:
            assert access.way == way
            budget = schedule_for(plan, access, chosen, DEFAULT_MEMORY).budget
        assert budget.in_place == in_place
        assert (budget.memory, budget.piece) == (DEFAULT_MEMORY, DEVICE_PIECE if backend.has_link else PIECE)


def test_the_boundary(recipe: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = me.plan(recipe)
    needed = 2 * sum(file.size for file in plan.files)
    assert len(plan.files) == 2 and needed > 2 * 2 * NBYTES
    for available, way in ((needed, "cached"), (needed - 1, "direct")):
        monkeypatch.setattr(reading, "available_memory", lambda available=available: available)
        with open_access(plan, CpuBackend) as access:
            assert access.way == way


def test_a_system_that_does_not_say_what_is_available(
    recipe: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise OSError("nothing known")

    monkeypatch.setattr(reading, "available_memory", fail)
    with open_access(me.plan(recipe), CpuBackend) as access:
        assert access.way == "direct"


def test_one_tensor_that_cannot_be_mapped_is_enough(recipe: dict[str, object], tmp_path: Path) -> None:
    """Then the inputs take memory, all of them: a schedule either has a ring for them or has none."""

    def in_place(model: Path) -> bool:
        plan = me.plan(
            {**recipe, "models": [{"model": str(model), "parameters": {"weight": 1, "density": 1}}]}
        )
        with open_access(plan, CpuBackend) as access:
            assert access.way == "cached"
            return schedule_for(plan, access, CpuBackend, DEFAULT_MEMORY).budget.in_place

    if not mount_of(tmp_path).local:
        pytest.skip("nothing is mapped on this file system")
    plain, odd, pickled = (tmp_path / name for name in ("plain", "odd", "pickled"))
    for folder in (plain, odd, pickled):
        folder.mkdir()
    w = torch.randn(SHAPE).bfloat16()
    save_file({"w": w}, plain / "model.safetensors")
    write_unaligned(odd / "model.safetensors", "BF16", SHAPE, bytes(w.view(torch.uint8).flatten().tolist()))
    torch.save({"w": w}, pickled / "pytorch_model.bin")
    assert in_place(plain)
    assert not in_place(odd) and not in_place(pickled)


def write_unaligned(path: Path, code: str, shape: tuple[int, ...], values: bytes) -> None:
    """safetensors allows headers of any length: the data begin at an odd byte."""
    header = json.dumps({"w": {"dtype": code, "shape": shape, "data_offsets": [0, len(values)]}}).encode()
    header += b" " * ((1 - len(header)) % 4)
    path.write_bytes(struct.pack("<Q", len(header)) + header + values)


def test_elements_between_their_multiples_are_copied(tmp_path: Path) -> None:
    values = struct.pack("<3f", 1, 2, 3)
    write_unaligned(tmp_path / "model.safetensors", "F32", (3,), values)
    w = open_checkpoint(tmp_path).tensors["w"]
    assert isinstance(w, Stored) and w.position % 4 == 1
    ways: tuple[Way, ...] = ("direct", "cached")
    for way in ways:
        with OpenFiles() as files:
            access = Access(files, way, in_place=True)
            assert not w.maps(access)
            some = w.range(0, 3, access)
            assert some.length == some.room == 12
            memory = memoryview(bytearray(12))
            some.read(memory, 0, 12)
            assert bytes(some.view(memory)) == bytes(memory) == values


LIMITS = {"unknown": (), "slower": (2e9, 1e9, 1e10, 1e9), "faster": (1e9, 3e9, 1e10, 1e9)}


@pytest.mark.parametrize("limits", LIMITS)  # which decide nothing
@pytest.mark.parametrize("memory", ("400MB", "2MB"))  # what is not in place is read once, or twice
@pytest.mark.parametrize(
    ("available", "local", "chosen"),
    (
        (PLENTY, True, "mapped"),
        (PLENTY, False, "cached"),
        (NOTHING, True, "direct"),
        (NOTHING, False, "direct"),
    ),
)
def test_a_run_reads_in_the_way_that_is_chosen(
    recipe: dict[str, object],
    tmp_path: Path,
    limits: str,
    memory: str,
    available: int,
    local: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And every way gives the same bytes."""
    disks = {str(mount_of(tmp_path)): DiskLimits(*LIMITS[limits])} if LIMITS[limits] else {}
    save_limits(Limits(memory=1e10, disks=disks))
    plan = me.plan(recipe)
    if not can(chosen, plan):
        pytest.skip(f"this file system cannot be read {chosen}")
    with monkeypatch.context() as patch, watched(plan.files) as read:
        patch.setattr(reading, "available_memory", lambda: available)
        patch.setattr(Mount, "local", local)
        scheduled: list[me.Schedule] = []
        me.run(plan, tmp_path / "out", backend="cpu", memory=memory, on_schedule=scheduled.append)
    [schedule] = scheduled
    assert schedule.budget.in_place == (chosen == "mapped")
    assert schedule.bytes_read == (2 if memory == "2MB" and chosen != "mapped" else 1) * 2 * NBYTES
    if chosen == "mapped":
        assert not read
    elif chosen == "cached":
        assert read == {"cached": schedule.bytes_read}
    else:  # whole pages, and one where it was tried whether that works
        assert read.keys() == {"direct"}
        assert schedule.bytes_read <= read["direct"] <= schedule.bytes_read * 1.1
    me.run(recipe, tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


@contextmanager
def watched(files: Collection[File]) -> Iterator[dict[str, int]]:
    """Bytes that are read of the files by system calls, by the way that the descriptor was opened for."""
    inodes = {file.path.stat().st_ino for file in files}
    preadv, lock, read = os.preadv, threading.Lock(), dict[str, int]()

    def counted(descriptor: int, *arguments: Any) -> int:
        got = preadv(descriptor, *arguments)
        if os.fstat(descriptor).st_ino in inodes:
            way = "direct" if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT else "cached"
            with lock:
                read[way] = read.get(way, 0) + got
        return got

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        yield read


def can(chosen: str, plan: MergePlan) -> bool:
    with OpenFiles() as files:
        if chosen == "mapped":
            return all(files.mapping(file) is not None for file in plan.files)
        return chosen == "cached" or all(files.direct_descriptor(file) >= 0 for file in plan.files)


def test_small_tensors_are_not_worth_a_request_of_their_own(save_checkpoint: SaveCheckpoint) -> None:
    """In a run that reads past the page cache they come through it, which reads ahead."""
    folder = save_checkpoint("a", {"large": torch.zeros(1 << 18), "small": torch.ones((1 << 18) - 1)})
    tensors = open_checkpoint(folder).tensors
    [file] = {file for operand in tensors.values() for file in operand.files}
    with OpenFiles() as files:
        if files.direct_descriptor(file) < 0:
            pytest.skip("this file system cannot be read direct")
        access = Access(files, "direct", in_place=False)
        for name, way in (("large", "direct"), ("small", "cached")):
            some = tensors[name].range(0, tensors[name].count, access)
            with watched([file]) as read:
                some.read(memoryview(bytearray(some.room)), 0, some.length)
            assert read.keys() == {way}
