"""Time against the number of models and against the bytes moved, with the floor drawn in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from merge_engine.bench.contestants import CONTESTANTS
from merge_engine.bench.fit import median_seconds
from merge_engine.bench.suite import Result
from merge_engine.errors import PlanError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise PlanError(["plots need matplotlib: pip install 'merge_engine[bench]'"]) from None

_PANEL = (6.4, 4.8)  # inches
_COLUMNS = 3


def plot(results: Sequence[Result], file: Path) -> None:
    """Draw a panel for each series of cases that differ in one thing only. The suffix decides the format.

    Points are medians, bars run from the least to the most.

    Raises ``PlanError`` when there is no such series, and ``OSError``.
    """
    panels = [
        *_panels(results, lambda result: result.case.models, "size", "number of models"),
        *_panels(results, _gigabytes, "models", "input and output, GB"),
    ]
    if not panels:
        raise PlanError([f"{file}: nothing to plot; measure several sizes or several numbers of models"])
    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure((_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    for number, draw in enumerate(panels, start=1):
        draw(figure.add_subplot(rows, columns, number))
    figure.savefig(file, dpi=150)


def _gigabytes(result: Result) -> float:
    return (result.merge.bytes_read + result.merge.bytes_written) / 1e9


def _panels(
    results: Sequence[Result], position: Callable[[Result], float], fixed: str, label: str
) -> list[Callable[[Axes], None]]:
    """How to draw each group of results that share all but their ``position``, where that differs."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        case = result.case
        same = case.family.size if fixed == "size" else case.models
        groups.setdefault((case.method, same, case.cache, case.family.shard_size), []).append(result)
    series = [sorted(group, key=position) for group in groups.values() if len({*map(position, group)}) > 1]
    return [partial(_draw, group=group, position=position, label=label) for group in series]


def _draw(axes: Axes, *, group: Sequence[Result], position: Callable[[Result], float], label: str) -> None:
    for name in CONTESTANTS:
        places = [position(result) for result in group if name in result.runs]
        runs = [result.runs[name] for result in group if name in result.runs]
        if runs:
            medians = [median_seconds(measured) for measured in runs]
            spread = [(min(s), max(s)) for s in ([run.seconds for run in measured] for measured in runs)]
            below = [median - least for median, (least, _) in zip(medians, spread, strict=True)]
            above = [most - median for median, (_, most) in zip(medians, spread, strict=True)]
            axes.errorbar(places, medians, [below, above], marker="o", capsize=3, label=name)
    floors = [(position(result), result.floor) for result in group if result.floor]
    if floors:
        axes.plot(*zip(*floors, strict=True), "k--", label="floor")
    case = group[0].case
    same = f"{case.models} model(s)" if position is _gigabytes else case.family.size
    axes.set(title=f"{case.method}, {same}, {case.cache}", xlabel=label, ylabel="seconds", yscale="log")
    if position is not _gigabytes:
        axes.set_xticks(sorted({position(result) for result in group}))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
