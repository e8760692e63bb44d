"""The device of a merge, if the user leaves it to us: the GPU where it is expected to be faster than the CPU.

The inputs pass through parts of the machine, and the slowest part decides:

    CPU    the disk, or the cores that merge
    GPU    the disk, or the threads that read, or the link; and half a second to start

Nothing is measured before a run, so the rates below are those of known machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merge_engine.arguments import threads_of
from merge_engine.backends import Backend, any_driver, create_backend
from merge_engine.engine.mover import MOST_READERS
from merge_engine.planning import MergePlan
from merge_engine.storage import cached_share, cores, link_rate, mount_of

CORE = 1e9
"""Bytes of inputs that a core merges in a second, TIES of two models, while all others do so too.

0.9e9 on 16 cores of a machine with an H200. Two cores alone do up to 3e9, but machines with a GPU have more.
"""

READER = 4e9
"""Bytes that a thread reads out of the page cache in a second: 3e9 to 5e9 on that machine, with small buffers."""

DISK = 2e9
"""Bytes that a disk moves in a second. Few do more; slower ones change nothing, for they bind both devices."""

LINK = 25e9
"""Bytes per second up to a GPU where the system does not say what the link is: PCIe 4.0, 16 lanes."""

LINK_SHARE = 0.85
"""The share of a link's rate that copies reach: 55e9 of 64e9 on an H200."""

START = 0.5
"""Seconds in which a GPU gets ready: driver, kernels, pinned memory."""


@dataclass(frozen=True)
class Facts:
    """A merge on a machine: ``inputs`` are all input bytes, ``disk`` those that come from a disk or go to one.

    ``threads`` compute on the CPU, ``cores`` are all cores, ``link`` is in bytes per second.
    """

    inputs: int
    disk: int
    threads: int
    cores: int
    link: float = LINK

    def on_cpu(self) -> tuple[float, str]:
        """The expected seconds on the CPU, and the part of the machine that decides."""
        return max((self.disk / DISK, "the disk"), (self.inputs / (self.threads * CORE), "the cores"))

    def on_gpu(self) -> tuple[float, str]:
        """The expected seconds on a GPU, and the part of the machine that decides."""
        readers = min(self.cores, MOST_READERS)
        seconds, part = max(
            (self.disk / DISK, "the disk"),
            (self.inputs / (readers * READER), "the readers"),
            (self.inputs / self.link, "the link"),
        )
        return START + seconds, part

    def choice(self) -> tuple[bool, str]:
        """Whether to take the GPU, and why."""
        (cpu, cpu_part), (gpu, gpu_part) = self.on_cpu(), self.on_gpu()
        return gpu < cpu, (
            f"computing on the {'GPU' if gpu < cpu else 'CPU'}: expected {cpu:.1f} s on the CPU ({cpu_part}), "
            f"{gpu:.1f} s on the GPU ({gpu_part}, {START} s to start)"
        )


def choose_backend(
    plan: MergePlan,
    output: Path | None,
    backend: str | Backend = "auto",
    threads: int | None = None,
    device: str = "auto",
    notes: list[str] | None = None,
) -> Backend:
    """The backend for a plan whose output goes to a folder, or into memory; one that the caller has made stays.

    For the other arguments, and for the errors, see ``create_backend``. Nothing is written, and no driver is loaded
    where the CPU is expected to be faster.
    """
    if isinstance(backend, Backend):
        return backend
    chosen = choose_device(plan, output, backend, threads, device, notes)
    return create_backend(backend, threads, chosen, notes)


def choose_device(
    plan: MergePlan,
    output: Path | None,
    backend: str,
    threads: int | None,
    device: str,
    notes: list[str] | None = None,
) -> str:
    """``cpu`` if neither a backend nor a device is demanded and the CPU is expected to be faster, else ``device``.

    The reason is added to ``notes``, if there may be a GPU. Raises ``OptionError`` for no number of threads.
    """
    threads = threads_of(threads)
    if (backend, device) != ("auto", "auto") or not any_driver():
        return device
    takes_gpu, reason = facts_of(plan, output, threads).choice()
    if notes is not None:
        notes.append(reason)
    return device if takes_gpu else "cpu"


def facts_of(plan: MergePlan, output: Path | None, threads: int | None = None) -> Facts:
    """The facts of a plan on this machine, now."""
    by_file = plan.bytes_by_file
    disk = sum((1 - _in_memory(file.path, len(by_file))) * nbytes for file, nbytes in by_file.items())
    if output is not None and not mount_of(output).in_memory:
        disk += plan.bytes_written
    rate = link_rate()
    link = LINK if rate is None else LINK_SHARE * rate
    return Facts(sum(by_file.values()), round(disk), threads or cores(), cores(), link)


def _in_memory(file: Path, files: int) -> float:
    """The share of a file that is in the page cache, 0 for one that cannot be read: the run will say so."""
    try:
        return cached_share(file, files)
    except OSError:
        return 0.0
