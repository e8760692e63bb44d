"""Which job a free worker gets: the largest first, and where the page cache holds its inputs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

_STEPS = 4
"""Shares of the page cache are compared in quarters: smaller differences matter less than an even end."""

_JOBS_EACH = 2
"""Jobs that each of several workers of a node has at least, in the mean."""

N = TypeVar("N", bound=Hashable)


class Piece(NamedTuple):
    """A job as far as placing it matters: bytes that it reads, and its input bytes by number of the file."""

    nbytes: int
    by_file: Mapping[int, int]


def choose(waiting: Mapping[int, int], node: N, held: Mapping[N, Sequence[float]]) -> int:
    """The number of the job that a worker of ``node`` does next.

    ``waiting`` has the bytes of all jobs that nobody has begun, by their numbers. ``held`` has for each living node
    the share of each job's inputs that its page cache holds (see ``held_of``). First comes what this node holds and
    others do not, last what others hold and this one does not, and among equals the largest job: then the last jobs are
    small, and all workers end at about the same time.
    """
    own = held[node]
    others = [shares for other, shares in held.items() if other != node]

    def value(number: int) -> tuple[int, int, int]:
        best = max((shares[number] for shares in others), default=0.0)
        return round(_STEPS * (own[number] - best)), waiting[number], -number

    return max(waiting, key=value)


def held_of(pieces: Sequence[Piece], shares: Sequence[float]) -> list[float]:
    """The share of each job's inputs, from 0 to 1, that a page cache holds. ``shares`` are those of the files."""
    return [
        sum(nbytes * shares[file] for file, nbytes in piece.by_file.items())
        / max(sum(piece.by_file.values()), 1)
        for piece in pieces
    ]


def after(piece: Piece, shares: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """The shares of files, of these ``sizes``, that a page cache holds after a job has read its inputs through it."""
    return [
        min(1.0, share + piece.by_file.get(file, 0) / max(sizes[file], 1))
        for file, share in enumerate(shares)
    ]


def workers_of(cores: float, gpus: int, nodes: int, jobs: int) -> int:
    """The number of workers of a node with so many cores, and GPUs that are used, if all such ``nodes`` share the jobs.

    One for each GPU. On the CPU there are two: while one begins or ends a shard, the other computes. Two of one thread
    took 0.77 s where one of two threads took 1.09 s (TIES; linear: 0.41 and 0.70 s). With few jobs there is one, or
    else the last ones would leave half of the cores idle.
    """
    if gpus:
        return gpus
    return 2 if cores >= 2 and jobs >= _JOBS_EACH * 2 * nodes else 1


def evenly(cores: float, workers: int) -> tuple[float, int]:
    """The cores and threads of each of several workers of one node, which take no more than it has."""
    each = cores / workers
    return (float(int(each)), int(each)) if each >= 1 else (each, 1)
