"""The overhead of a merge: importing the package, planning many tensors, and a whole merge of one MB."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import merge_engine
from merge_engine.bench.checkpoints import Family
from merge_engine.bench.contestants import MERGE_ENGINE, Merge, command
from merge_engine.bench.measuring import empty, measure
from merge_engine.bench.shapes import ARCHITECTURES


def test_import(benchmark: BenchmarkFixture) -> None:
    code = "import sys, merge_engine; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", code],), {"check": True}, rounds=9)


def test_interpreter(benchmark: BenchmarkFixture) -> None:
    """What of the import is Python's own start."""
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", ""],), {"check": True}, rounds=9)


@pytest.mark.parametrize("size", ("moe", "many"))
def test_plan(benchmark: BenchmarkFixture, size: str, small: bool, folder: Path) -> None:
    size = "tiny-moe" if small else size
    base, models = Family(folder, size).make(2)
    recipe = Merge("ties", base, tuple(models)).recipe()

    def plan() -> int:
        return len(merge_engine.plan(recipe).tasks)

    planned = benchmark.pedantic(plan, rounds=5)
    assert planned == len(ARCHITECTURES[size].tensors())
    benchmark.extra_info["tensors"] = planned


def test_one_megabyte(benchmark: BenchmarkFixture, folder: Path, tmp_path: Path) -> None:
    """Processor time from start to finish, in ``extra_info``."""
    base, models = Family(folder, "tiny").make(2)
    merge = Merge("ties", base, tuple(models))
    found = []

    def run() -> None:
        empty(tmp_path)
        found.append(measure(command(MERGE_ENGINE, merge, tmp_path), tmp_path / "output"))

    benchmark.pedantic(run, rounds=5)
    benchmark.extra_info["cpu_seconds"] = statistics.median(each.cpu_seconds for each in found)
