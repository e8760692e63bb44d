"""The figure of the search in docs/low_resource.md, made of ``search.json``.

python -m examples.low_resource.search_plot
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.low_resource.comparing import RIVALS
from examples.low_resource.errors import told
from examples.low_resource.halves import BITS, ENGLISH
from examples.low_resource.plot import FIGURE as STUDY
from examples.low_resource.plot import METHODS, STYLE
from examples.low_resource.search_tables import NAMES, Results, load_search

FIGURE = STUDY.with_name("low_resource_search.svg")
COLOURS = {
    "task_arithmetic": METHODS["task arithmetic"][1],
    "ties": METHODS["ties"][1],
    "ties_elect": METHODS["ties elect 4"][1],
    "ties_retain": METHODS["ties retain 0.6"][1],
    "ties_trim": METHODS["ties trim 0.5"][1],
}


def draw() -> Path:
    """The judged fronts of all seeds, and how much their hypervolumes differ from that of task arithmetic."""
    results = load_search()
    with matplotlib.rc_context(STYLE):
        figure = Figure((11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_fronts(left, results)
        _draw_areas(right, results)
        figure.legend(loc="outside lower center", ncols=5, frameon=False)
        FIGURE.parent.mkdir(exist_ok=True)
        figure.savefig(FIGURE, metadata={"Date": None})
    return FIGURE


def _draw_fronts(axes: Axes, results: Results) -> None:
    """A line for each search through the recipes of its front, in the order in which it chose them."""
    for method, seeds in results["fronts"].items():
        for number, front in enumerate(seeds):
            judged = [each["judging"] for each in front]
            axes.plot(
                [each[BITS][0] for each in judged],
                [each[ENGLISH][0] for each in judged],
                color=COLOURS[method],
                linewidth=1,
                marker="o",
                markersize=3,
                alpha=0.75,
                label=None if number else NAMES[method],
            )
    for name, found in results["baselines"].items():
        (x, _), (y, error) = found[BITS], found[ENGLISH]
        if name in COLOURS:
            axes.plot(x, y, "x", color=COLOURS[name], markersize=7, markeredgewidth=1.8)
        else:
            axes.errorbar(x, y, error, color="#20252d", marker="D", markersize=4, elinewidth=0.7)
            axes.annotate(name, (x, y), (6, -12), textcoords="offset points")
    axes.axhline(0.25, color="#9aa2ad", linewidth=0.8, linestyle=(0, (1, 3)))
    axes.set_title("Fronts on the half that judges")
    axes.set_xlabel("Tamil: bits per byte (less is better)")
    axes.set_ylabel("English: accuracy")
    axes.grid(True)


def _draw_areas(axes: Axes, results: Results) -> None:
    """One row a method: the mean difference with its standard error, and the seeds as dots."""
    base = results["hypervolume"][RIVALS[0]]["of seeds"]
    others = [method for method in results["hypervolume"] if method != RIVALS[0]]
    for place, method in enumerate(others):
        found = results["hypervolume"][method]
        seeds = [value - other for value, other in zip(found["of seeds"], base, strict=True)]
        axes.plot(seeds, [place] * len(seeds), ".", color=COLOURS[method], alpha=0.5)
        value, error = found[f"minus {RIVALS[0]}"]
        axes.errorbar(
            value, place, xerr=error, color=COLOURS[method], marker="D", markersize=5, elinewidth=1.4
        )
    axes.axvline(0, color="#20252d", linewidth=1)
    axes.set_yticks(range(len(others)), [NAMES[method] for method in others])
    axes.invert_yaxis()
    axes.set_title(f"Hypervolume minus that of {NAMES[RIVALS[0]]}")
    axes.grid(True, axis="x")


if __name__ == "__main__":
    told(lambda: print(f"figure in {draw()}"))
