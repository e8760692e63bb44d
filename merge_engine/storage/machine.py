"""Processors, memory and links that this process may use, within the limits of its control groups.

A container is a control group (cgroup) with limits. Groups are nested, and each limits all groups inside it.
Version 2 has one tree of groups, version 1 a tree for every kind of resource. Missing files, and files with
unexpected content, limit nothing.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
PCI = Path("/sys/bus/pci/devices")

_NVIDIA, _DISPLAY = "0x10de", "0x03"  # a vendor, and the beginning of a class: graphics and 3D controllers

_MEMORY_FILES = (  # limit, use, and the prefix of entries in memory.stat that include nested groups
    ("memory.max", "memory.current", ""),
    ("memory.high", "memory.current", ""),  # above it the system shrinks the page cache
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def processor() -> str:
    """The processor's model name, or the machine's architecture if the system does not give one."""
    for line in _text(PROC / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Number of processors that this process may use, rounded up, at least 1."""
    count = len(os.sched_getaffinity(0))
    for group in _groups("cpu", proc, cgroups):
        # Microseconds of processor time that the group gets in each period, and of the period.
        words = _text(group / "cpu.max").split()
        quota = _number(words[0]) if words else _number(_text(group / "cpu.cfs_quota_us"))
        period = _number(words[1]) if len(words) > 1 else _number(_text(group / "cpu.cfs_period_us"))
        if quota is not None and period:
            count = min(count, -(-quota // period))
    return max(count, 1)


def available_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes of memory that this process, and the page cache of its files, could still take.

    Memory of the page cache counts as available, because the system frees it when memory is needed. Raises
    ``OSError`` if the system does not give the number.
    """
    kilobytes = _table(proc / "meminfo").get("MemAvailable:")
    if kilobytes is None:
        raise OSError(f"{proc / 'meminfo'} does not say how much memory is available")
    available = 1024 * kilobytes
    for group in _groups("memory", proc, cgroups):
        for limit_name, used_name, prefix in _MEMORY_FILES:
            limit, used = _number(_text(group / limit_name)), _number(_text(group / used_name))
            if limit is not None and used is not None and limit - used < available:
                stat = _table(group / "memory.stat")
                cached = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
                available = min(available, max(limit - used + cached, 0))
    return available


def link_rate(devices: Path = PCI) -> float | None:
    """Bytes per second, one way, that the slowest PCIe link of an NVIDIA GPU is made for.

    None if there is none, or if the system does not say.
    """
    rates = []
    for device in devices.glob("*"):
        kind = _text(device / "vendor").strip(), _text(device / "class")[: len(_DISPLAY)]
        lanes = _number(_text(device / "max_link_width"))
        transfers = re.match(r"[0-9.]+(?= GT/s)", _text(device / "max_link_speed"))
        if kind == (_NVIDIA, _DISPLAY) and lanes and transfers:
            rates.append(float(transfers[0]) * 1e9 / 8 * lanes)  # a lane moves a bit in each transfer
    return min(rates, default=None)


def _groups(resource: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The folders of the control groups of this process, the innermost first.

    A container may see only the part of the tree inside its own group, with that group as the root.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        resources, _, path = rest.partition(":")
        if resources and resource not in resources.split(","):
            continue
        root = cgroups / resource if resources else cgroups
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder
            if folder == root:
                break


def _table(file: Path) -> dict[str, int]:
    """The first number of each line by the line's first word."""
    lines = (line.split() for line in _text(file).splitlines())
    numbers = {words[0]: _number(words[1]) for words in lines if len(words) > 1}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(text: str) -> int | None:
    """A number that is not negative; None for "max", -1 and any other text, which mean no limit."""
    try:
        number = int(text)
    except ValueError:
        return None
    return number if number >= 0 else None


def _text(file: Path) -> str:
    """The text of a file, "" if it cannot be read."""
    try:
        return os.fsdecode(file.read_bytes())
    except (OSError, ValueError):  # ValueError: a path with a zero byte
        return ""
