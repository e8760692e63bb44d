"""What runs on a node: it says what the node is and has, and does jobs. An actor of Ray holds one ``Worker``."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_engine.distributed.looking import Seen, Wanted, look, shares
from merge_engine.distributed.options import NodePaths
from merge_engine.distributed.parcels import unpack
from merge_engine.engine.jobs import Done, Job
from merge_engine.engine.records import ARITHMETIC
from merge_engine.engine.shards import ShardJob
from merge_engine.errors import BackendError
from merge_engine.observe.versions import versions
from merge_engine.storage import File, Way, available_memory, choose_way, cores, mount_of

_SHOWS_AFTER = 5.0
"""Seconds after which a node must see a folder that another machine has just made."""

_BETWEEN = 0.3
"""Seconds between two reports of progress."""


@dataclass(frozen=True)
class Introduction:
    """What must be the same on all nodes, and what a node has: bytes of available memory, None if it does not say."""

    version: str
    sources: str
    python: str
    memory: int | None


@dataclass(frozen=True)
class Settings:
    """How a worker does jobs: on so many ``threads``, on ``device``; where files lie; how many nodes share the work."""

    threads: int
    device: str
    paths: NodePaths
    nodes: int


class Worker:
    """Does jobs one after the other. ``moved`` may be called meanwhile, from another thread."""

    def __init__(self, settings: Settings):
        self._settings = replace(settings, threads=min(settings.threads, cores()))
        self._files: list[File] = []
        self._way: Way = "cached"
        self._moved = 0
        self._lock = threading.Lock()

    def introduce(self) -> Introduction:
        """What this node is."""
        return introduction()

    def look(self, wanted: Sequence[Wanted], method: bytes) -> tuple[list[Seen], list[float], str | None]:
        """The wanted files here, the share of each that the page cache holds, and why a method cannot be used here.

        From then on jobs are about these files. ``method`` is a parcel.
        """
        unknown = None
        try:
            unpack(method, ())
        except (ImportError, AttributeError) as error:
            unknown = str(error)
        seen = look(wanted, self._settings.paths.there)
        files = [one.file for one in seen if one.file is not None]
        if len(files) < len(seen):
            return seen, [], unknown
        self._files = files
        on_disk = [file for file in files if not mount_of(file.path).in_memory]
        try:
            self._way = choose_way(on_disk, available_memory(), self._settings.nodes)
        except OSError:
            self._way = "direct"
        return seen, shares(files, self._way), unknown

    def probe(self, drafts: Path) -> str | None:
        """Why nothing can be written into the folder of drafts from here; None if it can."""
        folder = self._settings.paths.there(drafts)
        end = time.monotonic() + _SHOWS_AFTER
        while not folder.is_dir():
            if time.monotonic() > end:
                return f"does not see the output folder {folder.parent}"
            time.sleep(0.2)
        try:
            probe = folder / f"probe-{os.urandom(8).hex()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            return f"cannot write to the output folder {folder.parent}: {error.strerror}"
        return None

    def do(self, function: Callable[..., Done[Any]], parcel: bytes) -> Done[Any] | Exception:
        """Do a job. The result is an error as it was raised, if one was."""
        with self._lock:
            self._moved = 0
        try:
            return function(self._own(unpack(parcel, self._files)), self._progress)
        except MemoryError as error:
            said = f" ({error})" if str(error) else ""
            return BackendError(f"too little memory for the merge{said}; choose a smaller memory")
        except Exception as error:  # raised again where the merge was started
            return error

    def moved(self) -> int:
        """Input bytes of the present job that are done, a moment after the call."""
        time.sleep(_BETWEEN)
        return self._moved

    def _progress(self, nbytes: int) -> None:
        with self._lock:
            self._moved += nbytes

    def _own(self, job: Job) -> Job:
        """The job as this node does it."""
        settings = self._settings
        device = settings.device if job.device == "auto" else job.device
        job = replace(job, threads=settings.threads, device=device, way=self._way)
        return replace(job, drafts=settings.paths.there(job.drafts)) if isinstance(job, ShardJob) else job


def introduction() -> Introduction:
    """What this machine is, for comparison with nodes."""
    try:
        memory = available_memory()
    except OSError:
        memory = None
    version = f"{versions()['merge_engine']} with arithmetic {ARITHMETIC}"
    python = ".".join(platform.python_version_tuple()[:2])
    return Introduction(version, _sources(), python, memory)


def _sources() -> str:
    """A digest of the package's Python files: two states of its development have the same version."""
    home = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(home.rglob("*.py")):
        digest.update(f"{file.relative_to(home)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
