"""Jobs over the workers of a cluster: each free worker gets one, and what a lost one had is done by others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_engine.distributed.crew import Crew, Member
from merge_engine.distributed.parcels import pack
from merge_engine.distributed.placing import Piece, after, choose
from merge_engine.engine.carrying import Progress
from merge_engine.engine.jobs import Done, Job
from merge_engine.engine.shards import merge_shard
from merge_engine.errors import ClusterError, MergeError
from merge_engine.observe.ledger import Ledger
from merge_engine.storage import File
from merge_engine.text import counted, size_text

_TURN = 1.0
"""Seconds of waiting at a time: in between, Python sees Ctrl-C."""


@dataclass
class Share:
    """What one worker has done: shards, and its ledger."""

    shards: int = 0
    ledger: Ledger = field(default_factory=Ledger)


class Mapper:
    """Maps functions over jobs (see ``engine.jobs.Do``): the largest first, where the page cache holds the inputs.

    ``numbers`` and ``held`` are those of ``Crew.show``. ``progress`` is called with the input bytes that are done on
    any node. ``shares`` has what each worker did.
    """

    def __init__(
        self,
        crew: Crew,
        numbers: Mapping[File, int],
        held: dict[Member, list[float]],
        progress: Progress | None,
    ):
        self._crew = crew
        self._numbers = numbers
        self._sizes = [file.size for file in numbers]
        self._held = held
        self._progress = progress
        self.shares = {member: Share() for member in crew.members}

    def __call__(self, function: Callable[..., Done[Any]], jobs: Iterable[Job]) -> Iterator[Done[Any]]:
        """The results of all jobs, in the order in which they are done.

        Raises the error of a job, and ``ClusterError`` when no worker is left.
        """
        import ray

        jobs = list(jobs)
        pieces = [self._piece(job) for job in jobs]
        waiting = dict(enumerate(pieces))
        done_bytes = [0] * len(jobs)
        idle = list(self._crew.members)
        running: dict[Any, tuple[Member, int]] = {}
        asked: dict[Any, tuple[Member, int]] = {}  # how far a job is

        def begin() -> None:
            while idle and waiting:
                member = idle.pop(0)
                number = choose(waiting, member, self._held)
                del waiting[number]
                parcel = pack(jobs[number], self._numbers)
                running[member.actor.do.remote(function, parcel)] = member, number
                ask(member, number)

        def ask(member: Member, number: int) -> None:
            if self._progress is not None:
                asked[member.actor.moved.remote()] = member, number

        def advance(number: int, nbytes: int) -> None:
            more = min(nbytes, pieces[number].nbytes) - done_bytes[number]
            if more > 0 and self._progress is not None:
                done_bytes[number] += more
                self._progress(more)

        while waiting or running:
            begin()
            if not running:
                raise ClusterError(["all nodes of the cluster were lost", *self._crew.notes])
            ready, _ = ray.wait([*running, *asked], num_returns=1, timeout=_TURN)
            for ref in ready:
                member, number = running.pop(ref) if ref in running else asked.pop(ref)
                try:
                    answer = ray.get(ref)
                except ray.exceptions.RayTaskError:
                    raise
                except ray.exceptions.RayError:
                    if member in self._crew.members:
                        self._lose(member, running, waiting, pieces)
                    continue
                if isinstance(answer, int):
                    if (member, number) in running.values():
                        advance(number, answer)
                        ask(member, number)
                    continue
                if isinstance(answer, Exception):
                    raise _named(answer, member)
                advance(number, pieces[number].nbytes)
                self._note(member, function, answer, pieces[number])
                idle.append(member)
                begin()
                yield answer

    def notes(self) -> list[str]:
        """Which node did how much, and what became of the others."""
        lines = []
        for member, share in self.shares.items():
            ledger = share.ledger
            busy = max(stage.seconds for stage in ledger.stages().values())
            lines.append(
                f"{member.name}: {counted(share.shards, 'shard')}, read {size_text(ledger.read.bytes)}, "
                f"busy {busy:.1f} s"
            )
        return [*lines, *self._crew.notes]

    def _piece(self, job: Job) -> Piece:
        by_file = {self._numbers[file]: nbytes for file, nbytes in job.plan.bytes_by_file.items()}
        return Piece(job.nbytes, by_file)

    def _lose(
        self,
        member: Member,
        running: dict[Any, tuple[Member, int]],
        waiting: dict[int, Piece],
        pieces: Sequence[Piece],
    ) -> None:
        """Give the work of a lost worker back."""
        self._crew.lose(member)
        self._held.pop(member, None)
        for ref, (other, number) in list(running.items()):
            if other is member:
                del running[ref]
                waiting[number] = pieces[number]

    def _note(
        self, member: Member, function: Callable[..., Done[Any]], done: Done[Any], piece: Piece
    ) -> None:
        share = self.shares[member]
        share.ledger.add(done.ledger)
        share.shards += function is merge_shard
        if any(self._held[member]) or done.ledger.read.bytes:
            self._held[member] = after(piece, self._held[member], self._sizes)


def _named(error: Exception, member: Member) -> Exception:
    """The error of a job, with the node where it was raised."""
    if isinstance(error, MergeError):
        return type(error)([f"node {member.node.name}: {line}" for line in error.problems])
    return error
