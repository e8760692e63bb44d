"""What the page of a sweep shows: its recipes with their results, and the measures that follow from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from merge_engine.errors import ReportError
from merge_engine.observe.result import MergeResult, ModelCounts
from merge_engine.report.merged_norms import Norms
from merge_engine.report.values import in_order, text_of
from merge_engine.text import without_common_folder

Score = float | tuple[float, float]
"""A measured number, or one with its standard error."""

MODEL = "model"
RECIPE = "recipe"


@dataclass(frozen=True)
class SweepEntry:
    """One recipe of a sweep.

    ``values`` has its value on each axis of the grid; a list of recipes has no axes, and ``values`` is empty.
    ``folder`` is the output folder, or None if the tensors went elsewhere. ``scores`` has what the merged model
    scored, by name: a number, or a number with its standard error.
    """

    label: str
    values: Mapping[str, object]
    result: MergeResult
    folder: Path | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)


class Point(NamedTuple):
    """A number with its standard error, and where it stands: a value for each dimension of its measure."""

    at: tuple[object, ...]
    value: float
    error: float | None = None


@dataclass(frozen=True)
class Measure:
    """A number that each recipe, or each model of each recipe, has: a section of the page.

    ``dimensions`` are the axes of the grid that make a difference to it, or "recipe" if there is no grid, and then
    "model" if each model has a number of its own. ``from_zero`` says that a length from zero means something.
    """

    title: str
    text: str
    unit: str
    dimensions: tuple[str, ...]
    points: tuple[Point, ...]
    from_zero: bool = True


class Sweep:
    """The recipes of a sweep, side by side.

    ``axes`` has the values of each axis in the order to show them: numbers by size, all others as they come.
    ``models`` has the labels of all models by name.
    """

    def __init__(self, entries: Sequence[SweepEntry], axes: Iterable[str], norms: Sequence[Norms | None]):
        """Raises ``ReportError`` if there are no recipes, or if the axes do not tell them apart."""
        self.entries = entries
        axes = list(dict.fromkeys(axes))
        _check(entries, axes)
        self.axes = {axis: in_order([entry.values[axis] for entry in entries]) for axis in axes}
        self.varying = [axis for axis, values in self.axes.items() if len(values) > 1]
        self.norms = norms
        named = [_names(entry.result) for entry in entries]
        self.counts = [
            {names[position]: counts for position, counts in entry.result.counts.items()}
            for names, entry in zip(named, entries, strict=True)
        ]
        self.kept_norms = [
            {} if each is None else {names[position]: share for position, share in each.kept_shares.items()}
            for names, each in zip(named, norms, strict=True)
        ]
        found = list(dict.fromkeys(name for counts in self.counts for name in counts))
        self.models = dict(zip(found, without_common_folder(found), strict=True))
        self.scores = list(dict.fromkeys(name for entry in entries for name in entry.scores))
        self.elements = [sum(tensor.elements for tensor in entry.result.per_tensor) for entry in entries]
        if self.varying:
            _check_distinct(entries, self.varying)

    @cached_property
    def measures(self) -> list[Measure]:
        """All that can be drawn, each with at least one number."""
        shares = [
            {name: count_shares(c, elements) for name, c in counts.items()}
            for counts, elements in zip(self.counts, self.elements, strict=True)
        ]
        found = [
            self._of_models(
                "Kept",
                "What the trim or the draw keeps of each task vector. An entry that is 0 is never counted.",
                "% of all elements",
                [{name: each["kept_share"] for name, each in row.items()} for row in shares],
            ),
            self._of_models(
                "Lost to the election",
                "What was kept and points against the elected sign: it is not in the merged model.",
                "% of kept entries",
                [{name: each["lost_share"] for name, each in row.items()} for row in shares],
            ),
            self._of_models(
                "Saved by slack",
                "What is in the merged model only because of a slack in the trim or in the election.",
                "% of kept entries",
                [{name: each["saved_share"] for name, each in row.items()} for row in shares],
            ),
            self._of_models(
                "Norm of what was kept",
                "The length (L2 norm) of the kept entries of each task vector, beside that of the whole task vector.",
                "% of the task vector's norm",
                self.kept_norms,
            ),
            self._measure(
                "Norm of the merged task vector",
                "The length (L2 norm) of the difference between the merged model and its base.",
                "% of the base's norm",
                [
                    (place, 100 * each.merged_share, None)
                    for place, each in zip(self._places, self.norms, strict=True)
                    if each is not None and each.merged_share is not None
                ],
            ),
            *(self._score(name) for name in self.scores),
        ]
        return [measure for measure in found if measure.points]

    @property
    def _dimensions(self) -> tuple[str, ...]:
        return tuple(self.varying) or (RECIPE,)

    @property
    def _places(self) -> list[tuple[object, ...]]:
        """Where each recipe stands. The number keeps recipes apart that have the same label."""
        if self.varying:
            return [tuple(entry.values[name] for name in self.varying) for entry in self.entries]
        return [(number,) for number in range(len(self.entries))]

    def _of_models(self, title: str, text: str, unit: str, shares: Sequence[Mapping[str, float]]) -> Measure:
        points = [
            ((*place, self.models[name]), 100 * share, None)
            for place, row in zip(self._places, shares, strict=True)
            for name, share in row.items()
        ]
        return self._measure(title, text, unit, points, MODEL)

    def _score(self, name: str) -> Measure:
        points, has_errors = [], False
        for place, entry in zip(self._places, self.entries, strict=True):
            value, error = score_of(entry, name)
            if value is not None:
                points.append((place, value, error))
                has_errors |= error is not None
        bars = " The bars reach one standard error to each side." if has_errors else ""
        return self._measure(f"Score: {name}", f"As it was measured.{bars}", name, points, from_zero=False)

    def _measure(
        self,
        title: str,
        text: str,
        unit: str,
        points: Iterable[tuple[tuple[object, ...], float, float | None]],
        *more: str,
        from_zero: bool = True,
    ) -> Measure:
        made = [Point(*point) for point in points]
        dimensions = list(self._dimensions)
        idle: list[str] = []
        for axis in reversed(self.varying):
            fewer = _without(made, dimensions.index(axis))
            if fewer is not None and len(dimensions) > 1:
                dimensions.remove(axis)
                idle.insert(0, axis)
                made = fewer
        if idle:
            text += f" The same for every {' and '.join(idle)}."
        return Measure(title, text, unit, (*dimensions, *more), tuple(made), from_zero)


def score_of(entry: SweepEntry, name: str) -> tuple[float | None, float | None]:
    """A score and its standard error; None for what is not known, not a number or infinite."""
    score = entry.scores.get(name)
    value, error = score if isinstance(score, tuple) else (score, None)
    if value is None or not math.isfinite(value):
        return None, None
    return value, error if error is not None and math.isfinite(error) else None


def count_shares(counts: ModelCounts, elements: int) -> dict[str, float]:
    """The shares that the page shows, from 0 to 1: kept of all elements, lost and saved of the kept ones."""
    return {
        "kept_share": counts.kept / elements if elements else 0.0,
        "lost_share": counts.lost_share,
        "saved_share": counts.saved_share,
    }


def _without(points: Sequence[Point], dimension: int) -> list[Point] | None:
    """The points without a dimension that makes no difference to any of them; None if it does."""
    found: dict[tuple[str, ...], Point] = {}
    for point in points:
        rest = point._replace(at=(*point.at[:dimension], *point.at[dimension + 1 :]))
        if found.setdefault(tuple(map(text_of, rest.at)), rest) != rest:
            return None
    return list(found.values())


def _names(result: MergeResult) -> dict[int, str]:
    """The names of the models by recipe position; a model that stands twice in the recipe gets a number."""
    seen: Counter[str] = Counter()
    names = {}
    for position in sorted(result.models):
        name = str(result.models[position])
        seen[name] += 1
        names[position] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def _check(entries: Sequence[SweepEntry], axes: Sequence[str]) -> None:
    if not entries:
        raise ReportError("a sweep without recipes has nothing to show")
    lacking = [
        f'"{entry.label}": has no value of the axis "{name}"'
        for entry in entries
        for name in axes
        if name not in entry.values
    ]
    if lacking:
        raise ReportError(lacking)


def _check_distinct(entries: Sequence[SweepEntry], axes: Sequence[str]) -> None:
    places: dict[tuple[str, ...], SweepEntry] = {}
    for entry in entries:
        place = tuple(text_of(entry.values[name]) for name in axes)
        other = places.setdefault(place, entry)
        if other is not entry:
            raise ReportError(
                f'"{other.label}" and "{entry.label}": have the same values on all axes; name every axis of the grid'
            )
