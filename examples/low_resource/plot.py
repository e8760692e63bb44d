"""The figure of docs/low_resource.md, made of ``results.json``.

python -m examples.low_resource.plot
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from examples.low_resource.errors import told
from examples.low_resource.measure import CT_THEN_SFT
from examples.low_resource.settings import CT_SNAPSHOTS, HERE, ct_tokens
from examples.low_resource.summary import BPB, ENGLISH, LOST, TAMIL, spread
from examples.low_resource.tables import rows_by_seed

FIGURE = HERE.parents[1] / "docs" / "figures" / "low_resource.svg"
METHODS = {
    "CT": ("CT alone", "#9aa2ad", "-"),
    "average": ("average", "#56b4e9", "-"),
    "task arithmetic": ("task arithmetic", "#009e73", "-"),
    "upweighted sum": ("sum, SFT at twice CT's weight", "#009e73", ":"),
    "ties": ("TIES", "#d55e00", "-"),
    "ties retain 0.6": ("TIES, slack: retain 0.6", "#cc79a7", "--"),
    "ties trim 0.5": ("TIES, slack: trim 0.5", "#e69f00", "--"),
    "ties elect 4": ("TIES, slack: elect 4", "#0072b2", "-"),
}
PANELS = {
    LOST: "SFT's kept entries lost",
    TAMIL[0]: "Tamil, edge: accuracy",
    TAMIL[1]: "Tamil, cloze: accuracy",
    BPB: "Tamil: bits per byte (less is better)",
    ENGLISH[0]: "English, edge: accuracy",
    ENGLISH[1]: "English, cloze: accuracy",
}
STYLE = {
    "svg.hashsalt": "low_resource",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#e3e6ea",
}


def draw() -> Path:
    """Mean over the seeds, with bars of one standard deviation."""
    seeds = rows_by_seed()
    tokens = [ct_tokens(steps) / 1e6 for steps in CT_SNAPSHOTS]
    with matplotlib.rc_context(STYLE):
        figure = Figure((11, 6.6), layout="constrained")
        for axes, (measure, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
            for place, (method, (label, colour, style)) in enumerate(METHODS.items()):
                if measure == LOST and not method.startswith("ties"):
                    continue
                points = [spread(seeds, method, steps, measure) for steps in CT_SNAPSHOTS]
                aside = 0.004 * (place - len(METHODS) / 2)  # so that bars do not hide each other
                axes.errorbar(
                    [x + aside for x in tokens],
                    [point.mean for point in points],
                    [point.sd for point in points],
                    color=colour,
                    linestyle=style,
                    elinewidth=0.7,
                    marker="o",
                    markersize=3,
                    linewidth=1.6,
                    label=label if measure == TAMIL[0] else None,
                )
            if measure != LOST:
                first = measure == TAMIL[0]
                alone = spread(seeds, "SFT", None, measure).mean
                axes.axhline(alone, color="#20252d", linewidth=1, label="SFT alone" if first else None)
                both = spread(seeds, CT_THEN_SFT, CT_SNAPSHOTS[-1], measure)
                axes.errorbar(
                    tokens[-1] + 0.03, both.mean, both.sd, color="#20252d", marker="D", markersize=5,
                    elinewidth=0.7, linestyle="none", label="CT, then SFT on it" if first else None,
                )  # fmt: skip
                if measure != BPB:
                    axes.axhline(0.25, color="#9aa2ad", linewidth=0.8, linestyle=(0, (1, 3)),
                                 label="chance" if first else None)  # fmt: skip
            axes.set_title(title)
            axes.set_xlabel("million tokens of CT")
            axes.grid(True)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        FIGURE.parent.mkdir(exist_ok=True)
        figure.savefig(FIGURE, metadata={"Date": None})
    return FIGURE


if __name__ == "__main__":
    told(lambda: print(f"figure in {draw()}"))
