"""What this installation can do on this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import merge_engine._native as _native
from merge_engine.engine.manifest import versions


def examine() -> list[tuple[str, str]]:
    """Pairs of subject and finding."""
    runs = [name for name in ("avx512", "avx2", "baseline") if _native.runs(name)]
    return [
        ("merge_engine", f"{versions()['merge_engine']}, Python {platform.python_version()}"),
        ("machine", f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} usable cores"),
        ("backend cpu", f"chosen; instruction set {_native.instruction_set()} (of {', '.join(runs)})"),
        ("backend reference", f"available with torch {_package('torch')}; slow, for checking"),
        ("CUDA", _cuda()),
        ("Triton", f"no kernels yet (triton {_package('triton')})"),
        ("hub", f"huggingface_hub {_package('huggingface_hub')}"),
    ]


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    try:
        import merge_engine._cuda as _cuda
    except ImportError:
        return "built without CUDA: no nvcc was found when the package was built; install it and build again"
    try:
        devices = _cuda.devices()
    except RuntimeError as error:
        return f"built with CUDA, no kernels yet; no usable device: {error}"
    return "built with CUDA, no kernels yet; " + "; ".join(devices)
