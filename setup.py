"""Builds the native modules from csrc/ with the compilers alone: no torch, neither to build nor to link.

merge_engine._native holds the CPU primitives, compiled once per instruction set and chosen at run time, so that
one build runs on every processor of its architecture. merge_engine._cuda is built too when nvcc is found.
Environment:

    MERGE_ENGINE_CUDA=0        never build CUDA, =1 fail when nvcc is missing (default: build it if nvcc is there)
    MERGE_ENGINE_CUDA_ARCHS    what to build it for: "native" (this machine's GPU), or numbers such as "90,100"
                               (default: all of CUDA_ARCHITECTURES, and PTX for others); with fewer it takes less time
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_MODULE, CUDA_MODULE = "merge_engine._native", "merge_engine._cuda"
CSRC = Path("csrc")

# Contraction and fast-math change results; trapping semantics and errno only prevent vectorisation.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # gcc 12 warns about its own AVX-512 header
    "-pthread",
]
# Baseline comes first, also when linking: of functions that several objects bring along (std::vector's), the
# linker takes the first, and that one must run everywhere.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    INSTRUCTION_SETS["avx512"] = [
        "-mavx2",
        "-mfma",
        "-mbmi2",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ]
PER_INSTRUCTION_SET = [
    CSRC / "cpu" / name
    for name in (
        "find.cpp",
        "locate.cpp",
        "gram.cpp",
        "norms.cpp",
        "notes.cpp",
        "pairs.cpp",
        "ranks.cpp",
        "scores.cpp",
        "consensus.cpp",
        "consensus_general.cpp",
        "combine.cpp",
        "low_rank.cpp",
        "table.cpp",
    )
]
COMMON = [
    CSRC / "angles.cpp",
    CSRC / "geometry.cpp",
    *(
        CSRC / "cpu" / name
        for name in (
            "binding.cpp",
            "dispatch.cpp",
            "identical.cpp",
            "mapping.cpp",
            "pool.cpp",
            "rows.cpp",
            "statistics.cpp",
        )
    ),
]
CUDA_BINDING = CSRC / "cuda" / "binding.cpp"
CUDA_SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
CUDA_ARCHITECTURES = ("80", "90", "100", "120")  # GPUs of 8.6 and 8.9 execute what is for 8.0
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "--compress-mode=size",
    f"--threads={os.cpu_count()}",  # architectures side by side: with many cores, the longest file decides
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


def architecture_flags() -> list[str]:
    """The flags of nvcc that say for which GPUs it compiles."""
    wanted = os.environ.get("MERGE_ENGINE_CUDA_ARCHS", "")
    if wanted == "native":
        return ["-arch=native"]
    numbers = wanted.split(",") if wanted else CUDA_ARCHITECTURES
    if not all(number.isdecimal() for number in numbers):
        raise SystemExit(f'MERGE_ENGINE_CUDA_ARCHS="{wanted}": give "native", or numbers such as "90,100"')
    # PTX of the oldest and the newest: what is not listed is compiled by the driver.
    ptx = () if wanted else (CUDA_ARCHITECTURES[0], CUDA_ARCHITECTURES[-1])
    return [
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers),
        *(f"-gencode=arch=compute_{number},code=compute_{number}" for number in ptx),
    ]


def find_nvcc() -> str | None:
    """The CUDA compiler to use, or None to build without CUDA."""
    wanted = os.environ.get("MERGE_ENGINE_CUDA", "")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise SystemExit("MERGE_ENGINE_CUDA=1, but nvcc was not found on PATH")
    return nvcc


def static_cuda_runtime(nvcc: str) -> Path:
    """Find libcudart_static.a of the toolkit that nvcc (perhaps a wrapper script) belongs to."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in dry_run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            top = Path(line.removeprefix("#$ TOP="))
            for library in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
                if (top / library / "libcudart_static.a").exists():
                    return top / library / "libcudart_static.a"
    raise SystemExit(
        f"{nvcc} was found, but not its libcudart_static.a; MERGE_ENGINE_CUDA=0 builds without CUDA"
    )


class BuildNative(build_ext):
    """Compiles all files of both modules side by side, each with its own flags: setuptools has one set a module."""

    def build_extensions(self) -> None:
        """Compile what is older than its sources, then link it."""
        old = [ext for ext in self.extensions if not self._is_built(ext)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # Those of nvcc come first: they take the longest.
            jobs = [(ext, self._jobs(ext)) for ext in sorted(old, key=lambda ext: ext.name != CUDA_MODULE)]
            submitted = [(ext, [pool.submit(*job) for job in of_module]) for ext, of_module in jobs]
            for ext, objects in submitted:
                self._link(ext, [compiled.result() for compiled in objects])

    def _is_built(self, ext: Extension) -> bool:
        """Whether a module is newer than all sources. Then it only goes to its place."""
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(path.stat().st_mtime for path in [Path(__file__), *CSRC.rglob("*.*")])
        # An editable install builds elsewhere and then copies into the source tree: what is there may be new enough.
        for built in (target, Path(*ext.name.split(".")[:-1]) / target.name):
            if not self.force and built.exists() and built.stat().st_mtime > newest:
                if built != target:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(built, target)
                return True  # build_ext --force compiles all the same
        return False

    def _jobs(self, ext: Extension) -> list[tuple[Any, ...]]:
        """Calls that compile a file each and return the object's path."""
        if ext.name == CUDA_MODULE:
            nvcc = find_nvcc()
            assert nvcc is not None, "without it the module is not asked for"
            return [
                *((self._compile_cuda, nvcc, source) for source in CUDA_SOURCES),
                (self._compile, ext, CUDA_BINDING, [], "cuda"),
            ]
        jobs: list[tuple[Any, ...]] = [(self._compile, ext, source, [], "") for source in COMMON]
        for name, flags in INSTRUCTION_SETS.items():
            own = [*flags, f"-DME_ISA={name}"]
            jobs += [(self._compile, ext, source, own, name) for source in PER_INSTRUCTION_SET]
        return jobs

    def _link(self, ext: Extension, objects: list[str]) -> None:
        libraries = []
        if ext.name == CUDA_MODULE:
            nvcc = find_nvcc()
            assert nvcc is not None
            # The static runtime cannot clash with the one that torch brings along.
            libraries = [str(static_cuda_runtime(nvcc)), "-ldl", "-lrt"]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), target_lang="c++", extra_postargs=[*libraries, "-pthread"]
        )

    def _compile(self, ext: Extension, source: Path, flags: list[str], folder: str) -> str:
        return self.compiler.compile(
            [str(source)],
            output_dir=str(Path(self.build_temp) / folder),
            include_dirs=ext.include_dirs,
            extra_postargs=[*FLAGS, *flags],
        )[0]

    def _compile_cuda(self, nvcc: str, source: Path) -> str:
        target = Path(self.build_temp) / source.with_suffix(".cu.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-c", str(source), "-o", str(target), *NVCC_FLAGS, *architecture_flags()]
        subprocess.run(command, check=True)
        return str(target)


def modules() -> list[Extension]:
    """Describe the modules; the sources are listed for source distributions, BuildNative compiles them."""
    import pybind11

    include = [pybind11.get_include()]
    cpu = [str(source) for source in [*COMMON, *PER_INSTRUCTION_SET]]
    found = [Extension(CPU_MODULE, cpu, include_dirs=include, language="c++")]
    if find_nvcc() is not None:
        found.append(Extension(CUDA_MODULE, [str(CUDA_BINDING)], include_dirs=include, language="c++"))
    return found


setup(ext_modules=modules(), cmdclass={"build_ext": BuildNative})
