"""What answers to needs are made of: keys by rank, and the places of ties, which can be sent to other processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_engine.backends.operations import (
    EVERY_POSITION,
    NO_POSITION,
    Found,
    Positions,
    RankMask,
    Subject,
)
from merge_engine.methods import Place, Task

Query = tuple[Subject, int]
"""A model's recipe position or a score, and a rank."""

Split = tuple[Subject, RankMask, int]
"""A model's recipe position or a score, a mask whose ties are split by index, and one of its ranks."""

EVERY_KEY = 2**63 - 1
"""More keys than a tensor has."""


@dataclass(frozen=True)
class SharedAnswers:
    """The answers to the shared needs, as data that can be sent: the keys by rank, the places by split."""

    found: Sequence[tuple[Query, Found]]
    places: Sequence[tuple[Split, Place]]


def has_subject(task: Task, subject: Subject) -> bool:
    """Whether a model has the tensor; a score is of all that have it."""
    return not isinstance(subject, int) or subject in task.models


def place_of(task: Task, subject: Subject) -> Subject:
    """What a chunk calls it: a model's number among those that have the tensor, or the score."""
    return task.models.index(subject) if isinstance(subject, int) else subject


def deciding_ties(mask: RankMask, found: Mapping[int, Found]) -> dict[int, int]:
    """For each rank whose ties are split by index: the occurrence of the key, from 0, at the split."""
    counts = {}
    low = found[mask.last]
    kept = mask.last - low.above
    if mask.slack == 0 and kept < low.equal and low.key > 0:
        counts[mask.last] = low.equal - kept if mask.stable_ascending else kept - 1
    if mask.first > 1:
        high = found[mask.first]
        dropped = mask.first - 1 - high.above
        if dropped > 0 and high.key > 0:
            counts[mask.first] = high.equal - dropped - 1
    return counts


def positions_of(task: Task, place: Place | None, from_there: bool) -> Positions:
    """The positions at which ties are kept: up to the place, or from it on.

    Tensors are in the order of their names.
    """
    if place is None:
        return EVERY_POSITION
    if task.name == place.tensor:
        return (place.index, EVERY_POSITION[1]) if from_there else (0, place.index)
    return EVERY_POSITION if (task.name > place.tensor) == from_there else NO_POSITION
