"""Compiles csrc/cuda for the CPU: a module with the interface of merge_engine._cuda that needs no GPU."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
NAME = "_emulated_cuda"


def build(folder: Path) -> Path:
    """Compile the module into a folder and return its path."""
    include = [HERE, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w"]
    command += [f"-I{path}" for path in include] + [f"-DME_MODULE={NAME}"]
    sources = [*sorted(CUDA.glob("*.cu")), CUDA / "binding.cpp", HERE / "emulated.cpp"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    module = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *objects, "-o", str(module)], check=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
