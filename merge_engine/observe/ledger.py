"""What every stage did: bytes moved and seconds busy."""

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


@dataclass
class Ledger:
    """Bytes and busy seconds of every stage, and the time the run took.

    ``read`` and ``write`` are of the files, ``compute`` counts input bytes, ``digest`` and ``publish`` follow a
    merge to a folder: the digests of the output, and flushing it to disk. ``from_storage`` of the bytes read were
    not in the page cache, as the system counted them for this process; None where it does not count.
    """

    read: Stage = field(default_factory=Stage)
    compute: Stage = field(default_factory=Stage)
    write: Stage = field(default_factory=Stage)
    digest: Stage = field(default_factory=Stage)
    publish: Stage = field(default_factory=Stage)
    seconds: float = 0.0
    from_storage: int | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

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

    def stages(self) -> dict[str, Stage]:
        """The stages by name."""
        return {name: getattr(self, name) for name in ("read", "compute", "digest", "write", "publish")}

    @property
    def bound_by(self) -> str | None:
        """The stage that was busy for most of the time, if that is at least a half; else nothing alone explains it."""
        stages = self.stages()
        name = max(stages, key=lambda name: stages[name].seconds)
        return name if self.seconds and stages[name].seconds >= self.seconds / 2 else None

    def as_dict(self) -> dict[str, object]:
        """Plain numbers for the manifest."""
        rows: dict[str, object] = {
            name: {"bytes": stage.bytes, "busy_seconds": round(stage.seconds, 3)}
            for name, stage in self.stages().items()
        }
        return {
            "seconds": round(self.seconds, 3),
            "bytes_from_storage": self.from_storage,
            "bound_by": self.bound_by,
            **rows,
        }


@contextmanager
def reading_counted(ledger: Ledger) -> Iterator[None]:
    """Note how much the enclosed block has had read from storage. What was in the page cache does not count."""
    before = _read_from_storage()
    yield
    after = _read_from_storage()
    ledger.from_storage = None if before is None or after is None else after - before


def _read_from_storage() -> int | None:
    """Bytes that this process has had read from storage so far, None where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)
