"""What a run uses of the machine: foretold, accounted for, printed and written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SaveCheckpoint
from rich.console import Console

import merge_engine as me
from merge_engine.backends import create_backend
from merge_engine.cli import show
from merge_engine.engine import usage
from merge_engine.engine.ledger import Ledger, Stage
from merge_engine.engine.limits import DiskLimits, Limits, load_limits, save_limits
from merge_engine.engine.reading import Reading
from merge_engine.engine.usage import Resource, Usage
from merge_engine.storage.mounts import mount_of

NAMES = ["direct read", "disk read", "page cache", "memory", "disk write"]


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, object]:
    tensors = {"w": torch.randn(300, 500, dtype=torch.bfloat16)}
    a, b = (save_checkpoint(name, {**tensors, "v": torch.ones(7)}) for name in "ab")
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in (a, b)]
    return {"merge_method": "linear", "models": models}


def test_floor_shares_and_what_binds() -> None:
    resources = (Resource("disk read", 2 * 10**9, 1e9), Resource("memory", 10**9, 1e10))
    done = Usage(resources, compute=1.5, digest=0.2, seconds=4.0)
    assert done.floor == 2.0
    assert done.shares() == {"disk read": 0.5, "memory": 0.025, "compute": 0.375, "digest": 0.05}
    assert done.bound_by == "disk read"
    assert Usage(resources, 3.9, 0.2, 4.0).bound_by == "compute"
    assert Usage(resources, 1.0, 0.2, 5.0).bound_by is None


def test_without_limits_nothing_is_claimed() -> None:
    done = Usage((Resource("disk read", 10**9, None), Resource("page cache", 0, None)), 1.0, 0.0, 4.0)
    assert done.floor is None and done.bound_by is None
    assert done.shares() == {"compute": 0.25, "digest": 0.0}


def shown(result: me.MergeResult) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        show.result(console, result)
    return capture.get()


def test_a_machine_that_was_not_measured(recipe: dict[str, object], tmp_path: Path) -> None:
    result = me.run(recipe, tmp_path / "out")
    assert result.usage is not None and result.predicted is not None
    assert result.usage.floor is None and result.predicted.seconds is None
    assert "doctor --measure" in shown(result)
    assert load_limits() == Limits()  # nor does a run remember anything


def test_prediction_and_outcome(
    recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "_TELLING", 1)
    save_limits(Limits(memory=1e10, disks={str(mount_of(tmp_path)): DiskLimits(1e6, 1e6, 1e9, 5e8)}))
    first, second = (me.run(recipe, tmp_path / name) for name in ("first", "second"))
    assert first.predicted is not None and first.predicted.seconds is None
    foretold, done = second.predicted, second.usage
    assert foretold is not None and done is not None
    assert [resource.name for resource in done.resources] == NAMES
    moved = 2 * (300 * 500 * 2 + 7 * 4)
    assert {r.name: r.bytes for r in done.resources}["memory"] == moved + moved // 2
    assert {r.name: r.bytes for r in done.resources}["disk write"] == moved // 2
    assert foretold.floor and foretold.compute and foretold.seconds == max(foretold.floor, foretold.compute)
    assert done.seconds == second.ledger.seconds and done.floor is not None
    text = shown(second)
    assert "of its limit" in text and "floor" in text and "predicted" in text
    manifest = json.loads((tmp_path / "second" / "merge_manifest.json").read_text())
    assert set(manifest["usage"]["resources"]) == set(NAMES)
    assert manifest["usage"]["floor_seconds"] == round(done.floor, 3)
    assert manifest["predicted"]["seconds"] == round(foretold.seconds, 3)


def test_runs_from_storage_and_from_the_page_cache_foretell_nothing_of_each_other(
    recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "_TELLING", 1)
    save_limits(Limits(memory=1e10, disks={str(mount_of(tmp_path)): DiskLimits(1e6, 1e6, 1e9, 5e8)}))
    with me.plan(recipe) as plan:
        backend = create_backend("cpu")
        ledger = Ledger(compute=Stage(plan.bytes_read, 2.0), from_storage=plan.bytes_read)
        usage.remember(plan, backend, None, ledger)
        cold, warm = (
            usage.predict(plan, None, load_limits(), Reading("cached", missing), backend, None).compute
            for missing in (plan.bytes_read, 0)
        )
    assert cold == 2.0 and warm is None


def test_the_floor_is_the_slowest_resource_and_a_disk_is_read_one_way_at_a_time() -> None:
    ways = (Resource("direct read", 30, 10.0), Resource("disk read", 20, 10.0))
    others = (
        Resource("memory", 400, 100.0),
        Resource("page cache", 0, None),
        Resource("disk write", 30, 10.0),
    )
    assert Usage((*ways, *others), None, None, None).floor == 5.0
    assert Usage((ways[0], *others), None, None, None).floor == 4.0
    assert Usage((*ways, Resource("link", 1, None)), None, None, None).floor is None


def test_in_memory_there_is_no_disk_to_write(recipe: dict[str, object]) -> None:
    result = me.run(recipe)
    assert result.usage is not None
    assert [resource.name for resource in result.usage.resources] == NAMES[:4]


def test_a_plan_says_what_is_known(recipe: dict[str, object], tmp_path: Path) -> None:
    save_limits(Limits(memory=1e10, disks={str(mount_of(tmp_path)): DiskLimits(1e6, 1e6, 1e9, 5e8)}))
    with me.plan(recipe) as plan:
        predicted = usage.predict(
            plan, tmp_path / "out", load_limits(), Reading("cached", 0), create_backend("cpu"), 3
        )
        console = Console(width=200)
        with console.capture() as capture:
            show.plan(console, plan, predicted)
    assert "floor" in capture.get() and "not known until a first run" in capture.get()
