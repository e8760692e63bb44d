"""What every stage did: bytes moved and seconds busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stage:
    """Work of one kind. ``seconds`` adds up over threads, so it can exceed the time taken."""

    bytes: int = 0
    seconds: float = 0.0


@dataclass
class Ledger:
    """Bytes and busy seconds of every stage, and the time the run took.

    ``read`` and ``write`` are of the files, ``compute`` counts input bytes, ``digest`` and ``publish`` follow a
    merge to a folder: SHA-256 of the output, and flushing it to disk.
    """

    read: Stage = field(default_factory=Stage)
    compute: Stage = field(default_factory=Stage)
    write: Stage = field(default_factory=Stage)
    digest: Stage = field(default_factory=Stage)
    publish: Stage = field(default_factory=Stage)
    seconds: float = 0.0
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
        return {"seconds": round(self.seconds, 3), **rows}
