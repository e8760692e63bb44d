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
    """Work of one kind. ``seconds`` adds up over threads, so it can exceed the time taken."""

    bytes: int = 0
    seconds: float = 0.0


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
        """Add the time of the enclosed block, which handles ``nbytes``, to a stage. Thread-safe."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        with self._lock:
            stage.bytes += nbytes
            stage.seconds += seconds

    def stages(self) -> dict[str, Stage]:
        """The stages by name."""
        return {name: getattr(self, name) for name in ("read", "compute", "digest", "write", "publish")}

    def as_dict(self) -> dict[str, object]:
        """Plain numbers for the manifest."""
        rows: dict[str, object] = {
            name: {"bytes": stage.bytes, "busy_seconds": round(stage.seconds, 3)}
            for name, stage in self.stages().items()
        }
        return {"seconds": round(self.seconds, 3), "bytes_from_storage": self.from_storage, **rows}


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
