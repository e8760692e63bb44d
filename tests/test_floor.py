"""The floor of a merge on a machine whose limits were measured, and the stage that bound a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SaveCheckpoint
from rich.console import Console

import merge_engine as me
from merge_engine.backends.cpu import CpuBackend
from merge_engine.bench.floor import Resource, floor, resources
from merge_engine.bench.limits import DiskLimits, Limits, load_limits, save_limits
from merge_engine.cli import show
from merge_engine.observe.ledger import Ledger, Stage
from merge_engine.storage import mount_of

NAMES = ["disk read", "page cache", "memory", "disk write"]


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, object]:
    tensors = {"w": torch.randn(300, 500, dtype=torch.bfloat16)}
    a, b = (save_checkpoint(name, {**tensors, "v": torch.ones(7)}) for name in "ab")
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in (a, b)]
    return {"merge_method": "linear", "models": models}


def test_a_run_is_bound_by_the_stage_that_was_busy_for_most_of_it() -> None:
    ledger = Ledger(read=Stage(1, 2.0), compute=Stage(1, 3.9), write=Stage(1, 1.0), seconds=4.0)
    assert ledger.bound_by == "compute"
    assert ledger.as_dict()["bound_by"] == "compute"
    assert Ledger(read=Stage(1, 1.9), compute=Stage(1, 1.0), seconds=4.0).bound_by is None
    assert Ledger().bound_by is None


def test_the_floor_is_the_slowest_part_and_a_disk_is_read_one_way_at_a_time() -> None:
    ways = (Resource("direct read", "storage", 30, 10.0), Resource("disk read", "storage", 20, 10.0))
    others = (
        Resource("memory", "memory", 400, 100.0),
        Resource("page cache", "page cache", 0, None),
        Resource("disk write", "disk write", 30, 10.0),
    )
    assert floor((*ways, *others)) == 5.0
    assert floor((ways[0], *others)) == 4.0
    assert floor((*ways, Resource("link", "link", 1, None))) is None


def shown(plan: me.MergePlan, output: Path | None) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        show.plan(console, me.schedule(plan, device="cpu"), output, "cached", CpuBackend, [])
    return capture.get()


def test_without_limits_nothing_is_claimed(recipe: dict[str, object], tmp_path: Path) -> None:
    assert "doctor --measure" in shown(me.plan(recipe), tmp_path / "out")
    me.run(recipe, tmp_path / "out")
    assert load_limits() == Limits()  # nor does a run measure or remember anything


def test_a_plan_says_what_moving_the_bytes_takes(recipe: dict[str, object], tmp_path: Path) -> None:
    save_limits(Limits(memory=1e10, disks={str(mount_of(tmp_path)): DiskLimits(1e6, 1e6, 1e9, 5e8)}))
    plan = me.plan(recipe)
    found = resources(me.schedule(plan, device="cpu"), "cached", tmp_path / "out", load_limits(), CpuBackend)
    assert [resource.name for resource in found] == NAMES
    moved = 2 * (300 * 500 * 2 + 7 * 4)
    assert {r.name: r.bytes for r in found}["memory"] == moved + moved // 2
    assert {r.name: r.bytes for r in found}["disk write"] == moved // 2
    text = shown(plan, tmp_path / "out")
    assert "floor" in text and "s to move the bytes" in text
    assert "disk write" not in shown(plan, None)


def test_a_manifest_says_what_a_run_was_bound_by(recipe: dict[str, object], tmp_path: Path) -> None:
    result = me.run(recipe, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["ledger"]["bound_by"] == result.ledger.bound_by
    assert "usage" not in manifest and "predicted" not in manifest
