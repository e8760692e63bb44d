"""The CUDA kernels as they were built: registers, stack, and instructions an element of the hot ones.

    python -m benchmarks.cuda_kernels             # tables, also written to benchmarks/results/

Reads the built module. Needs cuobjdump (of the CUDA toolkit or of Triton), no GPU.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sass import Block, Executed, Matters, executed, kernels, printed

RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = ("bf16", "fp16", "fp32", "fp64")
MIXING = ("sum", "elect", "slack")
OCTET = 8
"""Elements of a turn of a hot kernel's loop."""

PER_BYTE = 8
"""Thread instructions that an H200 issues while a copy reads or writes a byte: 132 processors, 4 x 32 at 1.9 GHz, and
4.06 TB/s."""


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. ``stack`` in bytes: what was spilled is there, and what calls keep."""

    name: str
    architecture: int
    registers: int
    stack: int


@dataclass(frozen=True)
class Hot:
    """The loop of a kernel: bytes an element that it moves, and the blocks that its usual way passes."""

    kernel: str
    what: str
    nbytes: Callable[[int], int]
    matters: Matters


def with_draws(blocks: list[Block], _: list[Block]) -> list[Block]:
    """Where draws are made, and compared for ties at the lower bound: code for the upper one follows each time."""
    drawn = [block for block in blocks if block.count(r"IMAD\.(WIDE|HI)") >= 10]
    compared = [block for block in blocks if block.count(r"PRMT.*0x4140")]
    return drawn + compared[::2]


def with_a_key_inside(_: list[Block], inner: list[Block]) -> list[Block]:
    """Where a key of each model goes into its window."""
    return inner


def with_all_inputs(blocks: list[Block], _: list[Block]) -> list[Block]:
    """Where an input is multiplied by its coefficient, without fused additions."""
    return [block for block in blocks if block.count(r"\bFMUL\b") and not block.count(r"\bFFMA\b")]


HOT = [
    Hot(f"fast_merge_kernel<{dtype}, {how}, {n}>", what, lambda n: 2 * n + 4, with_draws)
    for dtype in ("bf16", "fp16")
    for how, what in (("elect", "TIES"), ("slack", "TIES with slack"), ("sum", "DARE"))
    for n in (2, 4, 8)
] + [
    Hot(f"{kernel}, {n}>", what, nbytes, matters)
    for kernel, what, nbytes, matters in (
        ("count_windows<bf16", "ranks, one key in its window", lambda n: 2 * n + 2, with_a_key_inside),
        ("fast_combine_kernel<bf16, 0", "linear", lambda n: 2 * n + 2, with_all_inputs),
    )
    for n in (2, 4, 8)
]


def module() -> Path:
    """The built module."""
    found = importlib.util.find_spec("merge_engine._cuda")
    if found is None or found.origin is None:
        raise SystemExit("merge_engine was built without CUDA")
    return Path(found.origin)


def resources(architecture: int) -> list[Kernel]:
    """All kernels for an architecture."""
    text = printed("-res-usage", "-arch", f"sm_{architecture}", str(module()))
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text)
    return sorted(
        (
            Kernel(name, architecture, int(registers), int(stack))
            for (_, registers, stack), name in zip(found, readable([row[0] for row in found]), strict=True)
        ),
        key=lambda kernel: kernel.name,
    )


def readable(symbols: list[str]) -> list[str]:
    """``merge_kernel<bf16, 8, 4, 0, 0>`` from each mangled name."""
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [_short(name) for name in demangled]


def _short(demangled: str) -> str:
    plain = re.sub(r"\(merge_engine::(?:\(anonymous namespace\)::)?(DType|Mixing)\)", r"\1", demangled)
    found = re.search(r"::(\w+)(?:<(.*?)>)?\(merge_engine", plain)
    assert found is not None, demangled
    name, arguments = found[1], found[2] or ""
    for kind, values in (("DType", DTYPES), ("Mixing", MIXING)):
        for number, value in enumerate(values):
            arguments = arguments.replace(f"{kind}{number}", value)
    arguments = arguments.replace("true", "1").replace("false", "0")
    return f"{name}<{arguments}>" if arguments else name


def instructions(architecture: int) -> dict[str, Executed]:
    """Instructions of eight elements in the hot kernels."""
    code = list(kernels(module(), architecture))
    named = dict(zip(readable([symbol for symbol, _ in code]), (blocks for _, blocks in code), strict=True))
    return {hot.kernel: executed(named[hot.kernel], hot.matters) for hot in HOT}


def hot_table(architectures: tuple[int, ...] = (80, 90, 100)) -> str:
    """A row for each hot kernel: instructions an element and the slots they take, and how many a copy allows."""
    columns = [instructions(architecture) for architecture in architectures]
    lines = [
        "| kernel | what | " + " | ".join(f"sm_{a}" for a in architectures) + " | slots | allowed |",
        "| --- | --- |" + " ---: |" * (len(architectures) + 2),
    ]
    for hot in HOT:
        models = int(hot.kernel.rstrip(">").rsplit(", ", 1)[1])
        cells = [f"{column[hot.kernel].instructions / OCTET:.1f}" for column in columns]
        cells.append(f"{columns[-1][hot.kernel].slots / OCTET:.1f}")
        lines.append(
            f"| `{hot.kernel}` | {hot.what} | {' | '.join(cells)} | {PER_BYTE * hot.nbytes(models)} |"
        )
    return "\n".join(lines)


def table(kernels: list[Kernel]) -> str:
    """One row a kernel, one column an architecture: registers / bytes of stack."""
    lines = [
        "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "| --- |" + " ---: |" * len(ARCHITECTURES),
    ]
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        row = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        cells = [f"{row[a].registers} / {row[a].stack}" if a in row else "" for a in ARCHITECTURES]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    text = "\n".join(
        [
            "# CUDA kernels as built",
            "",
            f"nvcc {_version()}. Command: `python -m benchmarks.cuda_kernels`.",
            "",
            "## Instructions an element",
            "",
            "Thread instructions of a turn of the loop, on the way that most elements take, divided by its 8 elements.",
            "`slots`: what those for the newest take, if integer, logical and comparing ones are issued at half rate.",
            f"`allowed`: what an H200 issues while a copy moves as many bytes, {PER_BYTE} a byte (132 processors,",
            "4 x 32 lanes, 1.9 GHz, 4.06 TB/s).",
            "",
            hot_table(),
            "",
            "## Registers / bytes of stack",
            "",
            table([kernel for architecture in ARCHITECTURES for kernel in resources(architecture)]),
            "",
        ]
    )
    (RESULTS / "cuda_kernels.md").write_text(text)
    print(text)


def _version() -> str:
    printed_version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", printed_version)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    main()
