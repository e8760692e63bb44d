"""Compile every kernel for a GPU that need not be there, as it is launched.

The launchers are called as ever, with small tensors in host memory; in place of a driver stands one that names an
architecture, and in place of a launch the kernel is kept. So what is compiled is what a GPU would be given, with the
same alignments, options and constants.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from merge_engine.kernels import (
    bands,
    combine,
    consensus,
    gram,
    histogram,
    locate,
    masks,
    norms,
    pairs,
    ranks,
    scores,
    search,
    select,
)
from merge_engine.kernels.launching import BLOCK

LOADS_OF_16_BYTES = r"ld\.global\S*\.v4\.b32"
LOADS_OF_2_BYTES = r"ld\.global\S*\.[bu]16"
STORES_OF_16_BYTES = r"st\.global\S*\.v4\.b32"


@dataclass(frozen=True)
class Compiled:
    """A kernel in assembly and machine code.

    ``use`` says what it was launched for, ``masked`` whether it is the variant for a partial tile, None where there is
    none.
    """

    use: str
    name: str
    architecture: int
    masked: bool | None
    ptx: str
    cubin: bytes

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression."""
        return len(re.findall(pattern, self.ptx))

    def resources(self) -> tuple[int, int]:
        """Registers of a thread, and bytes of its stack (spilled registers among them)."""
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            listed = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            )
        found = re.search(r"REG:(\d+) STACK:(\d+)", listed.stdout)
        assert found is not None, listed.stdout
        return int(found[1]), int(found[2])


class _Architecture:
    """What a driver is asked when a kernel is compiled."""

    def __init__(self, capability: int):
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def _launches_kept(capability: int) -> Iterator[list[tuple[Any, bool | None]]]:
    kept: list[tuple[Any, bool | None]] = []
    run = triton.JITFunction.run

    def keep(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kept.append((run(self, *args, grid=grid, warmup=True, **kwargs), kwargs.get("MASKED")))
        return kept[-1][0]

    before = dict(vars(driver))  # what is active has not been asked for: there may be no driver at all
    driver.set_active(_Architecture(capability))
    triton.JITFunction.run = keep
    try:
        yield kept
    finally:
        triton.JITFunction.run = run
        vars(driver).update(before)


def compile_all(capability: int, uses: Collection[str] | None = None) -> list[Compiled]:
    """Every kernel, compiled for an architecture (80, 90, 100, ...), in these uses; by default in all."""
    compiled = []
    for use, launch in _launches().items():
        if uses is not None and use not in uses:
            continue
        with _launches_kept(capability) as kept:
            launch()
        for kernel, masked in kept:
            name = kernel.metadata.name.removesuffix("_kernel")
            compiled.append(Compiled(use, name, capability, masked, kernel.asm["ptx"], kernel.asm["cubin"]))
    return compiled


def _launches() -> dict[str, Callable[[], Any]]:
    """Each kernel as it is used most, the hot ones in more than one way."""
    count = 8 * norms.SUM_BLOCK.value + BLOCK + 1
    half = torch.zeros(count, dtype=torch.uint16)
    single = torch.zeros(count, dtype=torch.uint32)
    integers = torch.zeros((8, 32), dtype=torch.int64)
    doubles = torch.zeros((count // 4096 + 1) * 32, dtype=torch.float64)
    lines = torch.zeros((2, histogram.COPIES, 1 << 16), dtype=torch.int64)

    def merge(
        data: torch.Tensor, code: str, n: int, kind: int, election: str, **options: Any
    ) -> Callable[[], None]:
        chosen = {
            "normalize": True,
            "storage_rounding": False,
            "wide": False,
            "vote_slack": False,
            "retain_slack": False,
            **options,
        }
        codes, below, numbers = [code] * (n + 2), [single] * n, doubles.float()
        return lambda: consensus.consensus(
            data, [data] * n, data, codes, code, 0, [kind] * n, integers, below, numbers, doubles, integers,
            election=election, **chosen,
        )  # fmt: skip

    def measure(data: torch.Tensor, code: str, level: int) -> Callable[[], None]:
        shift = 0 if level or code == "BF16" else 16
        bins = lines if level else lines[:, :, : 1 << 15].contiguous()
        found = integers if level else None
        return lambda: histogram.histogram(data, [data] * 2, [code] * 3, code, shift, integers, found, bins)

    def seek(data: torch.Tensor, code: str, n: int, shift: int) -> Callable[[], None]:
        return lambda: search.search(
            data, [data] * n, [code] * (n + 1), code, shift, integers[:n, :3].contiguous(), range(n), integers
        )

    def mix(data: torch.Tensor, code: str, **options: Any) -> Callable[[], None]:
        chosen = {
            "divides": True,
            "fused": False,
            "rounded": False,
            "stepwise": False,
            "on_base": False,
            **options,
        }
        codes, numbers = [code] * 3, doubles.float()
        return lambda: combine.combine([data] * 2, data, codes, code, numbers, integers, **chosen)

    def multiply(of_deltas: bool, line: tuple[int, int] | None, block: int) -> Callable[[], None]:
        codes, table = ["BF16"] * 3, products if line is None else products[:, :3].contiguous()
        return lambda: gram.gram([half] * 3, codes, "BF16", of_deltas, 0, line, block, table)

    by_draw, by_index = masks.BAND_BY_DRAW.value, masks.BAND_BY_INDEX.value
    ranked = masks.RANKED_INVERSE.value
    sums = doubles[: count // 4096 * 4].view(-1, 4)
    products = doubles[: count // 4096 * 6].view(-1, 6)
    pair = ["BF16", "BF16"]
    return {
        "histogram bf16": measure(half, "BF16", 0),
        "search bf16, 2 models": seek(half, "BF16", 2, 0),
        "search bf16, 4 models": seek(half, "BF16", 4, 0),
        "search bf16, 8 models": seek(half, "BF16", 8, 0),
        "histogram fp32": measure(single, "F32", 0),
        "histogram fp32, level 1": measure(single, "F32", 1),
        "consensus bf16, 2 models, ties": merge(half, "BF16", 2, by_draw, "sum"),
        "consensus bf16, 4 models, ties": merge(half, "BF16", 4, by_draw, "sum"),
        "consensus bf16, 8 models, ties": merge(half, "BF16", 8, by_draw, "sum"),
        "consensus bf16, 2 models, dare": merge(half, "BF16", 2, masks.DRAW.value, "none", normalize=False),
        "consensus bf16, 2 models, slack": merge(half, "BF16", 2, by_index, "sum", retain_slack=True),
        "consensus fp16, 2 models, slack": merge(half, "F16", 2, by_index, "sum", retain_slack=True),
        "consensus fp32, 2 models, dare": merge(single, "F32", 2, masks.DRAW.value, "none", normalize=False),
        "consensus bf16, 2 models, della": merge(half, "BF16", 2, ranked, "count", vote_slack=True),
        "consensus bf16, 2 models, mergekit": merge(half, "BF16", 2, by_index, "sum", storage_rounding=True),
        "combine bf16": mix(half, "BF16"),
        "combine fp32": mix(single, "F32"),
        "combine bf16, fused": mix(half, "BF16", fused=True),
        "combine bf16, on a base": mix(half, "BF16", divides=False, on_base=True, rounded=True),
        "combine bf16, rows": mix(half, "BF16", divides=False, line=(64, 1)),
        "combine bf16, columns": mix(half, "BF16", divides=False, on_base=True, line=(3, 64)),
        "consensus bf16, 2 models, sce": merge(half, "BF16", 2, masks.NOTED.value, "deltas"),
        "consensus bf16, 2 models, ram": merge(half, "BF16", 2, by_index, "overlap", normalize=False),
        "masks": lambda: masks.resolve(integers, integers, "BF16"),
        "select": lambda: select.select(lines, integers[:, :5].contiguous(), integers, 16),
        "bands": lambda: bands.bands(integers, doubles, integers, "BF16"),
        "l1 norms": lambda: norms.l1_norms(
            half, half, pair, "BF16", 0, by_draw, integers, single, False, False, sums
        ),
        "squares": lambda: norms.l1_norms(
            half, half, pair, "BF16", 0, masks.NOTED.value, integers, single, False, True, sums
        ),
        "variances, 2 models": lambda: scores.variances([half] * 3, ["BF16"] * 3, "BF16", False, single),
        "variances fp32, 2 models": lambda: scores.variances([single] * 3, ["F32"] * 3, "F32", False, single),
        "importances": lambda: scores.importances(half, half, pair, "BF16", count, doubles, single),
        "notes": lambda: scores.note(single, "F32", 0, by_draw, integers, single),
        "nearswap": lambda: pairs.nearswap(
            half, half, half, ["BF16"] * 3, "BF16", doubles.float(), integers, storage_rounding=False
        ),
        "overlaps, 2 models": lambda: pairs.overlaps(
            half, [half] * 2, ["BF16"] * 3, "BF16", 0, [by_index] * 2, integers, integers
        ),
        "gram, 3 inputs": multiply(False, None, 4096),
        "gram, 2 task vectors": multiply(True, None, 4096),
        "gram by rows": multiply(True, (8192, 1), 4096),
        "gram by columns": multiply(True, (3, 64), 1 << 18),
        "ranks": lambda: ranks.rank_thresholds(half, half, pair, "BF16", count, 1, doubles, single),
        "locate": lambda: locate.locate(half, half, pair, "BF16", 0, 0),
    }
