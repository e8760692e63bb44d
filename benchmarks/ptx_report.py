"""What the Triton kernels compile to, without a GPU: registers, spills and the width of global loads and stores.

python -m benchmarks.ptx_report [80 90 100]
"""

from __future__ import annotations

import sys

from merge_engine.kernels.compiling import compile_all

COLUMNS = "| kernel | sm | registers | stack, bytes | 16-byte loads | 2-byte loads | 16-byte stores | fma |"


def main() -> None:
    print(COLUMNS)
    print("|" + "---|" * COLUMNS.count(" | ") + "---|")
    for capability in map(int, sys.argv[1:] or ("80", "90", "100")):
        for kernel in compile_all(capability):
            registers, stack = kernel.resources()
            numbers = [
                kernel.count(pattern)
                for pattern in (
                    r"ld\.global\S*\.v4\.b32",
                    r"ld\.global\S*\.[bu]16",
                    r"st\.global\S*\.v4\.b32",
                    r"\bfma\.",
                )
            ]
            name = kernel.name + (", partial tile" if kernel.masked else "")
            print("| " + " | ".join(map(str, [name, capability, registers, stack, *numbers])) + " |", flush=True)


if __name__ == "__main__":
    main()
