"""The report as one page of HTML without other files: the values for ``page.html.jinja``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from merge_engine.observe.result import ModelCounts
from merge_engine.report import plots
from merge_engine.report.drawing import colour
from merge_engine.report.record import Record
from merge_engine.report.templates import fill, plot
from merge_engine.report.vectors import TaskVectors

_MOST_PAIRS = 6  # lines in one plot


def render(record: Record, vectors: TaskVectors | None, missing: str) -> str:
    """The page as HTML. ``missing`` is the reason why there are no ``vectors``, else ""."""
    models = list(record.labels)
    totals = record.discards.total.values()
    return fill(
        "page.html.jinja",
        title=record.folder.name,
        folder=str(record.folder),
        method=record.recipe.merge_method,
        elements=f"{record.elements:,}",
        digest=record.digest[:12],
        recipe=record.recipe.to_yaml().rstrip(),
        notes=record.notes,
        elects=record.elects,
        models=[_model(record, vectors, models, position) for position in range(len(models))],
        losses=plot(plots.losses(record.discards, models) if record.elects else None),
        kinds=plot(plots.kinds(record.discards, models) if record.elects else None),
        smallest_kind=f"{plots.SMALLEST_KIND:.1%}",
        slack_saved=any(c.saved_by_sign or c.saved_by_trim for c in totals),
        trim_slack_is_in_total_only=record.trims_whole_model and any(c.saved_by_trim for c in totals),
        missing=missing,
        vectors=vectors is not None,
        **({} if vectors is None else _agreement(record, vectors, models)),
    )


def _model(
    record: Record, vectors: TaskVectors | None, models: Sequence[int], position: int
) -> dict[str, Any]:
    """The values of one model."""
    model = models[position]
    counts = record.discards.total[model]
    shown = {
        "label": record.labels[model],
        "colour": colour(position),
        "bar": _bar(counts),
        "kept": _share(counts.kept, record.elements),
        "lost": _share(counts.lost, counts.kept),
        "saved_by_sign": _share(counts.saved_by_sign, counts.kept),
        "saved_by_trim": _share(counts.saved_by_trim, counts.kept),
    }
    if vectors is not None:
        total = vectors.total
        shown["norm"] = f"{total.norm(model):#.4g}"
        shown["relative_norm"] = _number(total.relative_norm(model), ".2%")
        shown["cosines"] = [
            "" if other == model else _number(total.cosine(model, other), "+.3f") for other in models
        ]
    return shown


def _bar(counts: ModelCounts) -> list[dict[str, str]]:
    """The parts of a model's kept entries from left to right, without empty ones."""
    parts = {
        "retained": counts.retained - counts.saved_by_sign,
        "saved": counts.saved_by_sign,
        "lost": counts.lost,
    }
    return [
        {"name": name, "width": f"{100 * count / counts.kept:.3f}%"}
        for name, count in parts.items()
        if count > 0
    ]


def _agreement(record: Record, vectors: TaskVectors, models: Sequence[int]) -> dict[str, Any]:
    """The cosine of each pair of task vectors, and the plots by layer."""
    pairs = list(combinations(models, 2))
    return {
        "pairs": [
            {
                "label": f"{record.labels[one]} and {record.labels[other]}",
                "colour": colour(position),
                "cosine": _number(vectors.total.cosine(one, other), "+.3f"),
            }
            for position, (one, other) in enumerate(pairs)
        ],
        "cosines": plot(plots.cosines(vectors, pairs) if 0 < len(pairs) <= _MOST_PAIRS else None),
        "norms": plot(plots.norms(vectors, models)),
    }


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if part and whole else f"{part:,}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
