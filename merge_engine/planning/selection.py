"""What the recipe says about names: tensors that are left out, and names that are mapped to others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import translate
from itertools import takewhile
from typing import NamedTuple

from merge_engine.fit import Remarks
from merge_engine.operands import Operand
from merge_engine.planning.inputs import Catalogue, Inputs, examples, map_all
from merge_engine.recipe import Recipe, TensorNames
from merge_engine.text import shown

_SHOWN = 5


class _Entry(NamedTuple):
    """One entry of a key ``tensors``: its place in the recipe, the text or pattern, and the new text."""

    place: str
    text: str
    new: str = ""


class Selection:
    """The recipe's keys ``tensors``. A model's own entries come before those of the recipe."""

    def __init__(self, recipe: Recipe):
        keys: list[tuple[int | None, str, TensorNames]] = [(None, "tensors", recipe.tensors)]
        for source in (source for each in recipe.stacks.slices for source in each.sources):
            place = source.settings.place.removesuffix("parameters")
            keys.append((source.position, f"{place}tensors", source.tensors))
        self._renames: dict[int | None, list[_Entry]] = {}
        self._excludes: dict[int | None, list[_Entry]] = {}
        for position, place, key in keys:
            self._renames.setdefault(position, []).extend(
                _Entry(f"{place}.rename", old, new) for old, new in key.rename.items()
            )
            self._excludes.setdefault(position, []).extend(
                _Entry(f"{place}.exclude[{i}]", pattern) for i, pattern in enumerate(key.exclude)
            )
        self._used: set[_Entry] = set()

    def apply(self, slices: Sequence[Inputs], remarks: Remarks) -> list[Inputs]:
        """The inputs of all slices under their new names, without the tensors that are left out.

        Two tensors of one input that get the same name are a problem.
        """
        twice: dict[tuple[str, ...], list[str]] = {}
        renamed = map_all(slices, lambda catalogue: self._renamed(catalogue, twice))
        remarks.problems += [
            f"tensors.rename: in {', '.join(labels)}, {len(names)} names would stand for two tensors each "
            f"({examples(names)}); rename fewer, or leave one of the two out"
            for names, labels in twice.items()
        ]
        return self.exclude(renamed)

    def exclude(self, slices: Sequence[Inputs]) -> list[Inputs]:
        """The inputs of all slices without the tensors that are left out, under the names that they have by now."""
        return map_all(slices, self._without)

    def unused(self) -> Iterator[str]:
        """A warning for each of the first entries that fitted no name, and one with the number of the others."""
        entries = (one for i in self._renames for one in self._renames[i] + self._excludes[i])
        unused = [entry for entry in entries if entry not in self._used]
        for entry in unused[:_SHOWN]:
            what = "begins with it" if entry.place.endswith("rename") else "matches it"
            yield f"{entry.place}: {shown(entry.text)}: no tensor's name {what}"
        if len(unused) > _SHOWN:
            yield f"tensors: {len(unused) - _SHOWN:,} more entries fit no tensor's name"

    def _renamed(self, catalogue: Catalogue, collided: dict[tuple[str, ...], list[str]]) -> Catalogue:
        entries = _of(self._renames, catalogue.position)
        if not entries:
            return catalogue
        tensors: dict[str, Operand] = {}
        twice = []
        for name, operand in catalogue.tensors.items():
            entry = next((entry for entry in entries if name.startswith(entry.text)), None)
            if entry is not None:
                self._used.add(entry)
                name = entry.new + name[len(entry.text) :]
            if name in tensors:
                twice.append(name)
            tensors[name] = operand
        if twice:
            collided.setdefault(tuple(twice), []).append(catalogue.label)
        return catalogue.holding(tensors)

    def _without(self, catalogue: Catalogue) -> Catalogue:
        matched = set()
        for entry in _of(self._excludes, catalogue.position):
            found = set(_matching(entry.text, catalogue.tensors))
            if found:
                self._used.add(entry)
                matched |= found
        if not matched:
            return catalogue
        kept = {name: operand for name, operand in catalogue.tensors.items() if name not in matched}
        return catalogue.holding(kept)


def _of(entries: dict[int | None, list[_Entry]], position: int | None) -> list[_Entry]:
    own = entries[position] if position is not None else []
    return own + entries[None]


def _matching(pattern: str, names: Iterable[str]) -> Iterator[str]:
    matches = re.compile(translate(pattern)).match
    return (name for name in names if matches(name))


def pattern_for(names: Sequence[str], others: Iterable[str]) -> str:
    """A pattern for a message, which leaves out all of ``names`` and none of the others, or else the first name."""
    parts = [name.split(".") for name in names]
    alike = ["*" if len(set(column)) > 1 else column[0] for column in zip(*parts, strict=False)]
    patterns = [".".join([*takewhile("*".__ne__, alike[:-1]), "*"])]
    if len({len(each) for each in parts}) == 1:
        patterns.append(".".join(alike))
    for pattern in patterns:
        if len(names) > 1 and pattern != "*" and not any(_matching(pattern, others)):
            return pattern
    return names[0]
