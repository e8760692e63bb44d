"""What all plots have in common: colours, style, and the way from a figure to SVG text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98500", "#3d97d3", "#8f68ab", "#a0695d")
"""They can be told apart by colour-blind people, and stand out from white and from the dark page."""

INK = "#3c4350"
"""Of text and lines in a plot. The page's style replaces this and ``FAINT`` where it is dark."""

FAINT = "#d9dde3"
"""Of grid and axes."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched
    "svg.hashsalt": "merge_engine",  # the same merge gives the same bytes
    "text.parse_math": False,  # names of tensors are not formulas
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
}


def colour(position: int) -> str:
    """The colour of the model or line at ``position``, from 0; after eight the colours repeat."""
    return COLOURS[position % len(COLOURS)]


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; the page scales it."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def svg(drawn: Figure) -> str:
    """The figure as an ``<svg>`` element without a prologue; its text is escaped by matplotlib."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawn.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def short(name: str, longest: int = 36) -> str:
    """The name on one line, cut to ``longest`` characters to leave room for the plot."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    if len(plain) <= longest:
        return plain
    return f"{plain[: longest // 2 - 1]}…{plain[longest // 2 - longest :]}"
