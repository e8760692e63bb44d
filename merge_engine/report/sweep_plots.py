"""The plots of a sweep: small multiples over the axes of the grid, or bars where it has no axes.

The first dimension of a measure goes along x, the second has a line for each of its values, and the others have a
panel for each combination. All panels of a measure share their scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

from merge_engine.report.drawing import COLOURS, STYLE, colour, figure, short, svg
from merge_engine.report.sweep_data import MODEL, Measure, Point
from merge_engine.report.values import in_order, is_logarithmic, numbers_of, text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 24
MOST_BARS = 100
_PANEL = (3.7, 2.3)  # inches; the page scales them
_BARS = 4.6
_MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "*": "★", "P": "✚", "X": "✖"}
_DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}
_FAR = 25
"""More bars have their scale above them too."""
_CLOSEST_TICKS = 0.11  # of the axis


class Key(NamedTuple):
    """One line of a legend: the dash as CSS names it, and the mark as a letter."""

    label: str
    colour: str
    dash: str
    mark: str


class Panel(NamedTuple):
    """A plot with its title, and the text that stands for it where it cannot be seen."""

    title: str
    svg: str
    text: str


def legend(measure: Measure) -> list[Key]:
    """What the lines or the bars are; empty if there is one alone."""
    if len(measure.dimensions) < 2:
        return []
    name, values = measure.dimensions[1], _values(measure, 1)
    if len(values) < 2:
        return []
    return [
        Key(
            _named(name, value),
            colour(position),
            list(_DASHES.values())[_round(position)],
            list(_MARKS.values())[position % len(_MARKS)],
        )
        for position, value in enumerate(values)
    ]


def combinations(measure: Measure) -> list[tuple[object, ...]]:
    """The combinations of values of the third dimension and those after it that have points: one for each panel."""
    values = [_values(measure, place) for place in range(2, len(measure.dimensions))]
    there = {tuple(map(text_of, point.at[2:])) for point in measure.points}
    return [rest for rest in product(*values) if tuple(map(text_of, rest)) in there]


def panels(measure: Measure) -> list[Panel]:
    """The panels of a measure over axes, at most ``MOST_PANELS`` of them."""
    from matplotlib import rc_context

    x = _values(measure, 0)
    others = range(2, len(measure.dimensions))
    limits = _limits(measure)
    made = []
    for rest in combinations(measure)[:MOST_PANELS]:
        title = ", ".join(
            _named(measure.dimensions[place], value)
            for place, value in zip(others, rest, strict=True)
            if len(_values(measure, place)) > 1
        )
        points = [point for point in measure.points if _same(point.at[2:], rest)]
        with rc_context(STYLE):
            drawn = figure(*_PANEL)
            axes = drawn.subplots()
            to_place = _scale(axes, x)
            for position, line in enumerate(_by_second(measure, points)):
                placed = [(to_place[text_of(point.at[0])], point) for point in line]
                _draw(axes, position, sorted(placed, key=lambda pair: pair[0]))
            axes.set_ylim(limits)
            axes.set_xlabel(short(measure.dimensions[0]))
            axes.set_ylabel(short(measure.unit))
            axes.tick_params(length=0)
            made.append(Panel(title, svg(drawn), _panel_text(measure, title, points)))
    return made


def bars(measure: Measure, labels: Sequence[str]) -> Panel:
    """A bar for each recipe, and for each model if the measure has models; the first ``MOST_BARS`` recipes.

    A measure without a zero that means something gets dots.
    """
    from matplotlib import rc_context

    drawn_points = [point for point in measure.points if _number(point) < MOST_BARS]
    groups = _by_second(measure, drawn_points)
    shown = min(len(labels), MOST_BARS)
    thick = 0.8 / len(groups)
    with rc_context(STYLE):
        drawn = figure(_BARS, 0.19 * shown * max(1.0, 0.6 * len(groups)) + 0.6)
        axes = drawn.subplots()
        for position, points in enumerate(groups):
            places = [_number(point) - 0.4 + thick * (position + 0.5) for point in points]
            values = [point.value for point in points]
            if measure.from_zero:
                axes.barh(places, values, height=thick * 0.86, color=colour(position))
            else:
                axes.errorbar(
                    values, places, xerr=_errors(points), fmt="o", markersize=4, color=colour(position)
                )
        axes.set_yticks(range(shown), [short(label, 24) for label in labels[:shown]])
        axes.set_ylim(shown - 0.4, -0.6)
        axes.set_xlim(_limits(measure))
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0, labeltop=shown > _FAR)
        axes.set_xlabel(short(measure.unit))
        text = f"{'Bars' if measure.from_zero else 'Dots'}: {measure.title}, one for each recipe"
        if len(groups) > 1:
            text += " and model"
        return Panel("", svg(drawn), f"{text}. {_range(measure, measure.points)}")


def _values(measure: Measure, dimension: int) -> list[object]:
    return in_order(point.at[dimension] for point in measure.points)


def _by_second(measure: Measure, points: Sequence[Point]) -> list[list[Point]]:
    """The points of each value of the second dimension, in order; without a second, all of them."""
    if len(measure.dimensions) < 2:
        return [list(points)]
    return [[p for p in points if _same(p.at[1:2], (value,))] for value in _values(measure, 1)]


def _number(point: Point) -> int:
    """The number of the recipe, in a measure without axes."""
    number = point.at[0]
    assert isinstance(number, int)
    return number


def _errors(points: Sequence[Point]) -> list[float] | None:
    """The standard errors, 0 where one is unknown; None if all are."""
    errors = [point.error or 0.0 for point in points]
    return errors if any(errors) else None


def _same(one: Sequence[object], other: Sequence[object]) -> bool:
    return [text_of(value) for value in one] == [text_of(value) for value in other]


def _named(dimension: str, value: object) -> str:
    return text_of(value) if dimension == MODEL else f"{dimension} = {text_of(value)}"


def _round(position: int) -> int:
    """How often the colours have been used up before this line: each time the lines get another dash."""
    return position // len(COLOURS) % len(_DASHES)


def _draw(axes: Axes, position: int, placed: Sequence[tuple[float, Point]]) -> None:
    axes.errorbar(
        [place for place, _ in placed],
        [point.value for _, point in placed],
        yerr=_errors([point for _, point in placed]),
        color=colour(position),
        linestyle=list(_DASHES)[_round(position)],
        marker=list(_MARKS)[position % len(_MARKS)],
        markersize=4,
        linewidth=1.5,
        elinewidth=1,
        clip_on=False,  # a mark on the edge is seen whole
        capsize=2,
    )


def _scale(axes: Axes, values: Sequence[object]) -> Mapping[str, float]:
    """The place on x of each value: numbers on a scale, others side by side."""
    from matplotlib.ticker import FixedLocator, NullLocator

    texts = [text_of(value) for value in values]
    numbers = numbers_of(values)
    if numbers is None:
        turned = sum(map(len, texts)) > 40
        axes.set_xticks(range(len(texts)), [short(text, 16) for text in texts], rotation=30 if turned else 0)
        if turned:
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
        axes.set_xlim(-0.4, len(texts) - 0.6)
        return {text: float(place) for place, text in enumerate(texts)}
    is_log = is_logarithmic(numbers)
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    at = [math.log(number) for number in numbers] if is_log else numbers
    gaps = [(right - left) / (at[-1] - at[0]) for left, right in pairwise(at)]
    if is_log or min(gaps, default=1.0) >= _CLOSEST_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(numbers))
        axes.set_xticks(numbers, texts)
    return dict(zip(texts, numbers, strict=True))


def _limits(measure: Measure) -> tuple[float, float]:
    """A scale that holds all points with their errors, with some room, from zero if that means something."""
    low = min(point.value - (point.error or 0.0) for point in measure.points)
    high = max(point.value + (point.error or 0.0) for point in measure.points)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    if measure.from_zero:
        return 0.0, high * 1.06 or 1.0
    return low - room, high + room


def _panel_text(measure: Measure, title: str, points: Sequence[Point]) -> str:
    text = f"Lines over {measure.dimensions[0]}: {measure.title}"
    if len(measure.dimensions) > 1 and len(_values(measure, 1)) > 1:
        text += f", one for each {measure.dimensions[1]}"
    return f"{text}{f'; {title}' if title else ''}. {_range(measure, points)}"


def _range(measure: Measure, points: Sequence[Point]) -> str:
    values = [point.value for point in points]
    return f"From {min(values):.4g} to {max(values):.4g} ({measure.unit}). The table has all numbers."
