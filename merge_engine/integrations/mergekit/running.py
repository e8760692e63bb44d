"""mergekit's function for checkpoints, carried out by the engine. mergekit need not be installed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from merge_engine.errors import OptionError
from merge_engine.integrations.mergekit.options import check_names, with_options
from merge_engine.methods import find_method
from merge_engine.observe.result import MergeResult
from merge_engine.recipe import Recipe, load_recipes
from merge_engine.running import run

_LOG = logging.getLogger(__name__)


def run_merge(
    config: object, out_path: str | Path, options: object = None, config_source: str | None = None
) -> MergeResult:
    """Merge checkpoints into the folder ``out_path``, with the arguments of mergekit's function of this name.

    ``config`` is a recipe in any form that ``merge_engine.run`` takes, or mergekit's ``MergeConfiguration``.
    ``options`` are mergekit's ``MergeOptions``, a mapping of the same names, or None. ``device``, ``cuda``,
    ``num_threads``, ``out_shard_size``, ``random_seed``, ``allow_crimes`` and ``unsafe_truncate_embeddings`` are done,
    and ours ``lenient``; docs/mergekit.md says why the others need not be. An output that is there is replaced, as
    mergekit does. ``config_source`` has no effect: the model card holds the recipe that was merged. Warnings and notes
    are logged. Raises ``MergeError``, which is a ``ValueError``.
    """
    given = _plain(options)
    check_names(given)
    if not given.get("safe_serialization", True):
        raise OptionError("safe_serialization: only safetensors are written; leave it out")
    device = given.get("device") or ("cuda" if given.get("cuda") else "auto")
    lenient = bool(given.get("lenient"))
    raw: Any = _plain(config) if hasattr(config, "model_dump") and not isinstance(config, Recipe) else config
    recipes = load_recipes(raw, lenient=lenient, check_method=find_method)
    result = run(
        tuple(
            with_options(
                recipe,
                random_seed=given.get("random_seed"),
                allow_crimes=given.get("allow_crimes"),
                unsafe_truncate_embeddings=given.get("unsafe_truncate_embeddings"),
            )
            for recipe in recipes
        ),
        out_path,
        device="auto" if device == "cpu" and not given.get("cuda") else device,
        threads=given.get("num_threads"),
        shard_size=given.get("out_shard_size") or "5GB",
        overwrite=True,
        lenient=lenient,
    )
    for note in result.notes:
        _LOG.info(note)
    for warning in result.warnings:
        _LOG.warning(warning)
    return result


def _plain(given: Any) -> dict[str, Any]:
    """The fields of one of mergekit's pydantic models that were set, as plain data."""
    if given is None:
        return {}
    if hasattr(given, "model_dump"):
        return dict(given.model_dump(exclude_defaults=True, mode="json"))
    return dict(given)
