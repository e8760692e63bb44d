"""The few primitives in which every merge method is spelled.

Statistics are integers, or sums in a fixed order, so a result depends neither on how a tensor was cut into
chunks nor on the backend that measured it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from merge_engine.backends.operations import (
    Chunk,
    Combine,
    Consensus,
    FoundBand,
    KeyColumn,
    Line,
    Mask,
    Nearswap,
    Rank,
    SolvedBand,
    Sought,
    Subject,
)
from merge_engine.dtypes import DType
from merge_engine.errors import DeviceMemoryError
from merge_engine.storage.memory import allocate

if TYPE_CHECKING:
    import torch

HEADROOM = 256 << 20
"""Bytes of a device for counts, sums, keys that are being ranked and lists, beside what a run says it needs."""


class Backend(ABC):
    """One way of computing. All backends give the same bytes and the same counts.

    A backend may work behind the caller's back: what it returns as ``Any`` are its own handles, and
    ``fetch`` waits for the values they stand for.
    """

    name: str
    depth: int = 1
    """Visits that may be handed over before the first of them is fetched."""
    threads: int = 1
    """Of this machine's own processor that compute at a time."""
    has_link: bool = False
    """Inputs and outputs cross a link to memory of a device, which only ``upload`` and ``download`` reach."""
    tensors_on: str = "cpu"
    """The device of the tensors that ``tensor`` takes, as torch names it."""
    reads_in_place: bool = False
    """Inputs may be read-only memory from anywhere, at any multiple of their elements' size."""

    def attach(self, nbytes: int, scratch: int, staging: memoryview) -> memoryview:
        """Memory for inputs and outputs, of which ``array`` and ``output`` take pieces until ``detach``.

        It has ``nbytes`` bytes in whole pages, and pieces start at whole pages. A view of a device's memory has an
        address and a length, but no bytes that the host can look at. ``scratch`` is what masks may take beside it, in
        bytes. ``staging`` is the host memory that ``upload`` and ``download`` will copy from and to; it is empty for a
        backend without a link. Raises ``DeviceMemoryError`` when the device has too little memory.
        """
        try:
            return allocate(nbytes)
        except MemoryError:
            raise DeviceMemoryError(f"the system has less than {nbytes / 2**20:,.0f} MiB of memory") from None

    def detach(self) -> None:  # noqa: B027
        """Wait for all work, and let go of what ``attach`` took."""

    def upload(self, source: memoryview, target: memoryview) -> None:
        """Copy a piece of the staging memory over the link. Returns once the copy is done. Thread-safe."""
        target[:] = source

    def download(self, source: memoryview, target: memoryview) -> None:
        """Copy to a piece of the staging memory. Returns once the copy is done. Thread-safe."""
        target[:] = source

    def free_memory(self) -> int | None:
        """Bytes of the device's memory that nobody has taken; None without a link."""
        return None

    def together(self) -> AbstractContextManager[None]:
        """Whatever is asked for inside may be launched as one, when the context is left or a value is fetched."""
        return nullcontext()

    def fetch(self, value: Any) -> Any:
        """The value that a handle stands for, once it is known."""
        return value

    def mark(self) -> Any:
        """A handle whose ``fetch`` waits for everything asked for so far."""
        return None

    @abstractmethod
    def array(self, memory: memoryview, dtype: DType) -> Any:
        """Take a piece of the attached memory, or host memory if there is no link, as an input.

        Its length decides the number of elements. The memory must stay as it is until what uses the array has been
        fetched.
        """

    def output(self, memory: memoryview, dtype: DType) -> Any:
        """Take memory as an output, like ``array``. It is written once the outcome has been fetched."""
        return self.array(memory, dtype)

    @abstractmethod
    def tensor(self, tensor: torch.Tensor) -> Any:
        """Wrap a contiguous tensor on a device that the backend can reach, without a copy."""

    @abstractmethod
    def new_counts(self, level: int, within: Sequence[Any]) -> Any:
        """Empty counts of magnitude keys at a level, with a slot for each item of ``within``.

        Below level 0 a slot counts only keys whose bits above the level's are those of its item: a ``Found`` of
        the level above, or a handle to one. At level 0 all are None. ``fetch`` gives a ``KeyTable`` for each slot.
        """

    @abstractmethod
    def count(self, chunk: Chunk, columns: Sequence[KeyColumn], counts: Any) -> None:
        """Add the keys of a chunk's models, or of scores, to ``counts``, each column to its slot.

        All columns have keys of one dtype (see ``key_dtype``).
        """

    @abstractmethod
    def find(self, counts: Any, ranks: Sequence[Rank]) -> list[Any]:
        """Find keys by rank in what was counted: handles to ``Found``, exact at the last level.

        This or ``fetch`` raises ``IndexError`` for a rank that no key has.
        """

    def find_all(self, chunk: Chunk, level: int, sought: Sequence[Sought]) -> list[list[Any]]:
        """Find keys by rank in a chunk that holds all elements: handles to ``Found``, in the order of ``sought``.

        The same as counting the chunk and finding the ranks; a backend may know a shorter way. It may find whole keys
        at level 0, if it takes them back as ``within`` at the next levels and returns them as they are. So a level's
        handles are fetched, or used elsewhere, only if it is the last one.
        """
        counts = self.new_counts(level, [one.within for one in sought])
        self.count(chunk, [KeyColumn(slot, one.model) for slot, one in enumerate(sought)], counts)
        ranks = [Rank(slot, rank) for slot, one in enumerate(sought) for rank in one.ranks]
        found = iter(self.find(counts, ranks))
        return [[next(found) for _ in one.ranks] for one in sought]

    @abstractmethod
    def bands(self, bands: Sequence[FoundBand], working: DType) -> list[SolvedBand]:
        """Turn ranks and what was found for them into masks. ``working`` is the dtype of the keys."""

    @abstractmethod
    def locate(self, chunk: Chunk, model: Subject, key: int, nth: int) -> tuple[int, int | None]:
        """How many elements have this key, and the offset in the chunk of the ``nth`` of them, from 0.

        None when there are not so many.
        """

    @abstractmethod
    def l1_norms(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> Any:
        """The L1 norm of every task vector, whole and masked: a handle to ``BlockSums``.

        They have two columns for each model: the sum of magnitudes, and that of those its mask keeps.
        """

    @abstractmethod
    def squares(self, chunk: Chunk, masks: Sequence[Mask], storage_rounding: bool) -> Any:
        """The sum of squares of every task vector, whole and masked: a handle to ``BlockSums``, as of ``l1_norms``."""

    @abstractmethod
    def overlaps(self, chunk: Chunk, masks: Sequence[Mask]) -> Any:
        """How many entries of each model are kept by its mask alone: a handle to a tuple of ``Overlap``.

        Masks are bands whose bounds are above 0.
        """

    @abstractmethod
    def gram(self, chunk: Chunk, of_deltas: bool = False, line: Line | None = None) -> Any:
        """The inner products of all pairs of inputs, or of task vectors: a handle to ``BlockSums``.

        They have a column for each pair i <= j, row by row: n * (n + 1) / 2 for n inputs. With ``line`` they have as
        many for each line that a block may have elements of (``lines_of_block``), 0 where it has fewer. The chunk
        begins with a block (``sum_block``).
        """

    @abstractmethod
    def consensus(self, chunk: Chunk, operation: Consensus, output: Any) -> Any:
        """Merge the task vectors into ``output``, which must not overlap any input. A handle to an ``Outcome``."""

    @abstractmethod
    def combine(self, chunk: Chunk, operation: Combine, output: Any) -> Any:
        """Write a linear combination of all inputs into ``output``. A handle to an ``Outcome``."""

    @abstractmethod
    def nearswap(self, chunk: Chunk, operation: Nearswap, output: Any) -> Any:
        """Move the base to the chunk's only model where the two are near. A handle to an ``Outcome`` without counts."""
