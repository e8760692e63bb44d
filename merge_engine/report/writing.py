"""Write the report on a merge: one page and the same numbers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merge_engine.arguments import path_of
from merge_engine.checkpoint import REPORT_NAMES
from merge_engine.errors import MergeError
from merge_engine.observe.result import ModelCounts
from merge_engine.planning import Schedule
from merge_engine.report.page import render
from merge_engine.report.record import Record
from merge_engine.report.templates import require_extra, write
from merge_engine.report.vectors import Products, TaskVectors, measure


def write_report(
    output: str | Path,
    *,
    on_schedule: Callable[[Schedule], None] = lambda schedule: None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> tuple[Path, Path]:
    """Write ``merge_report.html`` and ``merge_report.json`` into the output folder of a merge.

    They show, for each model, the shares of kept entries that the election discarded and that slack saved: in
    total, by layer and by kind of tensor. They also show the norms of the task vectors and the cosines between
    them. Counts come from the merge's manifest. For norms and cosines the inputs are read once more; if they are
    gone or have been rewritten, both files say so. ``on_schedule`` and ``progress`` are as in ``run``.

    Returns the paths of both files. Raises ``ManifestError`` if the folder holds no merge, ``ReportError`` if the
    merge has no task vectors, or matplotlib is not installed, and ``OutputError`` if the files cannot be
    written.
    """
    require_extra()
    record = Record(path_of("output", output))
    vectors, missing = None, ""
    try:
        vectors = measure(record, on_schedule, progress)
    except MergeError as error:
        missing = error.problems[0].rstrip(".")
    page, numbers = (record.folder / name for name in REPORT_NAMES)
    write(page, render(record, vectors, missing))
    write(numbers, json.dumps(_numbers(record, vectors, missing), indent=1) + "\n")
    return page, numbers


def _numbers(record: Record, vectors: TaskVectors | None, missing: str) -> dict[str, Any]:
    """The numbers of the page, unrounded; shares are from 0 to 1."""
    layers = record.discards.by_layer
    return {
        "digest": record.digest,
        "method": record.recipe.merge_method,
        "models": {str(model): label for model, label in record.labels.items()},
        "total": _counts(record.discards.total),
        "layers": [
            {"stack": stack, "layer": layer, "counts": _counts(layers[stack, layer])}
            for stack, layer in sorted(layers)
        ],
        "kinds": {kind: _counts(counts) for kind, counts in record.discards.by_kind.items()},
        "task_vectors": {"missing": missing}
        if vectors is None
        else {
            "total": _products(record, vectors.total),
            "layers": [
                {"stack": stack, "layer": layer, **_products(record, vectors.by_layer[stack, layer])}
                for stack, layer in sorted(vectors.by_layer)
            ],
        },
    }


def _counts(counts: dict[int, ModelCounts]) -> dict[str, dict[str, float]]:
    return {
        str(model): {**c.as_dict(), "lost_share": c.lost_share, "saved_share": c.saved_share}
        for model, c in counts.items()
    }


def _products(record: Record, products: Products) -> dict[str, Any]:
    models = list(record.labels)
    return {
        "base_norm": _finite(math.sqrt(products.base)),
        "norms": {str(model): _finite(products.norm(model)) for model in models},
        "cosines": [
            {"models": [one, other], "cosine": _finite(products.cosine(one, other))}
            for i, one in enumerate(models)
            for other in models[i + 1 :]
        ],
    }


def _finite(value: float | None) -> float | None:
    """The value, or None (null) for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
