"""What the numbers were measured on, and how fast its memory is."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import merge_engine._native as native

_COPIED = 256 << 20  # well above any cache
_REPEATS = 7


@cache
def copy_rate() -> float:
    """Bytes per second that all cores together copy, counting what is read and what is written."""
    threads = len(os.sched_getaffinity(0))
    source, target = np.ones(_COPIED, np.uint8), np.ones(_COPIED, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))
            seconds.append(time.perf_counter() - start)
    return 2 * _COPIED / statistics.median(seconds)


def describe(folder: Path, mergekit: str | None = None) -> dict[str, Any]:
    """Machine and versions. ``folder`` is where checkpoints lie; ``mergekit`` the path of its script."""
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "instruction_set": native.instruction_set(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "memory_copy_gb_per_s": round(copy_rate() / 1e9, 1),
            "kernel": f"{platform.system()} {platform.release()}",
            "disk": _disk(folder),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("merge_engine", "torch", "numpy", "safetensors")},
            **({"mergekit": _version_elsewhere(mergekit)} if mergekit else {}),
        },
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _disk(folder: Path) -> dict[str, str]:
    """File system of a folder and, if it lies on a local block device, what that is."""
    resolved = str(folder.resolve())
    device, file_system = "", ""
    longest = -1
    for line in Path("/proc/mounts").read_text().splitlines():
        source, point, kind = line.split()[:3]
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:
            device, file_system, longest = source, kind, len(point)
    disk = {"file_system": file_system}
    if device.startswith("/dev/"):  # anything else may name a server
        block = Path("/sys/class/block") / Path(device).resolve().name
        model = block / "device" / "model"
        disk["device"] = model.read_text().strip() if model.exists() else block.name
    return disk


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _version_elsewhere(script: str) -> str | None:
    """The version of mergekit in the environment that its script belongs to."""
    python = Path(script).with_name("python")
    code = "from importlib.metadata import version; print(version('mergekit'), version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    return "{} (torch {})".format(*done.stdout.split()) if done.returncode == 0 else None
