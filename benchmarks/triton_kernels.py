"""The compiled Triton kernels: registers, stack and 16-byte loads, for several architectures.

    python -m benchmarks.triton_kernels           # a table, also written to benchmarks/results/

Needs no GPU.
"""

from __future__ import annotations

from pathlib import Path

import triton

from benchmarks.compiling import (
    LOADS_OF_2_BYTES,
    LOADS_OF_16_BYTES,
    STORES_OF_16_BYTES,
    Compiled,
    compile_all,
)

RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = (80, 90, 100)
PATTERNS = (LOADS_OF_16_BYTES, LOADS_OF_2_BYTES, STORES_OF_16_BYTES)


def table(compiled: dict[int, list[Compiled]]) -> str:
    """One row a kernel, one column an architecture: registers / bytes of stack, and the loads of sm_90."""
    lines = [
        "| use | kernel | "
        + " | ".join(f"sm_{a}" for a in compiled)
        + " | 16-byte loads | 2-byte loads | 16-byte stores |",
        "| --- | --- |" + " ---: |" * (len(compiled) + 3),
    ]
    for row, kernel in enumerate(compiled[90]):
        name = kernel.name + (", partial tile" if kernel.masked else "")
        resources = [" / ".join(map(str, compiled[a][row].resources())) for a in compiled]
        loads = [str(kernel.count(pattern)) for pattern in PATTERNS]
        lines.append(f"| {' | '.join([kernel.use, name, *resources, *loads])} |")
    return "\n".join(lines)


def main() -> None:
    text = "\n".join(
        [
            "# Triton kernels as compiled",
            "",
            "Registers / bytes of stack for each architecture, and the loads and stores in the PTX for sm_90.",
            f"Triton {triton.__version__}. Command: `python -m benchmarks.triton_kernels`.",
            "",
            table({architecture: compile_all(architecture) for architecture in ARCHITECTURES}),
            "",
        ]
    )
    (RESULTS / "triton_kernels.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
