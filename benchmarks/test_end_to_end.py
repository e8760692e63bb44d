"""Whole merges, start-up included: merge_engine, mergekit, and a bare copy of the same bytes.

For a comparison use ``python -m benchmarks.compare``, which lets the engines take turns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.checkpoints import cache_folder, input_files, make_checkpoints
from benchmarks.engines import (
    COPY,
    MERGE_ENGINE,
    MERGEKIT,
    MERGEKIT_VARIABLE,
    METHODS,
    Merge,
    check_output,
    command,
)
from benchmarks.measuring import Measurement, empty, measure, warm

ROUNDS = {COPY: 5, MERGE_ENGINE: 5, MERGEKIT: 1}


@pytest.fixture
def work() -> Iterator[Path]:
    """An empty folder on the disk of the checkpoints."""
    folder = cache_folder() / "benchmark-output"
    empty(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ROUNDS)
def test_merge(benchmark: BenchmarkFixture, engine: str, method: str, size: str, work: Path) -> None:
    mergekit = os.environ.get(MERGEKIT_VARIABLE)
    if engine == MERGEKIT and mergekit is None:
        pytest.skip(f"{MERGEKIT_VARIABLE} does not say where mergekit-yaml is")
    if engine == COPY and method not in ("linear", "ties"):
        pytest.skip("reads the same bytes as linear, or as ties")
    base, models = make_checkpoints(size, 2)
    merge = Merge(method, base, tuple(models))
    runs: list[Measurement] = []

    def prepare() -> tuple[tuple[list[str]], dict[str, object]]:
        empty(work)
        argv = command(engine, merge, work, mergekit)
        warm(input_files(merge.folders))
        return (argv,), {}

    def run(argv: list[str]) -> None:
        runs.append(measure(argv, work / "output"))

    benchmark.pedantic(run, setup=prepare, rounds=ROUNDS[engine])
    check_output(engine, merge, work)
    moved = merge.bytes_read + merge.bytes_written
    fastest = min(runs, key=lambda run: run.seconds)
    benchmark.extra_info |= {"bytes_moved": moved, "gb_per_s": round(moved / fastest.seconds / 1e9, 2)}
    benchmark.extra_info |= asdict(fastest)
    if engine == MERGE_ENGINE:
        assert fastest.peak_memory < 2**30, "memory must not grow with the model"
