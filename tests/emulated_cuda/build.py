"""Compiles csrc/cuda for the CPU: a module with the interface of merge_engine._cuda that needs no GPU."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
NAME = "_emulated_cuda"
RUNTIME = [HERE / "fibers.cpp", HERE / "runtime.cpp"]


def build(folder: Path) -> Path:
    """Compile the module into a folder and return its path."""
    objects = _compile(folder, [*sorted(CUDA.glob("*.cu")), CUDA / "binding.cpp", *RUNTIME])
    module = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *objects, "-o", str(module)], check=True)
    return module


def build_script(folder: Path) -> Path:
    """Compile the program that calls the runtime as a script says (see script.cpp), and return its path."""
    program = folder / "script"
    subprocess.run(
        ["g++", *_compile(folder, [HERE / "script.cpp", *RUNTIME]), "-o", str(program)], check=True
    )
    return program


def _compile(folder: Path, sources: Sequence[Path]) -> list[str]:
    include = [HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w"]
    command += [f"-I{path}" for path in include] + [f"-DME_MODULE={NAME}"]
    command += ["-DME_WORTH_SAMPLING=1000"]  # so that small arrays are sampled too

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}.o"
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
