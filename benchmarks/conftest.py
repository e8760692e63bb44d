"""Options of the benchmarks that run under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.checkpoints import FOLDER_VARIABLE
from benchmarks.shapes import ARCHITECTURES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size",
        choices=tuple(ARCHITECTURES),
        help="shape of the checkpoints (default: 1.1b, or tiny when benchmarks are disabled)",
    )


@pytest.fixture(scope="session")
def small(pytestconfig: pytest.Config) -> bool:
    """Whether this is a test of correctness on little data, not a measurement."""
    option = pytestconfig.getoption
    disabled = option("benchmark_disable") and not option("benchmark_enable")
    return bool(disabled) or option("--size") == "tiny"


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config, small: bool) -> str:
    """Shape of the checkpoints."""
    return pytestconfig.getoption("--size") or ("tiny" if small else "1.1b")


@pytest.fixture(scope="session", autouse=True)
def checkpoint_folder(small: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small checkpoints are made anew in a temporary folder; large ones are kept."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.mktemp("checkpoints")))
        yield
