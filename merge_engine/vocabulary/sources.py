"""Where each row of a vocabulary tensor of the output comes from, for each input.

A row of the output is that of a token. An input that has the token gives its own row. What an input that lacks it gets
in place of a row decides what a method does with the token (docs/vocabularies.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from merge_engine.operands import AVERAGE, MEAN, ZERO, Operand, RowMap, Rows, RowSource

_NOWHERE: RowSource = (ZERO, 0)

Origin = Literal["mean", "zero", "models", "mergekit"]


@dataclass(frozen=True)
class TokenRow:
    """What the recipe says of the row of a token: for inputs that lack it, or with ``force`` for all.

    The row is ``row`` of the checkpoint with this ``label``; with None for the two it is zero.
    """

    label: str | None
    row: int | None
    force: bool


@dataclass
class RowSources:
    """The rules for all vocabulary tensors of a merge. Inputs are named by the labels of their checkpoints.

    ``own`` has the id of each row of the output in each input, -1 where it has none.
    ``named`` are the tokens of the output by id, of ``rows`` rows. ``given`` has what the recipe says of single tokens,
    by id. ``base`` is the base model. ``without_source`` collects tokens that no input has, with a tensor, and
    ``lacking`` the inputs that the recipe names for a token of a tensor in which they have no such row.
    """

    own: Mapping[str, Sequence[int]] = field(repr=False)
    named: Mapping[int, str]
    rows: int
    base: str
    origin: Origin
    given: Mapping[int, TokenRow]
    without_source: dict[str, str] = field(default_factory=dict)
    lacking: dict[tuple[str, str], str] = field(default_factory=dict)
    _known: dict[object, tuple[list[RowMap | None], int]] = field(default_factory=dict)

    def align(
        self,
        name: str,
        operands: Sequence[Operand],
        labels: Sequence[str],
        has_base: bool,
        spare: Mapping[str, Operand],
    ) -> list[Operand]:
        """The operands of a vocabulary tensor with the rows of the output, the base's first if ``has_base``.

        ``spare`` are those of inputs that this tensor is not merged from: they give rows that none of the others has.

        An operand whose rows are those of the output already stays as it is.
        """
        every, of_every = [*operands, *spare.values()], [*labels, *spare]
        key = tuple(of_every), tuple(operand.shape[0] for operand in every), len(operands), has_base
        if key not in self._known:
            self._known[key] = self._maps(name, every, of_every, len(operands), has_base)
        maps, new = self._known[key]
        return [
            operand if rows is None else _with_mean(Rows.of(_from(every, i), rows), new)
            for i, (operand, rows) in enumerate(zip(operands, maps, strict=True))
        ]

    def _maps(
        self, name: str, operands: Sequence[Operand], labels: Sequence[str], merged: int, has_base: bool
    ) -> tuple[list[RowMap | None], int]:
        """The maps of the first ``merged`` operands, in which the own number is 0 and the others follow.

        Returned is also the number of new rows: those at the end that no token and no input has. None stands for the
        map of an operand that stays as it is.
        """
        columns, others = self._sources(name, operands, labels, merged, has_base)
        kept = self.rows
        while kept and kept - 1 not in self.named and others.get(kept - 1) == (_NOWHERE, False):
            kept -= 1
        maps = []
        for i, column in enumerate(columns):
            in_place = {
                row: _numbered(source, i)
                for row, (source, everywhere) in others.items()
                if everywhere or column[row] < 0
            }
            maps.append(RowMap.of(column[:kept], in_place, self.origin == "mergekit"))
        return [
            None if rows.is_identity and self.rows == operand.shape[0] else rows
            for rows, operand in zip(maps, operands[:merged], strict=True)
        ], self.rows - kept

    def _sources(
        self, name: str, operands: Sequence[Operand], labels: Sequence[str], merged: int, has_base: bool
    ) -> tuple[list[Sequence[int]], dict[int, tuple[RowSource, bool]]]:
        """The own rows of the merged operands, -1 where one has none, and what comes in place of such rows.

        With a source in place stands whether it is that of all operands. Operands have the numbers that they have here.
        """
        limits = [operand.shape[0] for operand in operands]
        columns = [
            own if max(own, default=-1) < limit else [i if i < limit else -1 for i in own]
            for own, limit in zip((self.own[label] for label in labels), limits, strict=True)
        ]
        base = 0 if has_base else labels[:merged].index(self.base) if self.base in labels[:merged] else None
        lacking = (row for column in columns[:merged] for row, there in enumerate(column) if there < 0)
        others = {}
        for row in sorted({*self.given, *lacking}):
            own = [column[row] for column in columns]
            if row in self.given:
                others[row] = self._given(name, row, labels, limits), self.given[row].force
            else:
                others[row] = self._fill(name, row, own, merged, base, has_base)
        return columns[:merged], others

    def _fill(
        self, name: str, row: int, own: Sequence[int], merged: int, base: int | None, has_base: bool
    ) -> tuple[RowSource, bool]:
        """The source for inputs that lack a row, and whether it is that of all inputs."""
        having = [(k, there) for k, there in enumerate(own[:merged]) if there >= 0]
        if not having and row in self.named:
            spare = [(k, there) for k, there in enumerate(own) if there >= 0]
            if spare and self.origin != "mergekit":
                return spare[0], False
            self.without_source.setdefault(self.named[row], name)
        if not having:
            return _NOWHERE, False
        if len(having) == 1 or row not in self.named:
            return having[0], False
        if base is not None and own[base] >= 0:
            return (base, own[base]), False
        if has_base and self.origin == "mean":
            return (MEAN, 0), False
        if has_base and self.origin == "zero":
            return (ZERO, 0), False
        return (AVERAGE, tuple(having)), has_base and self.origin == "models"

    def _given(self, name: str, row: int, labels: Sequence[str], limits: Sequence[int]) -> RowSource:
        """The source that the recipe names for a row."""
        given = self.given[row]
        if given.label is None or given.row is None:
            return ZERO, 0
        if given.label in labels and given.row < limits[labels.index(given.label)]:
            return labels.index(given.label), given.row
        self.lacking.setdefault((given.label, self.named[row]), name)
        return ZERO, 0


def _with_mean(operand: Rows, new: int) -> Rows:
    """The operand with new rows at the end that are the mean of its rows."""
    if not new:
        return operand
    rows = operand.map.rows
    return Rows.of([operand], RowMap.of_runs(rows + new, [(0, 0, 0), (rows, MEAN, 0)]))


def _from(operands: Sequence[Operand], i: int) -> list[Operand]:
    """The operands with number ``i`` first."""
    return [operands[i], *operands[:i], *operands[i + 1 :]]


def _numbered(source: RowSource, i: int) -> RowSource:
    """A source with the numbers that operands have when number ``i`` comes first."""

    def number(k: int) -> int:
        return 0 if k == i else k + 1 if k < i else k

    kind, start = source
    if isinstance(start, tuple):
        return kind, tuple((number(k), row) for k, row in start)
    if kind == MEAN:
        return kind, number(start)
    return (number(kind), start) if kind >= 0 else source
