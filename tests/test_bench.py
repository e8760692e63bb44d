"""``merge-engine bench`` on little data: all of it runs, nothing is asserted about time."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cli import call

import merge_engine as me
from merge_engine.bench import bare_copy, checkpoints, measuring, probe
from merge_engine.bench.checkpoints import Family
from merge_engine.bench.contestants import CONTESTANTS, METHODS, Merge, command
from merge_engine.bench.fit import fit_line
from merge_engine.bench.limits import DiskLimits, Limits
from merge_engine.bench.measuring import ContestantError, claim_memory, measure
from merge_engine.bench.shapes import ARCHITECTURES
from merge_engine.storage import mount_of

FAKE_MERGEKIT = """#!{python}
import json, sys, merge_engine
merge_engine.run(sys.argv[1], sys.argv[2])
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the checkpoints, on a machine whose limits are measured in no time."""
    monkeypatch.setattr(probe, "READ_PIECE", 1 << 20)
    monkeypatch.setattr(probe, "_FIRST", 1 << 20)
    monkeypatch.setattr(probe, "_MOST", 1 << 20)
    monkeypatch.setattr(probe, "_COPIED", 1 << 20)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return tmp_path / "checkpoints"


@pytest.fixture
def mergekit(tmp_path: Path) -> Path:
    """A script with mergekit-yaml's arguments."""
    script = tmp_path / "mergekit-yaml"
    script.write_text(FAKE_MERGEKIT.format(python=sys.executable))
    script.chmod(0o755)
    return script


def test_one_command(
    root: Path,
    mergekit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = tmp_path / "results.json"
    options = ("--sizes", "tiny,tiny-moe", "--rounds", 2, "--cache", "both", "--mergekit", mergekit)
    assert call(monkeypatch, "bench", "--folder", root, "--methods", "ties", *options, "--save", saved) == 0
    shown = capsys.readouterr().out
    for expected in ("times faster than mergekit", "times the floor", "own memory"):
        assert expected in shown
    document = json.loads(saved.read_text())
    assert [(case["size"], case["cache"]) for case in document["cases"]] == [
        (size, cache) for size in ("tiny", "tiny-moe") for cache in ("warm", "cold")
    ]
    for case in document["cases"]:
        assert {name: len(runs) for name, runs in case["runs"].items()} == dict(
            zip(CONTESTANTS, (2, 2, 1, 1), strict=True)
        )
        assert case["floor_seconds"] >= 0 and case["bytes_read"] > case["bytes_written"] > 0
        for run in (run for runs in case["runs"].values() for run in runs):
            assert run["seconds"] > 0 and run["peak_memory"] > 0
    assert document["machine"]["cpu"] and document["versions"]["merge_engine"]
    assert not (root / "merge-engine-bench").exists()


def test_every_method_without_mergekit(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "results.json"
    options = ("--sizes", "tiny", "--rounds", 1, "--torch-rounds", 0, "--output", tmp_path)
    arguments = ("--folder", root, "--methods", "all", *options, "--save", saved)
    assert call(monkeypatch, "bench", *arguments) == 0
    assert "mergekit is left out" in capsys.readouterr().out
    cases = json.loads(saved.read_text())["cases"]
    assert [case["method"] for case in cases] == list(METHODS)
    assert {tuple(case["runs"]) for case in cases} == {("copy", "merge_engine")}


def test_a_sweep_is_fitted_and_plotted(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    fast = DiskLimits(read=1e12, direct=1e12, cached=1e12, write=1e12)
    limits = Limits(memory=1e12, disks={str(mount_of(tmp_path)): fast})
    monkeypatch.setattr(probe, "measure_limits", lambda _: limits)  # the slow disk alone decides
    picture, saved = tmp_path / "sweep.png", tmp_path / "results.json"
    options = (
        "--models",
        "1,2,4",
        "--distinct",
        1,
        "--methods",
        "linear",
        "--rounds",
        1,
        "--slow-disk",
        "40MB",
    )
    arguments = ("--folder", root, "--sizes", "tiny", *options, "--plot", picture, "--save", saved)
    assert call(monkeypatch, "bench", *arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "a disk of 40 MB/s" in capsys.readouterr().out
    for case in json.loads(saved.read_text())["cases"]:
        moved = case["bytes_read"] + case["bytes_written"]
        assert case["floor_seconds"] == pytest.approx(moved / 40e6, abs=0.001)


@pytest.mark.parametrize(
    ("options", "said"),
    (
        (("--sizes", "13b"), "--sizes: '13b' is not one of tiny"),
        (("--methods", "ties,tise"), "--methods: 'tise' is not one of linear"),
        (("--models", "0"), "--models: '0' is not a number of models"),
        (("--cache", "hot"), "--cache: 'hot' is not one of warm, cold"),
        (("--slow-disk", "slow"), "--slow-disk: 'slow' is not a size"),
        (("--sizes", "7b"), "GB are free; choose smaller sizes"),
    ),
)
def test_what_cannot_be_measured_is_one_line(
    root: Path,
    options: tuple[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    code = 1 if "are free" in said else 2  # the option is right, the disk is too small
    assert call(monkeypatch, "bench", "--folder", root, *options) == code
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_plots_without_matplotlib(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.delitem(sys.modules, "merge_engine.bench.plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert call(monkeypatch, "bench", "--folder", root, "--plot", "plot.png") == 1
    assert "pip install 'merge_engine[bench]'" in capsys.readouterr().err
    assert not root.exists()


def test_plain_torch_agrees(tmp_path: Path) -> None:
    """The hand-written TIES gives the results of ours, except for near ties, which it compares in float32."""
    base, models = Family(tmp_path / "made", "tiny").make(2)
    merge = Merge("ties", base, tuple(models))
    work = tmp_path / "work"
    work.mkdir()
    measure(command("torch", merge, work), work / "output")
    recipe = merge.recipe()
    recipe["parameters"] = {"ties": "all"}
    me.run(recipe, tmp_path / "ours")
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", work / "output")
    )
    assert ours.keys() == theirs.keys()
    equal = sum(int((ours[name] == theirs[name]).sum()) for name in ours)
    assert equal > 0.999 * sum(tensor.numel() for tensor in ours.values())


def test_a_slow_disk_keeps_its_pace(tmp_path: Path) -> None:
    """A slow disk may be slower than its pace, so the test checks the least time only."""
    base, models = Family(tmp_path / "made", "tiny").make(2)
    merge = Merge("linear", base, tuple(models))
    for number, (name, pace) in enumerate((("copy", 2_000_000), ("merge_engine", 300_000))):
        work = tmp_path / f"work-{number}"
        work.mkdir()
        start = time.perf_counter()
        measure(command(name, merge, work, pace=pace), work / "output")
        moved = merge.bytes_read + merge.bytes_written
        assert time.perf_counter() - start > moved / pace


def test_fine_tunes_are_shared_and_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family(tmp_path, "tiny-moe", shard_size=20_000)
    assert family.missing_bytes(3, distinct=1) == 2 * ARCHITECTURES["tiny-moe"].weight_bytes
    base, tuned = family.make(3, distinct=1)
    assert [folder.is_symlink() for folder in tuned] == [False, True, True]
    assert len(checkpoints.weight_files(base)) > 1
    _, tuned = family.make(2)  # now with data of its own
    first, second = (
        torch.cat(
            [
                tensor.flatten()
                for file in checkpoints.weight_files(folder)
                for tensor in load_file(file).values()
            ]
        )
        for folder in tuned
    )
    assert not torch.equal(first, second)
    assert family.missing_bytes(2) == 0


def test_shapes() -> None:
    parameters = {name: shape.weight_bytes / 2e9 for name, shape in ARCHITECTURES.items()}
    for name, expected in (("0.5b", 0.494), ("1.1b", 1.100), ("3b", 3.213), ("7b", 7.242)):
        assert parameters[name] == pytest.approx(expected, abs=0.001)
    assert len(ARCHITECTURES["moe"].tensors()) > 10_000


def test_the_line_through_times() -> None:
    line = fit_line([(10**9, 1.5), (2 * 10**9, 2.5), (4 * 10**9, 4.5)])
    assert line is not None
    assert (line.start, line.rate, line.r_squared) == pytest.approx((0.5, 1e9, 1.0))
    assert fit_line([(1, 1.0), (2, 2.0), (2, 2.1)]) is None
    assert fit_line([(1, 3.0), (2, 2.0), (3, 1.0)]) is None


def test_a_contestant_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(ContestantError, match="ended with 1: no such thing"):
        measure([sys.executable, "-c", "print('a line'); raise SystemExit('no such thing')"], tmp_path)


def test_memory_is_claimed_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_REPORTING_SECONDS", 0)

    def memory(key: str) -> int:
        line = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
        )
        return 1024 * int(line.split()[1])

    peak = memory("VmHWM")
    claim_memory(peak)
    highest = memory("VmHWM")
    assert highest >= peak * 5 // 4  # every page was touched
    assert memory("VmRSS") < highest - peak // 2


def noting(call: Callable[..., int], moved: list[int]) -> Callable[..., int]:
    def noted(*arguments: Any) -> int:
        done = call(*arguments)
        moved.append(done)
        return done

    return noted


@pytest.mark.parametrize("nbytes", (1, bare_copy.PIECE - 1, bare_copy.PIECE, 3 * bare_copy.PIECE + 5))
@pytest.mark.parametrize("shard", (10**12, 2 * bare_copy.PIECE, bare_copy.PIECE // 2 + 1))
def test_the_copy_moves_what_it_says(
    nbytes: int, shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the inputs are read, and as much as the output has is written, no byte twice."""
    inputs = [tmp_path / name for name in "ab"]
    for number, file in enumerate(inputs):
        file.write_bytes(os.urandom(1000 + 2 * number * bare_copy.PIECE))
    read, written = list[int](), list[int]()
    for name, moved in (("preadv", read), ("pwrite", written)):
        monkeypatch.setattr(os, name, noting(getattr(os, name), moved))
    (tmp_path / "output").mkdir()
    bare_copy.copy(tmp_path / "output", nbytes, shard, inputs)
    assert sum(read) == 2000 + 2 * bare_copy.PIECE and sum(written) == nbytes
    sizes = [file.stat().st_size for file in (tmp_path / "output").iterdir()]
    assert sum(sizes) == nbytes and max(sizes) <= shard and len(sizes) == -(-nbytes // shard)
