"""``device="auto"``: the GPU where a merge is expected to be faster there, and a line that says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SaveCheckpoint
from emulated_cuda.backend import EmulatedCudaBackend
from hypothesis import given
from hypothesis import strategies as st

import merge_engine as me
from merge_engine import backends
from merge_engine.backends.cpu import CpuBackend
from merge_engine.cli.app import app
from merge_engine.engine import choosing
from merge_engine.engine.choosing import Facts, choose_backend, facts_of
from merge_engine.storage import Mount, cores
from merge_engine.storage.machine import link_rate

GB = 10**9
RAM_TO_RAM_3B = Facts(inputs=19 * GB, disk=0, threads=16, cores=16, link=55e9)

facts = st.builds(
    Facts,
    inputs=st.integers(0, 10**13),
    disk=st.integers(0, 10**13),
    threads=st.integers(1, 256),
    cores=st.integers(1, 256),
    link=st.floats(1e9, 1e12),
)


@pytest.mark.parametrize(
    ("changed", "gpu", "reason"),
    (
        ({}, True, "computing on the GPU: expected 1.2 s on the CPU (the cores), 0.8 s on the GPU (the link"),
        ({"inputs": 42 * GB}, True, "expected 2.6 s on the CPU (the cores), 1.3 s on the GPU (the link"),
        ({"inputs": 6 * GB}, False, "computing on the CPU: expected 0.4 s on the CPU (the cores), 0.6 s on"),
        ({"disk": 19 * GB}, False, "computing on the CPU: expected 9.5 s on the CPU (the disk), 10.0 s on"),
        ({"disk": 6 * GB}, False, "expected 3.0 s on the CPU (the disk), 3.5 s on the GPU (the disk"),
        ({"link": 6e9}, False, "expected 1.2 s on the CPU (the cores), 3.7 s on the GPU (the link"),
        ({"threads": 4, "cores": 4}, True, "4.8 s on the CPU (the cores), 1.7 s on the GPU (the readers"),
        ({"threads": 4, "cores": 4, "disk": 6 * GB}, True, "4.8 s on the CPU (the cores), 3.5 s on the GPU"),
        ({"threads": 96, "cores": 96}, False, "computing on the CPU: expected 0.2 s"),
    ),
)
def test_the_choice(changed: dict[str, float], gpu: bool, reason: str) -> None:
    chosen, why = replace(RAM_TO_RAM_3B, **changed).choice()  # type: ignore[arg-type]
    assert chosen == gpu and reason in why


@given(facts)
def test_what_the_choice_depends_on(one: Facts) -> None:
    """A merge that a disk binds stays on the CPU. A faster link never sends one there, and more threads none away."""
    gpu, _ = one.choice()
    if one.on_cpu()[1] == "the disk":
        assert not gpu
    assert gpu <= replace(one, link=2 * one.link).choice()[0]
    assert gpu >= replace(one, threads=2 * one.threads).choice()[0]
    assert gpu >= replace(one, disk=2 * one.disk).choice()[0]


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, object]:
    folders = [save_checkpoint(name, {"w": torch.ones(1000, 100)}) for name in "ab"]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    return {"merge_method": "linear", "models": models}


def test_the_facts(recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "link_rate", lambda: 64e9)
    monkeypatch.setattr(
        choosing, "cached_share", lambda path, files: 0.75 if path.parent.name == "a" else 1.0
    )
    plan = me.plan(recipe)
    monkeypatch.setattr(Mount, "in_memory", False)
    assert facts_of(plan, tmp_path, 3) == Facts(800_000, 100_000 + 400_000, 3, cores(), 0.85 * 64e9)
    assert facts_of(plan, None).disk == 100_000
    monkeypatch.setattr(Mount, "in_memory", True)
    monkeypatch.setattr(choosing, "link_rate", lambda: None)
    assert facts_of(plan, tmp_path) == Facts(800_000, 100_000, cores(), cores(), 25e9)


def test_a_file_that_is_gone_is_reported_by_the_run(
    recipe: dict[str, object], gpu: type[Gpu], tmp_path: Path
) -> None:
    plan = me.plan(recipe)
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(me.CheckpointError, match=r"a/model\.safetensors"):
        me.run(plan)


class Gpu(CpuBackend):
    """A GPU that computes as the CPU does."""

    name = "gpu"
    free = 1 << 40

    def free_memory(self) -> int:
        return self.free


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Gpu]:
    monkeypatch.setattr(choosing, "any_driver", lambda: True)
    monkeypatch.setattr(backends, "any_driver", lambda: True)
    monkeypatch.setattr(backends, "_cuda", lambda index: Gpu())
    return Gpu


def test_auto_takes_the_device_that_is_expected_to_be_faster(
    recipe: dict[str, object], gpu: type[Gpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = me.run(recipe)
    assert len(merged.notes) == 1 and merged.notes[0].startswith(
        "computing on the CPU: expected 0.0 s on the CPU"
    )
    monkeypatch.setattr(choosing, "START", -1.0)
    assert [note[:20] for note in me.run(recipe).notes] == ["computing on the GPU"]
    plan = me.plan(recipe)
    assert choose_backend(plan, None).name == "gpu"
    assert choose_backend(plan, None, device="cpu").name == choose_backend(plan, None, "cpu").name == "cpu"
    monkeypatch.setattr(gpu, "free", 300 << 20)
    notes: list[str] = []
    assert choose_backend(plan, None, notes=notes).name == "cpu"
    assert notes[1:] == ["computing on the CPU: the GPU has only 300 MiB of free memory"]


def test_a_demanded_device_is_taken_without_a_reason(recipe: dict[str, object], gpu: type[Gpu]) -> None:
    assert me.run(recipe, device="cuda").notes == me.run(recipe, device="cpu").notes == []
    assert choose_backend(me.plan(recipe), None, device="cuda").name == "gpu"


def test_no_driver_is_loaded_for_a_merge_that_stays_on_the_cpu(
    recipe: dict[str, object], gpu: type[Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(index: int) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(backends, "_cuda", fail)
    assert me.run(recipe).tensors is not None


def test_nothing_is_looked_at_where_there_is_no_driver(
    recipe: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "any_driver", lambda: False)
    monkeypatch.setattr(backends, "any_driver", lambda: False)
    monkeypatch.setattr(choosing, "facts_of", lambda *_: pytest.fail("looked"))
    assert me.run(recipe).notes == []


def test_the_plan_says_why(
    recipe: dict[str, object],
    gpu: type[Gpu],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(str(recipe))
    app(["plan", str(file)], standalone_mode=False)
    assert "computing on the CPU: expected" in capsys.readouterr().out


def test_the_plan_tells_what_crosses_the_link(
    recipe: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("merge_engine.cli.app.backend_or_kind", lambda *_: EmulatedCudaBackend())
    file = tmp_path / "recipe.yaml"
    file.write_text(str(recipe))
    app(["plan", str(file), "--device", "cuda"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "0.8 MB up, 0.4 MB down" in shown and "at a time on the device" in shown


def test_the_rate_of_the_link(tmp_path: Path) -> None:
    def device(name: str, vendor: str, kind: str, speed: str, lanes: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        for file, text in zip(
            ("vendor", "class", "max_link_speed", "max_link_width"), (vendor, kind, speed, lanes), strict=True
        ):
            (folder / file).write_text(text + "\n")

    assert link_rate(tmp_path) is link_rate(tmp_path / "missing") is None
    device("a", "0x8086", "0x030000", "2.5 GT/s PCIe", "1")
    device("b", "0x10de", "0x040300", "2.5 GT/s PCIe", "1")  # the sound of a graphics card
    device("c", "0x10de", "0x030200", "Unknown", "255")
    assert link_rate(tmp_path) is None
    device("d", "0x10de", "0x030200", "32.0 GT/s PCIe", "16")
    assert link_rate(tmp_path) == 64e9
    device("e", "0x10de", "0x030000", "16.0 GT/s PCIe", "8")
    assert link_rate(tmp_path) == 16e9
