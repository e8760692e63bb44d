"""Jobs: pieces of a merge that any process can do, and can do again.

A job is plain data. It can be sent to any process that sees the inputs and the output folder. A function does it and
returns ``Done``; a ``Do`` maps that function over jobs, in this process, in a pool, or on other machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from merge_engine.backends import Backend
from merge_engine.engine.choosing import choose_backend
from merge_engine.engine.scheduling import open_access
from merge_engine.observe.ledger import Ledger
from merge_engine.operands import Access
from merge_engine.planning import MergePlan
from merge_engine.storage import Way

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of a plan.

    ``device``, ``backend`` and ``threads`` are those of the process that does the job (see ``create_backend``), and
    ``memory`` is the bytes of tensor data that it holds at a time (see ``run``). ``way`` is how it reads; None: as
    ``way_here`` says for the files of this piece.
    """

    plan: MergePlan
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    memory: int | None = None
    way: Way | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of inputs that the job reads, as far as that is known before."""
        return sum(self.plan.bytes_by_file.values())

    @contextmanager
    def opened(self, output: Path | None = None) -> Iterator[tuple[Backend, Access]]:
        """The backend of this process, and the open inputs. ``output`` is the folder that is written to."""
        backend = choose_backend(self.plan, output, self.backend, self.threads, self.device)
        with open_access(self.plan, backend, way=self.way) as access:
            yield backend, access


@dataclass(frozen=True)
class Done(Generic[T]):
    """The result of a job, and what the process did for it."""

    value: T
    ledger: Ledger


Do: TypeAlias = Callable[[Callable[[Any], Done[Any]], Iterable[Any]], Iterable[Done[Any]]]
"""Maps a function over jobs. The results come in any order; that of one job may come twice."""
