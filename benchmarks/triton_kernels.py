"""The compiled Triton kernels: registers, stack, 16-byte loads and instructions an element, for several architectures.

    python -m benchmarks.triton_kernels           # two tables, also written to benchmarks/results/

Needs no GPU.
"""

from __future__ import annotations

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
from merge_engine.kernels.launching import COLUMNS

RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = (80, 90, 100)
PATTERNS = (LOADS_OF_16_BYTES, LOADS_OF_2_BYTES, STORES_OF_16_BYTES)
TIED = 0.14
"""Elements that share a threshold's key, among differences of bf16 weights: measured on fine-tunes."""


@dataclass(frozen=True)
class Predicted:
    """A hot loop: bytes that it moves an element, and the probability that a tile needs the lower bits of its draws."""

    use: str
    kernel: str
    nbytes: int
    drawn: float = 0.0


def _needs_lower_bits(share: float) -> float:
    """Of a tile of 256 elements, each of which needs them with one in 256 if it is among a ``share``."""
    return float(1 - (1 - share / 256) ** 256)


PREDICTED = (
    *(Predicted(f"search bf16, {n} models", "sides", 2 * (n + 1)) for n in (2, 4, 8)),
    *(
        Predicted(f"consensus bf16, {n} models, ties", "consensus", 2 * (n + 2), _needs_lower_bits(TIED))
        for n in (2, 4, 8)
    ),
    Predicted("consensus bf16, 2 models, dare", "consensus", 8, _needs_lower_bits(1)),
    Predicted("consensus bf16, 2 models, slack", "consensus", 8),
    Predicted("combine bf16", "combine", 6),
    Predicted("l1 norms", "l1", 4, _needs_lower_bits(TIED)),
    Predicted("gram, 3 inputs", "gram", 6),
)


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


def predictions(compiled: dict[int, list[Compiled]]) -> str:
    """One row a hot loop: instructions an element for each architecture, and percent of the copy rate of an H200."""
    lines = [
        "| use | kernel | bytes | "
        + " | ".join(f"sm_{a}" for a in compiled)
        + " | of them arithmetic and logic | percent of copy |",
        "| --- | --- | ---: |" + " ---: |" * (len(compiled) + 2),
    ]
    for one in PREDICTED:
        cells = []
        for architecture, kernels in compiled.items():
            loop = hot_loop(kernels, one.use, one.kernel)
            elements = COLUMNS.value
            issued, clocks = loop.time(elements, one.drawn)
            cells.append(f"{issued:.0f}")
            if architecture == 90:
                percent = sass.percent_of_copy(one.nbytes, clocks)
                last = [f"{loop.alu / elements:.0f}", f"{percent:.0f}"]
        lines.append(f"| {' | '.join([one.use, one.kernel, str(one.nbytes), *cells, *last])} |")
    return "\n".join(lines)


def hot_loop(kernels: list[Compiled], use: str, name: str) -> sass.Loop:
    """The longest loop of the kernel for whole tiles."""
    [kernel] = [one for one in kernels if (one.use, one.name, one.masked) == (use, name, False)]
    return sass.loops(kernel.cubin)[0]


def main() -> None:
    compiled = {architecture: compile_all(architecture) for architecture in ARCHITECTURES}
    text = "\n".join(
        [
            "# Triton kernels as compiled",
            "",
            f"Triton {triton.__version__}. Command: `python -m benchmarks.triton_kernels`.",
            "",
            "## Instructions of the hot loops",
            "",
            "Instructions an element and thread in the loop over whole tiles, with the lower bits of draws as",
            f"often as they are needed ({TIED:.0%} of the elements tied), and what an H200 can then reach at most: the",
            f"schedulers issue {sass.INSTRUCTIONS_A_BYTE:.1f} instructions in the time of copying a byte,",
            "and half as many of the arithmetic and logic units' ([sass.py](../sass.py)). Latencies are not in it.",
            "**None of the percentages was measured.**",
            "",
            predictions(compiled),
            "",
            "## Registers and loads",
            "",
            "Registers / bytes of stack for each architecture, and the loads and stores in the PTX for sm_90.",
            "",
            resources(compiled),
            "",
        ]
    )
    (RESULTS / "triton_kernels.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
