"""Run a command and measure it from outside: time, memory, bytes."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_engine.bench.probe import drop_from_cache
from merge_engine.errors import MergeError

SAMPLE_SECONDS = 0.005
_PIECE = 8 << 20
_REPORTING_SECONDS = 2.5


class ContestantError(MergeError):
    """A timed command failed, or did not do the work."""


@dataclass(frozen=True)
class Measurement:
    """One run. Seconds and bytes.

    ``seconds`` last until the output is on the disk: the time of the process, and ``sync_seconds`` for fsync of its
    files after its end. ``peak_memory`` is memory of its own (RssAnon + RssShmem), sampled every 5 ms;
    ``peak_resident`` (VmHWM) includes mapped files. ``disk_read`` are the bytes that came from storage, not from
    the page cache; ``read_calls`` are those of system calls, without mapped files.
    """

    seconds: float
    sync_seconds: float
    cpu_seconds: float
    peak_memory: int
    peak_resident: int
    read_calls: int
    disk_read: int
    disk_written: int


def measure(command: Sequence[str], output: Path, timeout: float = 4 * 3600) -> Measurement:
    """Run ``command``, which writes below ``output``.

    Raises ``ContestantError`` if it fails, with the last line of its output, or if it takes longer than ``timeout``
    seconds.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            peak_memory, peak_resident = _watch(process.pid, start + timeout)
            ended = time.perf_counter()
            io = _numbers(process.pid, "io")
        except BaseException:
            process.kill()
            process.wait()
            raise
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(max(log.seek(0, os.SEEK_END) - 2000, 0))
            last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise ContestantError(f"{' '.join(command)}: ended with {process.returncode}: {last}")
    _sync(output)
    done = time.perf_counter()
    return Measurement(
        seconds=done - start,
        sync_seconds=done - ended,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_memory=peak_memory,
        peak_resident=peak_resident,
        read_calls=io["rchar"],
        disk_read=io["read_bytes"],
        disk_written=io["write_bytes"],
    )


def warm(files: Iterable[Path]) -> None:
    """Bring files into the page cache."""
    buffer = bytearray(_PIECE)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def cool(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        drop_from_cache(file)


def empty(folder: Path) -> None:
    """Make ``folder``, or delete its content."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def claim_memory(nbytes: int) -> None:
    """Take ``nbytes`` of memory and free it, so that the next process gets it at once.

    A virtual machine may give free memory back to its host (Linux's free page reporting, every two seconds), and
    takes several times as long to get it again as to fill it. Without this, chance would decide which contestant
    waits.
    """
    with mmap.mmap(-1, nbytes) as memory:
        memory[:: mmap.PAGESIZE] = bytes(-(-nbytes // mmap.PAGESIZE))
        time.sleep(
            _REPORTING_SECONDS
        )  # all other free memory is reported by then, and the next report is as far away


def _watch(pid: int, deadline: float) -> tuple[int, int]:
    """Sample memory until the process has ended (it is not reaped). Raises ``ContestantError`` when late."""
    peak_memory = peak_resident = 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.perf_counter() > deadline:
            raise ContestantError(f"process {pid} took longer than it may")
        sample = _numbers(pid, "status")
        if "VmHWM" in sample:  # missing while the process exits
            peak_memory = max(peak_memory, 1024 * (sample["RssAnon"] + sample["RssShmem"]))
            peak_resident = max(peak_resident, 1024 * sample["VmHWM"])
        time.sleep(SAMPLE_SECONDS)
    return peak_memory, peak_resident


def _numbers(pid: int, file: str) -> dict[str, int]:
    """The numbers in a file of /proc, in its units: bytes in ``io``, KiB in ``status``."""
    lines = (line.split() for line in Path(f"/proc/{pid}/{file}").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
