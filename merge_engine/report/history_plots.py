"""The plots of a search: its front, parallel coordinates of the parameters, and importances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from merge_engine.report.drawing import COLOURS, FAINT, INK, STYLE, figure, short, svg
from merge_engine.report.history_data import Objective, SearchHistory, Trial
from merge_engine.report.values import in_order, numbers_of, score_text, text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LINES = 200
WORST, MIDDLE, BEST = COLOURS[0], "#8c8c8c", COLOURS[1]
"""The colours of scores. All three stand out from white and from the dark page."""
_WIDTH = 4.6  # inches; the page scales it
_ROW = 0.7
_MOST_NUMBERS = 12  # of trials, written beside their points


def best_so_far(history: SearchHistory) -> str:
    """One objective: every score in the order of the trials, and the best score up to each."""
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    trials = history.scored
    objective = history.objectives[0]
    better = max if objective.direction == "maximize" else min
    best: list[float] = []
    for trial in trials:
        best.append(better(best[-1], trial.scores[0]) if best else trial.scores[0])
    with rc_context(STYLE):
        drawn = figure(_WIDTH, 2.9)
        axes = drawn.subplots()
        numbers = [trial.number for trial in trials]
        _points(axes, numbers, [t.scores[0] for t in trials], None, _errors(trials, 0), WORST)
        axes.step(numbers, best, where="post", color=BEST, linewidth=1.6)
        for trial in trials:
            if trial.number == history.baseline:
                axes.axhline(trial.scores[0], color=INK, linestyle="--", linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(length=0)
        axes.set_xlabel("number of the trial")
        axes.set_ylabel(_scale_name(objective))
        return svg(drawn)


def front(history: SearchHistory, x: int, y: int) -> str:
    """Two of the objectives, by position: all trials, those on the front, and the recipe without changes."""
    from matplotlib import rc_context

    on_front = history.front
    baseline = [trial for trial in history.scored if trial.number == history.baseline]
    others = [trial for trial in history.scored if trial not in on_front and trial not in baseline]
    with rc_context(STYLE):
        drawn = figure(_WIDTH, 3.6)
        axes = drawn.subplots()
        axes.plot(*_at(others, x, y), "o", color=MIDDLE, markersize=3.5)
        for trials, colour, mark in ((on_front, BEST, "o"), (baseline, WORST, "D")):
            _points(axes, *_at(trials, x, y), _errors(trials, x), _errors(trials, y), colour, mark)
        if len(history.objectives) == 2:
            axes.plot(
                *_at(sorted(on_front, key=lambda trial: trial.scores[x]), x, y), color=BEST, linewidth=0.9
            )
        if len(on_front) <= _MOST_NUMBERS:
            for trial in on_front:
                at = (trial.scores[x], trial.scores[y])
                axes.annotate(str(trial.number), at, (4, 4), textcoords="offset points", fontsize=8)
        axes.margins(0.08)
        axes.tick_params(length=0)
        axes.set_xlabel(_scale_name(history.objectives[x]))
        axes.set_ylabel(_scale_name(history.objectives[y]))
        return svg(drawn)


def parallel(history: SearchHistory, objective: int) -> str:
    """A line for each trial through the values of its parameters, down to its score, which gives the colour.

    Where a trial lacks a parameter, its line is broken. At most ``MOST_LINES`` trials are drawn, those with the best
    scores.
    """
    from matplotlib import rc_context
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("scores", [WORST, MIDDLE, BEST])
    goal = history.objectives[objective]
    ranked = sorted(history.scored, key=lambda t: t.scores[objective], reverse=goal.direction == "maximize")[
        :MOST_LINES
    ]
    rows: list[tuple[str, Mapping[int, object]]] = [
        (name, {t.number: t.values[name] for t in ranked if name in t.values}) for name in history.parameters
    ]
    rows = [row for row in rows if row[1]]
    rows.append((_scale_name(goal), {trial.number: trial.scores[objective] for trial in ranked}))
    last = max(len(ranked) - 1, 1)
    with rc_context(STYLE):
        drawn = figure(_WIDTH, _ROW * len(rows) + 0.3)
        axes = drawn.subplots()
        places = [
            _row(axes, -row, name, values, name in history.logarithmic)
            for row, (name, values) in enumerate(rows)
        ]
        for rank, trial in reversed(list(enumerate(ranked))):
            axes.plot(
                [row.get(trial.number, float("nan")) for row in places],
                [-row for row in range(len(rows))],
                color=colours(1 - rank / last),
                linewidth=1.8 if rank == 0 else 0.9,
                marker="o",
                markersize=4 if rank == 0 else 2,
            )
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(0.62 - len(rows), 0.5)
        axes.set_axis_off()
        return svg(drawn)


def importances(shares: Mapping[str, float]) -> str:
    """A bar for each parameter: its share in the importance of all, the largest first."""
    from matplotlib import rc_context

    names = sorted(shares, key=lambda name: -shares[name])
    with rc_context(STYLE):
        drawn = figure(_WIDTH, 0.24 * len(names) + 0.6)
        axes = drawn.subplots()
        axes.barh(range(len(names)), [100 * shares[name] for name in names], height=0.66, color=WORST)
        axes.set_yticks(range(len(names)), [short(name, 24) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
        axes.set_xlabel("% of the importance of all")
        return svg(drawn)


def _row(
    axes: Axes, y: float, name: str, values: Mapping[int, object], logarithmic: bool
) -> dict[int, float]:
    """Draw the axis of one parameter; return each trial's place on it, from 0 to 1."""
    axes.plot([0, 1], [y, y], color=FAINT, linewidth=1.2, zorder=0)
    axes.text(0, y + 0.14, short(name, 48), fontweight="bold", va="bottom")
    numbers = numbers_of(list(values.values()))
    distinct = in_order(values.values())
    if numbers is None:
        texts = [text_of(value) for value in distinct]
        at = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
        longest = max(6, 64 // len(texts))
        for text, place in at.items():
            axes.text(place, y - 0.12, short(text, longest), fontsize=8, va="top", ha="center")
        return {number: at[text_of(value)] for number, value in values.items()}
    low, high = min(numbers), max(numbers)
    axes.text(0, y - 0.12, score_text(low, None), fontsize=8, va="top")
    if low == high:
        return dict.fromkeys(values, 0.0)
    axes.text(1, y - 0.12, score_text(high, None), fontsize=8, va="top", ha="right")
    if logarithmic and low > 0:  # the recipe without changes may lie outside of the space
        from math import log

        axes.text(0.5, y - 0.12, "logarithmic", fontsize=8, va="top", ha="center", fontstyle="italic")
        numbers, low, high = [log(n) for n in numbers], log(low), log(high)
    return {trial: (n - low) / (high - low) for trial, n in zip(values, numbers, strict=True)}


def _at(trials: Sequence[Trial], x: int, y: int) -> tuple[list[float], list[float]]:
    return [trial.scores[x] for trial in trials], [trial.scores[y] for trial in trials]


def _errors(trials: Sequence[Trial], objective: int) -> list[float] | None:
    """The standard errors in one objective, 0 where one is unknown; None if all are."""
    errors = [trial.errors[objective] if trial.errors else None for trial in trials]
    return [error or 0.0 for error in errors] if any(errors) else None


def _points(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    x_errors: Sequence[float] | None,
    y_errors: Sequence[float] | None,
    colour: str,
    mark: str = "o",
) -> None:
    axes.errorbar(
        x,
        y,
        xerr=x_errors,
        yerr=y_errors,
        fmt=mark,
        color=colour,
        markersize=4.5,
        elinewidth=0.8,
        capsize=1.5,
    )


def _scale_name(objective: Objective) -> str:
    larger = "larger" if objective.direction == "maximize" else "smaller"
    return f"{short(objective.name, 30)} ({larger} is better)"
