"""What was computed by the engine while it served mergekit, and what mergekit computed itself."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from threading import Lock


@dataclass
class Tally:
    """Numbers by method: ``runs``, checkpoints that the engine merged, and ``tensors``, those that it merged in memory.

    ``handed`` has, by reason, how often mergekit's own code was used.
    """

    runs: Counter[str] = field(default_factory=Counter)
    tensors: Counter[str] = field(default_factory=Counter)
    handed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lock = Lock()  # mergekit computes in a thread for each GPU

    def add(self, counter: Counter[str], key: str) -> None:
        """Count once."""
        with self._lock:
            counter[key] += 1

    def hand_over(self, reason: str) -> None:
        """Count that mergekit computes, and say so the first time that there is this reason."""
        with self._lock:
            self.handed[reason] += 1
            first = self.handed[reason] == 1
        if first:
            warnings.warn(f"mergekit computes this itself, not merge_engine: {reason}", stacklevel=4)
