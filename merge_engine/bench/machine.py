"""The machine and the versions of a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import merge_engine._native as native
from merge_engine.storage import mount_of
from merge_engine.storage.machine import cores, processor


def describe(folders: dict[str, Path], mergekit: Path | None) -> dict[str, Any]:
    """Machine and versions. ``folders`` by their use; ``mergekit`` is the path of its script, if it is there."""
    return {
        "machine": {
            "cpu": processor(),
            "cores": cores(),
            "instruction_set": native.instruction_set(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "kernel": f"{platform.system()} {platform.release()}",
            **{use: _disk(folder) for use, folder in folders.items()},
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("merge_engine", "torch", "safetensors")},
            **({"mergekit": _version_elsewhere(mergekit)} if mergekit else {}),
        },
    }


def _disk(folder: Path) -> dict[str, str]:
    """The file system of a folder and, for a local block device, its model or name."""
    mount = mount_of(folder)
    disk = {"file_system": mount.kind}
    if mount.source.startswith("/dev/"):  # anything else may name a server
        block = Path("/sys/class/block") / Path(mount.source).resolve().name
        model = block / "device" / "model"
        disk["device"] = model.read_text().strip() if model.exists() else block.name
    return disk


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _version_elsewhere(script: Path) -> str | None:
    """The version of mergekit in the environment that its script belongs to."""
    python = script.with_name("python")
    if not python.exists():
        return None
    code = "from importlib.metadata import version; print(version('mergekit'), version('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    return "{} (torch {})".format(*done.stdout.split()) if done.returncode == 0 else None
