"""The plots of a report, as SVG text. Each model has a colour; the page shows which."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from merge_engine.observe.discards import Discards
from merge_engine.report.vectors import TaskVectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b")
INK = "#3c4350"
_FAINT = "#d9dde3"
_WIDTH = 7.4  # inches; the page scales it
SMALLEST_KIND = 0.001
"""The least share of all kept entries for a kind of tensor to be drawn."""
_MOST_KINDS = 24
_MOST_STACKS = 4
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "merge_engine",  # the same merge gives the same bytes
    "text.parse_math": False,  # names of tensors are not formulas
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
}


class Line(NamedTuple):
    """A line over the layers: values by stack and layer."""

    colour: str
    style: str
    values: Mapping[tuple[str, int], float]


def colour(position: int) -> str:
    """The colour of the model at ``position`` in a report, from 0; after eight the colours repeat."""
    return COLOURS[position % len(COLOURS)]


def losses(discards: Discards, models: Sequence[int]) -> str | None:
    """Share of kept entries by layer: lost to the election (solid), saved by slack if there is any (dotted)."""
    lines = []
    for position, model in enumerate(models):
        counts = {place: found[model] for place, found in discards.by_layer.items() if model in found}
        lines.append(Line(colour(position), "-", {p: 100 * c.lost_share for p, c in counts.items()}))
        if any(c.saved_share for c in counts.values()):
            lines.append(Line(colour(position), ":", {p: 100 * c.saved_share for p, c in counts.items()}))
    return _over_layers(lines, "% of kept entries")


def norms(vectors: TaskVectors, models: Sequence[int]) -> str | None:
    """Norm of each task vector by layer, in percent of the norm of the base's weights."""
    lines = []
    for position, model in enumerate(models):
        shares = {place: products.relative_norm(model) for place, products in vectors.by_layer.items()}
        lines.append(Line(colour(position), "-", {p: 100 * s for p, s in shares.items() if s is not None}))
    return _over_layers(lines, "% of the base's norm")


def cosines(vectors: TaskVectors, pairs: Sequence[tuple[int, int]]) -> str | None:
    """Cosine between two task vectors by layer, a line for each pair."""
    lines = []
    for position, pair in enumerate(pairs):
        found = {place: products.cosine(*pair) for place, products in vectors.by_layer.items()}
        values = {place: cosine for place, cosine in found.items() if cosine is not None}
        lines.append(Line(INK if len(pairs) == 1 else colour(position), "-", values))
    return _over_layers(lines, "cosine")


def kinds(discards: Discards, models: Sequence[int]) -> str | None:
    """Share of kept entries lost to the election by kind of tensor, the kinds with most kept entries first.

    Kinds with a small share of all kept entries are left out (see ``SMALLEST_KIND``).
    """
    from matplotlib import rc_context

    sizes = {kind: sum(c.kept for c in found.values()) for kind, found in discards.by_kind.items()}
    enough = SMALLEST_KIND * sum(sizes.values())
    shown = [kind for kind in sorted(sizes, key=lambda kind: -sizes[kind]) if sizes[kind] > enough]
    shown = shown[:_MOST_KINDS]
    if not shown:
        return None
    bar = 0.76 / len(models)
    with rc_context(_STYLE):
        figure = _figure(0.24 * len(shown) * max(1.0, 0.4 * len(models)) + 0.7)
        axes = figure.subplots()
        for position, model in enumerate(models):
            found = [discards.by_kind[kind].get(model) for kind in shown]
            shares = [0.0 if counts is None else 100 * counts.lost_share for counts in found]
            places = [row - 0.38 + bar * (position + 0.5) for row in range(len(shown))]
            axes.barh(places, shares, height=bar * 0.86, color=colour(position))
        axes.set_yticks(range(len(shown)), [_short(kind) for kind in shown])
        axes.invert_yaxis()
        axes.margins(y=0.02)
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("% of kept entries")
        return _svg(figure)


def _over_layers(lines: Sequence[Line], label: str) -> str | None:
    """A panel for each stack of two or more layers, the largest first. The axis always includes zero."""
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    layers: dict[str, set[int]] = {}
    for line in lines:
        for stack, layer in line.values:
            layers.setdefault(stack, set()).add(layer)
    stacks = sorted((s for s in layers if len(layers[s]) > 1), key=lambda s: -len(layers[s]))[:_MOST_STACKS]
    if not stacks:
        return None
    with rc_context(_STYLE):
        figure = _figure(2.5)
        panels = figure.subplots(1, len(stacks), sharey=True, squeeze=False)[0]
        for axes, stack in zip(panels, stacks, strict=True):
            dots = "o" if len(layers[stack]) <= 40 else ""
            for line in lines:
                x = sorted(layer for name, layer in line.values if name == stack)
                y = [line.values[stack, layer] for layer in x]
                axes.plot(x, y, line.style, color=line.colour, marker=dots, markersize=3.5, linewidth=1.6)
            axes.set_xlabel("layer" if len(stacks) == 1 else f"layer of {_short(stack) or 'the model'}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(length=0)
            axes.axhline(0, color=_FAINT, linewidth=0.6, zorder=0)
        if all(value >= 0 for line in lines for value in line.values.values()):
            panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel(label)
        return _svg(figure)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((_WIDTH, height), layout="constrained")


def _svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element without a prologue; its text is escaped by matplotlib."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _short(name: str) -> str:
    """The name on one line, cut to 36 characters to leave room for the plot."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    return plain if len(plain) <= 36 else f"{plain[:17]}…{plain[-18:]}"
