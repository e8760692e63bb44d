"""The ledger of a run: for each stage, bytes moved and seconds busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """Work of one kind: bytes, and the ``seconds`` in which at least one thread was busy with it."""

    bytes: int = 0
    seconds: float = 0.0
    _busy: int = field(default=0, repr=False)  # threads
    _since: float = field(default=0.0, repr=False)


_STAGES = ("read", "up", "compute", "down", "digest", "write", "publish")


@dataclass
class Ledger:
    """Bytes and busy seconds of every stage, and the time the run took.

    ``read`` and ``write`` count bytes of files, ``compute`` input bytes. ``up`` and ``down`` are copies to and from a
    device, if one computes. ``digest`` computes the digests of the output, ``publish`` adds other files and flushes
    all of them to disk; both only in a merge to a folder.
    ``from_storage`` is the number of bytes that the system read from storage for this process, not from the page
    cache; None if the system does not count them. ``seconds`` is the time of the run. ``workers`` is the number of
    processes, on one machine or on many, whose bytes and busy seconds are added up here.
    """

    read: Stage = field(default_factory=Stage)
    up: Stage = field(default_factory=Stage)
    compute: Stage = field(default_factory=Stage)
    down: Stage = field(default_factory=Stage)
    write: Stage = field(default_factory=Stage)
    digest: Stage = field(default_factory=Stage)
    publish: Stage = field(default_factory=Stage)
    seconds: float = 0.0
    from_storage: int | None = None
    workers: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __getstate__(self) -> dict[str, object]:
        """Everything but the lock, which no other process can have."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @contextmanager
    def timed(self, stage: Stage, nbytes: int) -> Iterator[None]:
        """Count the enclosed block, which handles ``nbytes``, as work of a stage. Thread-safe."""
        with self._lock:
            if stage._busy == 0:
                stage._since = time.perf_counter()
            stage._busy += 1
        try:
            yield
        finally:
            with self._lock:
                stage._busy -= 1
                stage.bytes += nbytes
                if stage._busy == 0:
                    stage.seconds += time.perf_counter() - stage._since

    def add(self, other: Ledger) -> None:
        """Add the stages of another process. The time of the run stays that of this one."""
        with self._lock:
            for name in _STAGES:
                mine, others = getattr(self, name), getattr(other, name)
                mine.bytes += others.bytes
                mine.seconds += others.seconds
            if other.from_storage is not None:
                self.from_storage = (self.from_storage or 0) + other.from_storage

    def stages(self) -> dict[str, Stage]:
        """The stages by name, in the order of a run; ``up`` and ``down`` only if anything was copied."""
        stages = {name: getattr(self, name) for name in _STAGES}
        return {name: stage for name, stage in stages.items() if stage.bytes or name not in ("up", "down")}

    @property
    def busiest(self) -> float:
        """The seconds of the busiest stage."""
        return max(stage.seconds for stage in self.stages().values())

    @property
    def bound_by(self) -> str | None:
        """The name of the busiest stage; None if it was busy for less than half of the time, in the mean of workers."""
        stages = self.stages()
        name = max(stages, key=lambda name: stages[name].seconds)
        time = self.seconds * self.workers
        return name if time and stages[name].seconds >= time / 2 else None

    def as_dict(self) -> dict[str, object]:
        """Plain numbers for the manifest: bytes and seconds."""
        rows: dict[str, object] = {
            name: {"bytes": stage.bytes, "busy_seconds": round(stage.seconds, 3)}
            for name, stage in self.stages().items()
        }
        return {
            "seconds": round(self.seconds, 3),
            "bytes_from_storage": self.from_storage,
            "bound_by": self.bound_by,
            **({"workers": self.workers} if self.workers > 1 else {}),
            **rows,
        }


@contextmanager
def reading_counted(ledger: Ledger) -> Iterator[None]:
    """Set ``from_storage`` of the ledger to the bytes that are read from storage inside the block."""
    before = _read_from_storage()
    yield
    after = _read_from_storage()
    ledger.from_storage = None if before is None or after is None else after - before


def _read_from_storage() -> int | None:
    """Bytes read from storage for this process so far; None if the system does not count them."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)
