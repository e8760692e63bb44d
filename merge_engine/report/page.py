"""The report as one page of HTML that needs nothing else. Every name in it is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import combinations

from merge_engine.observe.result import ModelCounts
from merge_engine.report import plots
from merge_engine.report.record import Record
from merge_engine.report.vectors import TaskVectors

_MOST_PAIRS = 6  # lines in one plot


def render(record: Record, vectors: TaskVectors | None, missing: str) -> str:
    """The page. ``missing`` says why there are no ``vectors``."""
    models = list(record.labels)
    parts = [
        "<h1>What became of the task vectors</h1>",
        f'<p class="quiet"><code>{escape(str(record.folder))}</code> · method '
        f"<code>{escape(record.recipe.merge_method)}</code> · {record.elements:,} elements · "
        f"digest <code>{escape(record.digest[:12])}</code></p>",
        *_overview(record, models),
        *_by_place(record, models),
        *(_agreement(record, vectors, models) if vectors else []),
        *(_norms(record, vectors, models) if vectors else _no_vectors(missing)),
        "<h2>Recipe</h2>",
        f"<pre>{escape(record.recipe.to_yaml().rstrip())}</pre>",
        *(f'<p class="quiet">Note: {escape(note)}</p>' for note in record.notes),
    ]
    body = "\n".join(parts)
    style = files("merge_engine.report").joinpath("page.css").read_text(encoding="utf-8")
    title = escape(f"Merge report: {record.folder.name}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _overview(record: Record, models: Sequence[int]) -> list[str]:
    lines = []
    if record.elects:
        lines.append(
            "<p>The trim keeps the largest entries of every task vector. Where they disagree about the direction, "
            "an election decides, and what points the other way is left out of the merged model: lost. "
            "A slack saves some of it.</p>"
        )
    else:
        lines.append("<p>This method holds no election, so nothing that was kept is lost.</p>")
    for position, model in enumerate(models):
        counts = record.discards.total[model]
        lines.append(f'<p class="label">{_dot(position)}<b>{escape(record.labels[model])}</b></p>')
        lines.append(_bar(counts, position))
    head = ("model", "kept", "lost to the election", "saved by sign slack", "saved by trim slack")
    rows = [
        (
            _dot(position) + escape(record.labels[model]),
            _share(c.kept, record.elements),
            _share(c.lost, c.kept),
            _share(c.saved_by_sign, c.kept),
            _share(c.saved_by_trim, c.kept),
        )
        for position, model in enumerate(models)
        for c in (record.discards.total[model],)
    ]
    return [
        *lines,
        '<p class="quiet">Full colour: in the merged model. Light: in it only thanks to a sign slack. '
        "Hatched: lost to the election.</p>"
        if record.elects
        else "",
        _table(head, rows),
    ]


def _bar(counts: ModelCounts, position: int) -> str:
    saved = counts.saved_by_sign
    shares = [
        (counts.retained - saved, f"background:{plots.colour(position)}", ""),
        (saved, f"background:{plots.colour(position)};opacity:.45", ""),
        (counts.lost, "", "lost"),
    ]
    spans = (
        f'<span class="{kind}" style="width:{100 * n / counts.kept:.3f}%;{style}"></span>'
        for n, style, kind in shares
        if n > 0
    )
    return f'<div class="bar" aria-hidden="true">{"".join(spans) if counts.kept else ""}</div>'


def _by_place(record: Record, models: Sequence[int]) -> list[str]:
    if not record.elects:
        return []
    totals = record.discards.total.values()
    saved = any(c.saved_by_sign or c.saved_by_trim for c in totals)
    hidden = record.trims_whole_model and any(c.saved_by_trim for c in totals)
    dotted = " Dotted: saved by slack." if saved else ""
    if hidden:
        dotted += (
            " One trim spans the whole model here, so what trim slack saved is known in total only and not part "
            "of the dotted lines."
        )
    legend = _legend([record.labels[model] for model in models])
    return [
        *_figure("Lost by layer", plots.losses(record.discards, models), legend, f"Solid: lost.{dotted}"),
        *_figure(
            "Lost by kind of tensor",
            plots.kinds(record.discards, models),
            legend,
            "All layers together, the kinds with most kept entries first, without those that have less than "
            f"{plots.SMALLEST_KIND:.1%} of them.",
        ),
    ]


def _agreement(record: Record, vectors: TaskVectors, models: Sequence[int]) -> list[str]:
    if len(models) < 2:
        return []
    pairs = list(combinations(models, 2))
    if len(pairs) == 1:
        found = f"<p>Over the whole model: <b>{_number(vectors.total.cosine(*pairs[0]), '+.3f')}</b>.</p>"
    else:
        found = _cosine_table(record, vectors, models)
    drawn = plots.cosines(vectors, pairs) if len(pairs) <= _MOST_PAIRS else None
    names = [f"{record.labels[one]} and {record.labels[other]}" for one, other in pairs]
    return [
        "<h2>Agreement between the models</h2>",
        "<p>The cosine of the angle between two task vectors: 1 where they point the same way, 0 where they have "
        "nothing to do with each other, below 0 where they work against each other.</p>",
        found,
        *_figure("", drawn, "" if len(pairs) == 1 else _legend(names), "By layer."),
    ]


def _cosine_table(record: Record, vectors: TaskVectors, models: Sequence[int]) -> str:
    head = ("cosine", *(f"{_dot(position)}{position + 1}" for position in range(len(models))))
    rows = [
        (
            f"{_dot(position)}{position + 1} {escape(record.labels[one])}",
            *("" if one == other else _number(vectors.total.cosine(one, other), "+.3f") for other in models),
        )
        for position, one in enumerate(models)
    ]
    return _table(head, rows)


def _norms(record: Record, vectors: TaskVectors, models: Sequence[int]) -> list[str]:
    head = ("model", "norm of the task vector", "of the base's norm")
    rows = [
        (
            _dot(position) + escape(record.labels[model]),
            f"{vectors.total.norm(model):#.4g}",
            _number(vectors.total.relative_norm(model), ".2%"),
        )
        for position, model in enumerate(models)
    ]
    legend = _legend([record.labels[model] for model in models])
    return [
        "<h2>Size of the task vectors</h2>",
        "<p>Without a slack, the larger task vector wins more of the disagreements.</p>"
        if record.elects
        else "",
        _table(head, rows),
        *_figure("", plots.norms(vectors, models), legend, "By layer."),
    ]


def _no_vectors(missing: str) -> list[str]:
    return [
        "<h2>Agreement and size of the task vectors</h2>",
        f'<p class="note">Not shown, because that needs the inputs of the merge as they were: {escape(missing)}.</p>',
    ]


def _figure(title: str, svg: str | None, legend: str, caption: str) -> list[str]:
    if svg is None:
        return []
    heading = [f"<h2>{title}</h2>"] if title else []
    return [*heading, f"<figure>{legend}{svg}<figcaption>{caption}</figcaption></figure>"]


def _legend(names: Sequence[str]) -> str:
    spans = "".join(f"<span>{_dot(i)}{escape(name)}</span>" for i, name in enumerate(names))
    return f'<p class="legend quiet">{spans}</p>'


def _dot(position: int) -> str:
    return f'<span class="dot" style="background:{plots.colour(position)}"></span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if part and whole else f"{part:,}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
