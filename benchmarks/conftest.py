"""Fixtures of the benchmarks that run under pytest-benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_engine.bench.checkpoints import cache_folder


@pytest.fixture(scope="session")
def small(pytestconfig: pytest.Config) -> bool:
    """Whether this is a test of correctness on little data, not a measurement."""
    option = pytestconfig.getoption
    return bool(option("benchmark_disable")) and not option("benchmark_enable")


@pytest.fixture(scope="session")
def folder(small: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of checkpoints: small ones are made again, large ones are kept."""
    return tmp_path_factory.mktemp("checkpoints") if small else cache_folder()
