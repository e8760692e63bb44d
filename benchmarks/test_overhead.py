"""What a merge costs before its first byte: importing the package, planning ten thousand tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

import merge_engine
from merge_engine.bench.checkpoints import Family
from merge_engine.bench.contestants import Merge
from merge_engine.bench.shapes import ARCHITECTURES


def test_import(benchmark: BenchmarkFixture) -> None:
    code = "import sys, merge_engine; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", code],), {"check": True}, rounds=9)


def test_interpreter(benchmark: BenchmarkFixture) -> None:
    """What of the import is Python's own start."""
    benchmark.pedantic(subprocess.run, ([sys.executable, "-c", ""],), {"check": True}, rounds=9)


def test_plan(benchmark: BenchmarkFixture, small: bool, folder: Path) -> None:
    size = "tiny-moe" if small else "moe"
    base, models = Family(folder, size).make(2)
    recipe = Merge("ties", base, tuple(models)).recipe()

    def plan() -> int:
        planned = merge_engine.plan(recipe)
        planned.close()
        return len(planned.jobs)

    planned = benchmark.pedantic(plan, rounds=5)
    assert planned == len(ARCHITECTURES[size].tensors())
    benchmark.extra_info["tensors"] = planned
