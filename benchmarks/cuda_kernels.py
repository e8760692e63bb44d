"""The compiled CUDA kernels: registers, spills and 16-byte loads, for every architecture.

    python -m benchmarks.cuda_kernels             # a table, also written to benchmarks/results/

Needs nvcc, no GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = ("bf16", "fp16", "fp32", "fp64")


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one architecture. ``vector_loads`` and ``vector_stores`` are of 16 bytes."""

    name: str
    architecture: int
    registers: int
    spill_bytes: int
    vector_loads: int
    vector_stores: int


def compile_all(sources: tuple[str, ...]) -> list[Kernel]:
    """Compile files of csrc/cuda for every architecture."""
    jobs = [(CUDA / source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(lambda job: _compile(*job), jobs) for kernel in kernels]


def _compile(source: Path, architecture: int) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-c", str(source), "-o", f"{folder}/object.o"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0:
            raise RuntimeError(f"{source.name} for sm_{architecture}: {built.stderr}")
        [ptx] = Path(folder).glob("*.ptx")
        code = _ptx_by_kernel(ptx.read_text())
    kernels = []
    for part in built.stderr.split("Compiling entry function '")[1:]:
        symbol = part[: part.index("'")]
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        assert registers is not None and spilled is not None, part
        body = code[symbol]
        loads = len(re.findall(r"ld\.global[.\w]*\.v4\.\w32", body))
        stores = len(re.findall(r"st\.global[.\w]*\.v4\.\w32", body))
        numbers = int(registers[1]), int(spilled[1]), loads, stores
        kernels.append(Kernel(_readable(symbol), architecture, *numbers))
    return kernels


def _ptx_by_kernel(ptx: str) -> dict[str, str]:
    parts = re.split(r"\.entry ", ptx)[1:]
    return {part[: re.search(r"\W", part).start()]: part for part in parts}  # type: ignore[union-attr]


def _readable(symbol: str) -> str:
    """``merge_kernel<bf16, 8, 4, 0, 0>`` from a mangled name."""
    demangled = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(r"::(\w+)(?:<(.*?)>)?\(", demangled.replace("(merge_engine::DType)", "DType"))
    assert found is not None, demangled
    name, arguments = found[1], found[2] or ""
    for number, dtype in enumerate(DTYPES):
        arguments = arguments.replace(f"DType{number}", dtype)
    arguments = arguments.replace("true", "1").replace("false", "0")
    return f"{name}<{arguments}>" if arguments else name


def table(kernels: list[Kernel]) -> str:
    """One row a kernel, one column an architecture: registers / bytes spilled, and the loads of sm_90."""
    lines = [
        "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " | 16-byte loads | stores |",
        "| --- |" + " ---: |" * (len(ARCHITECTURES) + 2),
    ]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        row = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        cells = [f"{row[a].registers} / {row[a].spill_bytes}" for a in ARCHITECTURES]
        last = row[90]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {last.vector_loads} | {last.vector_stores} |")
    return "\n".join(lines)


def main() -> None:
    sources = tuple(sorted(path.name for path in CUDA.glob("*.cu") if path.name != "device.cu"))
    text = "\n".join(
        [
            "# CUDA kernels as compiled",
            "",
            "Registers / bytes spilled for each architecture, and 16-byte loads and stores in the PTX for sm_90.",
            f"nvcc {_version()}. Command: `python -m benchmarks.cuda_kernels`.",
            "",
            table(compile_all(sources)),
            "",
        ]
    )
    (RESULTS / "cuda_kernels.md").write_text(text)
    print(text)


def _version() -> str:
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", printed)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    main()
