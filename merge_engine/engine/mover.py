"""Inputs to where the backend computes, and outputs from there: the interface of the two ways, and what they share.

A backend that computes in this host's memory is fed by ``InHostMemory``, one with a device of its own by ``OverLink``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future

from merge_engine.engine.batches import Batch, Piece
from merge_engine.engine.copying import copy
from merge_engine.engine.ring import Ring
from merge_engine.engine.sinks import Target
from merge_engine.observe.ledger import Ledger
from merge_engine.operands import Access
from merge_engine.planning import Visit
from merge_engine.storage import cores
from merge_engine.workers import Workers

MOST_READERS = 16
"""With buffers in the processor's cache, 16 threads read faster than a link of PCIe 5.0 carries."""

READ_THREADS = min(max(4, cores()), MOST_READERS)
"""With fewer than four, a disk is idle between reads; copies out of the page cache keep all cores busy."""

WRITE_THREADS = min(max(2, cores() // 2), 8)
"""Writes to a RAM disk are copies by the processor, and one file takes one thread at a time."""


class Mover(ABC):
    """Reads with some threads into the ring ``inputs``, and writes with others to ``targets``, one for each recipe."""

    def __init__(self, access: Access, inputs: Ring, targets: Sequence[Target], ledger: Ledger):
        self.access = access
        self.inputs = inputs
        self.targets = targets
        self.ledger = ledger
        self.readers = Workers(READ_THREADS, "read")
        self.writers = Workers(WRITE_THREADS, "write")

    def start(self) -> None:
        """Start the threads. Raises ``BackendError`` if the system refuses them."""
        self.readers.start()
        self.writers.start()

    @abstractmethod
    def load(self, visits: Sequence[Visit]) -> Batch:
        """Wait for memory for the inputs of visits, and start to read them.

        Raises ``RingClosed`` when the run is stopped, and ``CheckpointError`` for a file that cannot be opened or has
        changed.
        """

    def copy(self, visits: Sequence[Visit]) -> Batch:
        """Start to copy the tensors of visits. They go from the inputs to the output, and not to the backend."""

        def copy_all() -> None:
            for visit in visits:
                for group in visit.task.groups:
                    targets = [self.targets[part.recipe] for part in group.parts]
                    copy(group.task, self.access, targets, self.ledger)

        return Batch([Piece(visit, []) for visit in visits], [self.readers.submit(copy_all)])

    def used(self, batch: Batch) -> None:  # noqa: B027
        """Let go of the inputs of a batch.

        Raises ``CheckpointError`` if the backend was not given the bytes of the files.
        """

    @abstractmethod
    def take_away(self, batch: Batch) -> list[Future[None]]:
        """Start to write and to digest the outputs of a batch, which is finished when all of these are."""

    def finish(self) -> None:
        """Wait until all that is taken away has arrived."""
        self.writers.finish()

    def close(self) -> None:
        """End all threads. What has not begun will not be done."""
        for workers in (self.readers, self.writers):
            workers.close()
