"""The compiled Triton kernels: instructions an element, registers, stack and loads, for several architectures.

    python -m benchmarks.triton_kernels           # tables, also written to benchmarks/results/

Needs no GPU.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

from benchmarks import sass
from benchmarks.compiling import (
    LOADS_OF_2_BYTES,
    LOADS_OF_16_BYTES,
    STORES_OF_16_BYTES,
    Compiled,
    compile_all,
)
from benchmarks.cuda_kernels import PER_BYTE
from merge_engine.kernels.launching import COLUMNS, TILE

RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = (80, 90, 100)
PATTERNS = (LOADS_OF_16_BYTES, LOADS_OF_2_BYTES, STORES_OF_16_BYTES)
TIED = 0.14
"""Elements with the key of a threshold, among differences of bf16 weights as the GPU benchmark draws them."""


@dataclass(frozen=True)
class Hot:
    """The loop of a kernel over whole tiles: bytes an element that it moves, the share of its elements that draw."""

    use: str
    kernel: str
    nbytes: int
    drawing: float = 0.0

    @property
    def rare(self) -> float:
        """How likely a tile needs lower bits of draws: one in 256 of the elements that draw does."""
        return float(1 - (1 - self.drawing / 256) ** TILE)


HOT = (
    *(Hot(f"search bf16, {n} models", "sides", 2 * n + 2) for n in (2, 4, 8)),
    *(Hot(f"consensus bf16, {n} models, ties", "consensus", 2 * n + 4, TIED) for n in (2, 4, 8)),
    Hot("consensus bf16, 2 models, dare", "consensus", 8, 1.0),
    Hot("consensus bf16, 2 models, slack", "consensus", 8),
    Hot("combine bf16", "combine", 6),
    Hot("l1 norms", "l1", 4, TIED),
    Hot("gram, 3 inputs", "gram", 6),
)


def loop(kernel: Compiled) -> tuple[int, int]:
    """Instructions of a turn of the largest loop: always executed, and where lower bits of draws are needed."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        [(_, blocks)] = sass.kernels(Path(file.name), kernel.architecture)
    usual = sass.executed(blocks, lambda *_: [])
    every = max(
        sum(len(blocks[block].instructions) for block in inside) for inside in sass.loops(blocks).values()
    )
    return usual, every - usual


def instructions(compiled: dict[int, list[Compiled]]) -> str:
    """A row for each hot loop: instructions an element by architecture, and how many the copy rate allows."""
    lines = [
        "| use | kernel | " + " | ".join(f"sm_{a}" for a in compiled) + " | allowed |",
        "| --- | --- |" + " ---: |" * (len(compiled) + 1),
    ]
    for hot in HOT:
        cells = []
        for kernels in compiled.values():
            [kernel] = [
                one for one in kernels if (one.use, one.name, one.masked) == (hot.use, hot.kernel, False)
            ]
            usual, rare = loop(kernel)
            cells.append(f"{(usual + hot.rare * rare) / COLUMNS.value:.1f}")
        lines.append(f"| {' | '.join([hot.use, hot.kernel, *cells, str(PER_BYTE * hot.nbytes)])} |")
    return "\n".join(lines)


def resources(compiled: dict[int, list[Compiled]]) -> str:
    """One row a kernel, one column an architecture: registers / bytes of stack, and the loads of sm_90."""
    lines = [
        "| use | kernel | "
        + " | ".join(f"sm_{a}" for a in compiled)
        + " | 16-byte loads | 2-byte loads | 16-byte stores |",
        "| --- | --- |" + " ---: |" * (len(compiled) + 3),
    ]
    for row, kernel in enumerate(compiled[90]):
        name = kernel.name + (", partial tile" if kernel.masked else "")
        registers = [" / ".join(map(str, compiled[a][row].resources())) for a in compiled]
        loads = [str(kernel.count(pattern)) for pattern in PATTERNS]
        lines.append(f"| {' | '.join([kernel.use, name, *registers, *loads])} |")
    return "\n".join(lines)


def main() -> None:
    compiled = {architecture: compile_all(architecture) for architecture in ARCHITECTURES}
    text = "\n".join(
        [
            "# Triton kernels as compiled",
            "",
            f"Triton {triton.__version__}. Command: `python -m benchmarks.triton_kernels`.",
            "",
            "## Instructions an element",
            "",
            "Thread instructions of a turn of the loop over whole tiles, divided by its 8 elements, with lower bits",
            f"of draws as often as a tile of {TILE} elements needs them ({TIED:.0%} of the elements tied).",
            f"`allowed`: what an H200 issues while a copy moves as many bytes, {PER_BYTE} a byte.",
            "",
            instructions(compiled),
            "",
            "## Registers / bytes of stack",
            "",
            "For each architecture, and the loads and stores in the PTX for sm_90.",
            "",
            resources(compiled),
            "",
        ]
    )
    (RESULTS / "triton_kernels.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
