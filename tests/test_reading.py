"""In which way a run reads its inputs: by what they take of the available memory, and by nothing else."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import given
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.backends import create_backend
from merge_engine.checkpoint import open_checkpoint
from merge_engine.checkpoint.source import SafetensorsCheckpoint
from merge_engine.engine import reading
from merge_engine.engine.limits import DiskLimits, Limits, save_limits
from merge_engine.storage.files import File
from merge_engine.storage.mounts import Mount, mount_of
from merge_engine.storage.ranges import ByteRange, CopiedRange, Way
from merge_engine.storage.reading import choose_way


@given(st.lists(st.integers(0, 1 << 40), max_size=5), st.integers(0, 1 << 42))
def test_half_of_the_available_memory(sizes: list[int], available: int) -> None:
    files = [File(Path(f"/models/{number}"), size, 0) for number, size in enumerate(sizes)]
    assert choose_way(files, available) == ("cached" if 2 * sum(sizes) <= available else "direct")


def test_links_to_one_file_take_its_memory_once(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(100))
    for name in "ab":
        (tmp_path / name).symlink_to("blob")
    files = [File.of(tmp_path / name) for name in "ab"]
    assert choose_way(files, 200) == "cached" and choose_way(files, 199) == "direct"


def test_elements_between_their_multiples_are_copied(tmp_path: Path) -> None:
    """safetensors allows headers of any length."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((1 - len(header)) % 4)
    values = struct.pack("<3f", 1, 2, 3)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values)
    ways: tuple[Way, ...] = ("direct", "cached")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["w"].start % 4 == 1 and not checkpoint.maps("w")
        for way in ways:
            some = checkpoint.range("w", 0, 12, way, in_place=True)
            assert isinstance(some, CopiedRange)
            memory = memoryview(bytearray(12))
            some.read(memory, 0, 12)
            assert bytes(some.view(memory)) == values


PLENTY, NOTHING = 1 << 40, 0
LIMITS = {"unknown": (), "slower": (2e9, 1e9, 1e10, 1e9), "faster": (1e9, 3e9, 1e10, 1e9)}


@pytest.mark.parametrize("limits", LIMITS)  # which decide nothing
@pytest.mark.parametrize("memory", ("400MB", "400KB"))  # inputs are read once, or twice
@pytest.mark.parametrize(
    ("available", "local", "in_place", "chosen"),
    (
        (PLENTY, True, True, "mapped"),
        (PLENTY, False, True, "copied"),  # a network is read a page at a time through mappings
        (PLENTY, True, False, "copied"),  # a device takes its inputs from memory of our own
        (NOTHING, True, True, "direct"),
        (NOTHING, False, True, "direct"),
    ),
)
def test_the_choice(
    save_checkpoint: SaveCheckpoint,
    tmp_path: Path,
    limits: str,
    memory: str,
    available: int,
    local: bool,
    in_place: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, a = (save_checkpoint(name, {"w": torch.randn(300, 500).bfloat16()}) for name in ("base", "a"))
    recipe = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(a), "parameters": {"weight": 1, "density": 0.5}}],
    }
    disks = {str(mount_of(tmp_path)): DiskLimits(*LIMITS[limits])} if LIMITS[limits] else {}
    save_limits(Limits(memory=1e10, disks=disks))
    backend = create_backend("cpu")
    monkeypatch.setattr(backend, "reads_in_place", in_place)
    seen: Counter[str] = Counter()
    original = SafetensorsCheckpoint.range

    def note(self: SafetensorsCheckpoint, *arguments: Any, **more: Any) -> ByteRange:
        some = original(self, *arguments, **more)
        seen[type(some).__name__.removesuffix("Range").lower()] += 1
        return some

    with monkeypatch.context() as patch:
        patch.setattr(reading, "available_memory", lambda: available)
        patch.setattr(Mount, "local", local)
        patch.setattr(SafetensorsCheckpoint, "range", note)
        planned: list[me.Plan] = []
        result = me.run(recipe, tmp_path / "out", memory=memory, backend=backend, on_plan=planned.append)
    assert set(seen) == {chosen}
    assert planned[0].in_place == (chosen == "mapped")
    assert result.usage is not None
    moved = {resource.name: resource.bytes for resource in result.usage.resources}
    nbytes = planned[0].bytes_read
    assert nbytes == (2 if memory == "400KB" and chosen != "mapped" else 1) * 2 * 300 * 500 * 2
    assert moved["direct read"] == (nbytes if chosen == "direct" else 0)
    if chosen == "mapped":
        assert moved["page cache"] == 0
    me.run(recipe, tmp_path / "again")
    first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_system_that_does_not_say_what_is_available(
    save_checkpoint: SaveCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise OSError("nothing known")

    folder = save_checkpoint("a", {"w": torch.randn(30, 50)})
    monkeypatch.setattr(reading, "available_memory", fail)
    models = [{"model": str(folder), "parameters": {"weight": 1}}]
    with me.plan({"merge_method": "linear", "models": models}) as plan:
        assert reading.choose_reading(plan, create_backend("cpu")).way == "cached"
