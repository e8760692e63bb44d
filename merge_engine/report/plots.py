"""The plots of the report of one merge, as SVG text. Each model has a colour; the page shows which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from merge_engine.observe.discards import Discards
from merge_engine.report.drawing import FAINT, INK, STYLE, colour, figure, short, svg
from merge_engine.report.vectors import TaskVectors

_WIDTH = 7.4  # inches; the page scales it
SMALLEST_KIND = 0.001
"""The least share of all kept entries for a kind of tensor to be drawn."""
_MOST_KINDS = 24
_MOST_STACKS = 4


class Line(NamedTuple):
    """A line over the layers: values by stack and layer."""

    colour: str
    style: str
    values: Mapping[tuple[str, int], float]


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
    with rc_context(STYLE):
        drawn = figure(_WIDTH, 0.24 * len(shown) * max(1.0, 0.4 * len(models)) + 0.7)
        axes = drawn.subplots()
        for position, model in enumerate(models):
            found = [discards.by_kind[kind].get(model) for kind in shown]
            shares = [0.0 if counts is None else 100 * counts.lost_share for counts in found]
            places = [row - 0.38 + bar * (position + 0.5) for row in range(len(shown))]
            axes.barh(places, shares, height=bar * 0.86, color=colour(position))
        axes.set_yticks(range(len(shown)), [short(kind) for kind in shown])
        axes.invert_yaxis()
        axes.margins(y=0.02)
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("% of kept entries")
        return svg(drawn)


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
    with rc_context(STYLE):
        drawn = figure(_WIDTH, 2.5)
        panels = drawn.subplots(1, len(stacks), sharey=True, squeeze=False)[0]
        for axes, stack in zip(panels, stacks, strict=True):
            dots = "o" if len(layers[stack]) <= 40 else ""
            for line in lines:
                x = sorted(layer for name, layer in line.values if name == stack)
                y = [line.values[stack, layer] for layer in x]
                axes.plot(x, y, line.style, color=line.colour, marker=dots, markersize=3.5, linewidth=1.6)
            axes.set_xlabel("layer" if len(stacks) == 1 else f"layer of {short(stack) or 'the model'}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(length=0)
            axes.axhline(0, color=FAINT, linewidth=0.6, zorder=0)
        if all(value >= 0 for line in lines for value in line.values.values()):
            panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel(label)
        return svg(drawn)
