"""Every Triton kernel compiles without a GPU, reads 16 bytes at a time and fuses nothing."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks import compiling
from benchmarks.compiling import LOADS_OF_2_BYTES, LOADS_OF_16_BYTES, Compiled
from benchmarks.triton_kernels import loop
from merge_engine.kernels.launching import COLUMNS

HOT = ("sides", "histogram", "consensus", "combine", "l1", "gram")
LOOPS = (
    ("search bf16, 2 models", "sides", 40),
    ("consensus bf16, 2 models, ties", "consensus", 135),
    ("consensus bf16, 2 models, dare", "consensus", 85),
    ("combine bf16", "combine", 30),
)
"""A use, its kernel, and the most instructions an element."""

EVERY_KERNEL = {use for use, *_ in LOOPS} | {
    "bands", "gram by columns", "gram by rows", "gram, 3 inputs", "histogram bf16", "importances", "l1 norms",
    "locate", "masks", "nearswap", "notes", "overlaps, 2 models", "ranks", "variances, 2 models",
}  # fmt: skip
"""Uses that have all kernels. Architectures share the compiler's way to assembly, so the other uses are compiled for
one: of these, many models and wide types need most registers."""


@pytest.fixture(scope="module", params=(80, 90, 100), ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    try:
        return compiling.compile_all(request.param, None if request.param == 90 else EVERY_KERNEL)
    finally:
        patch.undo()


def test_every_kernel_compiles(compiled: list[Compiled]) -> None:
    assert {kernel.name for kernel in compiled} == {
        *HOT, "bands", "columns", "count", "edges", "importance", "keys", "nearswap", "note", "overlap", "prove",
        "resolve", "rows", "select", "thresholds", "variance"
    }  # fmt: skip
    for kernel in compiled:
        assert kernel.cubin.startswith(b"\x7fELF"), kernel.use


def test_whole_tiles_are_read_16_bytes_at_a_time(compiled: list[Compiled]) -> None:
    whole = [kernel for kernel in compiled if kernel.name in HOT and not kernel.masked]
    assert {kernel.name for kernel in whole} == set(HOT)
    for kernel in whole:
        assert kernel.count(LOADS_OF_16_BYTES) > 0, kernel.use
        assert kernel.count(LOADS_OF_2_BYTES) == 0, kernel.use


def test_arithmetic_is_neither_fused_nor_approximate_nor_flushed(compiled: list[Compiled]) -> None:
    for kernel in compiled:
        assert kernel.count(r"\bfma\.") == 0, kernel.use
        assert kernel.count(r"\bf?mad\.\S*f(32|64)") == 0, kernel.use
        assert kernel.count(r"\.ftz\b") == 0, kernel.use
        assert kernel.count(r"\.approx\b|\bdiv\.full\b") == 0, kernel.use
        assert kernel.count(r"\b(bf16|f16)x?2?\b") == 0, kernel.use


def test_the_most_used_kernels_do_not_spill(compiled: list[Compiled]) -> None:
    for kernel in compiled:
        if kernel.name in HOT and not kernel.masked:
            registers, stack = kernel.resources()
            assert registers < 255 and stack <= 16, kernel.use


@pytest.mark.parametrize(("use", "name", "most"), LOOPS)
def test_hot_loops_are_short(compiled: list[Compiled], use: str, name: str, most: int) -> None:
    """Without the instructions that lower bits of draws take."""
    [kernel] = [one for one in compiled if (one.use, one.name, one.masked) == (use, name, False)]
    usual, rare = loop(kernel)
    assert usual / COLUMNS.value <= most
    assert bool(rare) == ("consensus" in use)
