"""Jobs over the workers of a cluster: each free worker gets one, and what a lost one had is done by others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_engine.distributed.crew import Crew, Member, Node
from merge_engine.distributed.parcels import pack
from merge_engine.distributed.placing import Piece, after, choose, held_of
from merge_engine.engine.carrying import Progress
from merge_engine.engine.jobs import Done, Job
from merge_engine.engine.shards import merge_shard
from merge_engine.errors import ClusterError, MergeError
from merge_engine.observe.ledger import Ledger
from merge_engine.storage import File
from merge_engine.text import counted, size_text, some

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
        held: dict[Node, list[float]],
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
        listed = list(jobs)
        pieces = [self._piece(job) for job in listed]
        held = {member.node: held_of(pieces, self._held[member.node]) for member in self._crew.members}

        def send(member: Member, number: int) -> Any:
            return member.actor.do.remote(function, pack(listed[number], self._numbers))

        for member, number, done in _Round(self._crew, pieces, held, send, self._progress).run():
            share = self.shares[member]
            share.ledger.add(done.ledger)
            share.shards += function is merge_shard
            self._held[member.node] = after(pieces[number], self._held[member.node], self._sizes)
            yield done

    def notes(self) -> list[str]:
        """Which node did how much, and what became of workers that are not there any more."""
        lines = []
        for node in dict.fromkeys(member.node.name for member in self.shares):
            own = [share for member, share in self.shares.items() if member.node.name == node]
            shards = counted(sum(share.shards for share in own), "shard")
            read = size_text(sum(share.ledger.read.bytes for share in own))
            busy = max(share.ledger.busiest for share in own)
            lines.append(f"node {node}: {shards}, read {read}, busy {busy:.1f} s")
        return [*lines, *dict.fromkeys(self._crew.notes)]

    def _piece(self, job: Job) -> Piece:
        by_file = {self._numbers[file]: nbytes for file, nbytes in job.plan.bytes_by_file.items()}
        return Piece(job.nbytes, by_file)


class _Round:
    """Some jobs, until all are done.

    ``held`` has for each node the share of each job's inputs that its page cache holds. ``send`` gives a job to a
    worker, and returns Ray's reference to the result.
    """

    def __init__(
        self,
        crew: Crew,
        pieces: Sequence[Piece],
        held: dict[Node, list[float]],
        send: Callable[[Member, int], Any],
        progress: Progress | None,
    ):
        self._crew = crew
        self._pieces = pieces
        self._held = held
        self._send = send
        self._progress = progress
        self._waiting = {number: piece.nbytes for number, piece in enumerate(pieces)}
        self._idle = list(crew.members)
        self._running: dict[Any, tuple[Member, int]] = {}  # by reference
        self._asked: dict[Any, tuple[Member, int]] = {}  # how far a job is
        self._told = [0] * len(pieces)  # bytes of each job that are told as progress

    def run(self) -> Iterator[tuple[Member, int, Done[Any]]]:
        """Each worker, the number of a job, and its result, as they come."""
        import ray

        self._begin()
        while self._running:
            ready, _ = ray.wait([*self._running, *self._asked], num_returns=1, timeout=_TURN)
            for ref in ready:
                try:
                    answer = ray.get(ref)
                except ray.exceptions.RayTaskError:  # a fault of ours
                    raise
                except ray.exceptions.RayError as error:
                    self._lose(ref, error)
                    continue
                if ref in self._asked:
                    self._heard(*self._asked.pop(ref), answer)
                elif ref in self._running:
                    member, number = self._running.pop(ref)
                    if isinstance(answer, Exception):
                        raise _named(answer, member)
                    self._advance(number, self._pieces[number].nbytes)
                    self._idle.append(member)
                    self._begin()  # before what is done takes time here
                    yield member, number, answer
            self._begin()
        if self._waiting:
            raise ClusterError(f"all nodes of the cluster are lost: {some(self._crew.notes)}")

    def _begin(self) -> None:
        """Give each idle worker a job."""
        while self._idle and self._waiting:
            member = self._idle.pop(0)
            number = choose(self._waiting, member.node, self._held)
            del self._waiting[number]
            self._running[self._send(member, number)] = member, number
            self._ask(member, number)

    def _ask(self, member: Member, number: int) -> None:
        if self._progress is not None:
            self._asked[member.actor.moved.remote()] = member, number

    def _heard(self, member: Member, number: int, nbytes: int) -> None:
        """A worker says how far it is. It may have another job by now."""
        if (member, number) in self._running.values():
            self._advance(number, nbytes)
            self._ask(member, number)

    def _advance(self, number: int, nbytes: int) -> None:
        more = min(nbytes, self._pieces[number].nbytes) - self._told[number]
        if more > 0 and self._progress is not None:
            self._told[number] += more
            self._progress(more)

    def _lose(self, ref: Any, error: Exception) -> None:
        """The worker of a reference is lost: others get its job."""
        member, _ = self._running[ref] if ref in self._running else self._asked[ref]
        self._crew.lose(member, error)
        if all(other.node != member.node for other in self._crew.members):
            self._held.pop(member.node, None)
        self._idle = [other for other in self._idle if other is not member]
        for of_it in [one for one, (other, _) in self._running.items() if other is member]:
            _, number = self._running.pop(of_it)
            self._waiting[number] = self._pieces[number].nbytes
        self._asked = {one: what for one, what in self._asked.items() if what[0] is not member}


def _named(error: Exception, member: Member) -> Exception:
    """The error of a job, with the node where it was raised."""
    if isinstance(error, MergeError):
        return type(error)([f"node {member.node.name}: {line}" for line in error.problems])
    return error
