"""mergekit's function for checkpoints, carried out by the engine. mergekit need not be installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_engine.engine.run import run
from merge_engine.observe.result import MergeResult
from merge_engine.recipe import Recipe, load_recipe


def run_merge(
    config: object, out_path: str | Path, options: object = None, config_source: str | None = None
) -> MergeResult:
    """Merge checkpoints into the folder ``out_path``, with the arguments of mergekit's function of this name.

    ``config`` is a recipe in any form that ``merge_engine.run`` takes, or mergekit's ``MergeConfiguration``.
    ``options`` are mergekit's ``MergeOptions``, a mapping of the same names, or None. ``device``, ``cuda``,
    ``num_threads``, ``out_shard_size``, ``random_seed``, ``allow_crimes`` and ``unsafe_truncate_embeddings`` are done;
    docs/mergekit.md says why the others need not be. An output that is there is replaced, as mergekit does.
    ``config_source`` has no effect: the model card holds the recipe that was merged. Raises ``MergeError``, which is a
    ``ValueError``.
    """
    given = _plain(options)
    device = given.get("device") or ("cuda" if given.get("cuda") else "auto")
    return run(
        _recipe(config, given),
        out_path,
        device="auto" if device == "cpu" and not given.get("cuda") else device,
        threads=given.get("num_threads"),
        shard_size=given.get("out_shard_size") or "5GB",
        overwrite=True,
    )


def _recipe(config: Any, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a configuration, with what the options say about the result."""
    raw = _plain(config) if hasattr(config, "model_dump") and not isinstance(config, Recipe) else config
    recipe = load_recipe(raw)
    added: dict[str, Any] = {}
    if options.get("random_seed") is not None:
        added["seed"] = options["random_seed"]
    if options.get("allow_crimes"):
        added["allow"] = sorted({*recipe.allow, "architecture"})
    if options.get("unsafe_truncate_embeddings"):
        added["unsafe_truncate_embeddings"] = True
        added["allow"] = sorted({*added.get("allow", recipe.allow), "tokenizer"})
    return load_recipe({**recipe.to_plain(), **added}) if added else recipe


def _plain(given: Any) -> dict[str, Any]:
    """The fields of one of mergekit's pydantic models that were set, as plain data."""
    if given is None:
        return {}
    if hasattr(given, "model_dump"):
        return dict(given.model_dump(exclude_defaults=True, mode="json"))
    return dict(given)
