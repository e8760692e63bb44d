"""What was measured of tensors in memory, so that it is not measured again.

How often each magnitude occurs answers every density: the counts of a model's keys are kept in full, and of float16 and
bfloat16 they give the threshold of any rank. Of wider types they give its first bits, and each threshold that was found
is kept too. All else is kept need by need. What was not used for longest is forgotten first.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_engine.backends.memory import view_at
from merge_engine.backends.operations import Found, RankMask, Subject, key_dtype
from merge_engine.backends.statistics import KeyTable, level_bins, levels
from merge_engine.dtypes import DType
from merge_engine.methods import Need, Place, Task

_ENTRY = 500
"""Bytes that Python takes for an entry, beside what is in it."""


@dataclass(frozen=True, eq=False)
class KeyCounts:
    """How often the keys of a tensor occur, by the bits that level 0 resolves: those that occur, the largest first.

    ``up_to`` has for each the number of all keys that are not smaller.
    """

    keys: array[int]
    up_to: array[int]

    @classmethod
    def of(cls, table: KeyTable) -> KeyCounts:
        """The counts of a table of level 0."""
        import torch

        return cls._of(torch.frombuffer(table.counts, dtype=torch.int64))

    @classmethod
    def sum_of(cls, several: Iterable[KeyCounts]) -> KeyCounts:
        """The counts of several tensors together."""
        import torch

        bins = torch.zeros(level_bins(0), dtype=torch.int64)
        for each in several:
            if each.keys:
                keys = torch.frombuffer(each.keys, dtype=torch.uint16).long()
                up_to = torch.frombuffer(each.up_to, dtype=torch.int64)
                bins[keys] += up_to.diff(prepend=up_to.new_zeros(1))
        return cls._of(bins)

    @classmethod
    def _of(cls, bins: Any) -> KeyCounts:
        import torch

        keys = bins.nonzero().view(-1).flip(0)
        return cls(_array("H", keys.to(torch.uint16)), _array("Q", bins[keys].cumsum(0)))

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return 10 * len(self.keys)

    def find(self, rank: int) -> Found:
        """The ``rank``-th largest key, from 1, as it is found at level 0. Raises ``IndexError`` if there is none."""
        at = bisect_left(self.up_to, rank)
        above = self.up_to[at - 1] if at else 0
        return Found(self.keys[at], above, self.up_to[at] - above)


class Kept:
    """Answers of at most ``limit`` bytes together, the most recently used. Thread-safe.

    ``nbytes`` is what they take.
    """

    def __init__(self, limit: int):
        self.nbytes = 0
        self._limit = limit
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, tasks: Sequence[Task]) -> KeptOf:
        """What is kept of one tensor, or of all that are measured together."""
        return KeptOf(self, tasks)

    def get(self, key: Hashable) -> Any:
        """What is kept under a key; None if nothing is."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: Any, nbytes: int = 0) -> None:
        """Keep a value of so many bytes."""
        with self._lock:
            _, before = self._entries.pop(key, (None, 0))
            self._entries[key] = value, nbytes + _ENTRY
            self.nbytes += nbytes + _ENTRY - before
            while self.nbytes > self._limit and self._entries:
                _, (_, oldest) = self._entries.popitem(last=False)
                self.nbytes -= oldest

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0


class KeptOf:
    """What is kept of a tensor, or of all tensors that answer needs together.

    It is kept under the operands and the type that they are merged in. So it serves all recipes over the same operands,
    whatever they call the tensors. Subjects are those of the needs: recipe positions, or scores.
    """

    def __init__(self, kept: Kept, tasks: Sequence[Task]):
        self._kept = kept
        self._tasks = tasks

    def counts(self, subject: Subject) -> KeyCounts | None:
        """The counts of all keys; None if those of some tensor are not known."""
        key = self._key(subject), "counts"
        whole: KeyCounts | None = self._kept.get(key)
        if whole is not None or len(self._tasks) == 1:
            return whole
        found = []
        for task in self._tasks:
            if not isinstance(subject, int) or subject in task.models:
                found.append(self._kept.get((_subject_key(task, subject), "counts")))
                if found[-1] is None:
                    return None
        whole = KeyCounts.sum_of(found)
        self._kept.put(key, whole, whole.nbytes)
        return whole

    def keep_counts(self, task: Task, subject: Subject, counts: KeyCounts) -> None:
        """Keep the counts of one of the tensors."""
        self._kept.put((_subject_key(task, subject), "counts"), counts, counts.nbytes)

    def found(self, subject: Subject, rank: int, counts: KeyCounts | None) -> Found | None:
        """The exact key at a rank, from the ``counts`` where they tell it; None if it is not known."""
        if levels(key_dtype(subject, self._working)) == 1:
            return None if counts is None else counts.find(rank)
        found: Found | None = self._kept.get((self._key(subject), rank))
        return found

    def keep_found(self, subject: Subject, rank: int, found: Found) -> None:
        """Keep the exact key at a rank, where counts do not tell it."""
        if levels(key_dtype(subject, self._working)) > 1:
            self._kept.put((self._key(subject), rank), found)

    def places(self, subject: Subject, mask: RankMask) -> Mapping[int, Place] | None:
        """The places that split the ties of a mask, by rank; None if they are not known."""
        found: Mapping[int, Place] | None = self._kept.get((self._key(subject), self._names, mask))
        return found

    def keep_places(self, subject: Subject, mask: RankMask, places: Mapping[int, Place]) -> None:
        """Keep the places that split the ties of a mask."""
        self._kept.put((self._key(subject), self._names, mask), places)

    def answer(self, need: Need) -> Any:
        """The answer to a need, but for those about ranks; None if it is not known."""
        return self._kept.get((self._context, need))

    def keep_answer(self, need: Need, answer: Any) -> None:
        """Keep the answer to a need."""
        nbytes = len(answer) * answer.itemsize if isinstance(answer, array) else 0
        self._kept.put((self._context, need), answer, nbytes)

    @property
    def _working(self) -> DType:
        return self._tasks[0].working

    @property
    def _names(self) -> Hashable:
        return tuple(task.name for task in self._tasks)

    @property
    def _context(self) -> Hashable:
        """All that the answer to a need depends on beside the need."""
        return tuple(
            (task.inputs, task.has_base, task.models, task.working, task.shape, task.storage_rounding)
            for task in self._tasks
        )

    def _key(self, subject: Subject) -> Hashable:
        if len(self._tasks) == 1:
            return _subject_key(self._tasks[0], subject)
        return tuple(
            _subject_key(task, subject)
            for task in self._tasks
            if not isinstance(subject, int) or subject in task.models
        )


def _subject_key(task: Task, subject: Subject) -> Hashable:
    """All that the keys of a model's task vector, or of a score, depend on."""
    if not isinstance(subject, int):
        return task.inputs, task.has_base, task.working, subject
    base = task.inputs[0] if task.has_base else None
    return base, task.inputs[task.models.index(subject) + task.has_base], task.working


def _array(code: str, values: Any) -> array[int]:
    """The elements of a contiguous tensor."""
    made = array(code)
    if values.nbytes:
        made.frombytes(view_at(values.data_ptr(), values.nbytes))
    return made
