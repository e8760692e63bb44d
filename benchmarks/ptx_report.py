"""What the Triton kernels compile to, without a GPU: registers, spills and the width of global loads and stores.

python -m benchmarks.ptx_report [80 90 100]
"""

from __future__ import annotations

import sys

from merge_engine.kernels.compiling import (
    LOADS_OF_2_BYTES,
    LOADS_OF_16_BYTES,
    STORES_OF_16_BYTES,
    compile_all,
)

COLUMNS = (
    "use",
    "kernel",
    "sm",
    "registers",
    "stack, bytes",
    "16-byte loads",
    "2-byte loads",
    "16-byte stores",
)


def main() -> None:
    for line in (COLUMNS, ["---"] * len(COLUMNS)):
        print("|", " | ".join(line), "|")
    for capability in map(int, sys.argv[1:] or ("80", "90", "100")):
        for kernel in compile_all(capability):
            cells = [
                kernel.use,
                kernel.name + (", partial tile" if kernel.masked else ""),
                capability,
                *kernel.resources(),
                *map(kernel.count, (LOADS_OF_16_BYTES, LOADS_OF_2_BYTES, STORES_OF_16_BYTES)),
            ]
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
