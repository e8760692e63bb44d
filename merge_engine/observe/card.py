"""The model card: what a merge did, for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from merge_engine.observe.digests import model_digest
from merge_engine.observe.result import MergeResult
from merge_engine.observe.versions import versions

if TYPE_CHECKING:
    from merge_engine.engine.plan import Plan


def encode_card(plan: Plan, result: MergeResult, digests: Mapping[str, str]) -> bytes:
    """The README.md of the output: what was merged, how, and how to check it."""
    recipe = plan.recipe
    references = [recipe.base_model] if recipe.base_model is not None else []
    references += [entry.model for entry in recipe.models]
    names = list(dict.fromkeys(str(reference) for reference in references))
    # Local paths mean nothing to others, and are nobody's business.
    on_hub = [name for name in names if not Path(name).expanduser().exists()]
    lines = [
        "---",
        "library_name: transformers",
        *(["base_model:", *(f"- {json.dumps(name)}" for name in on_hub)] if on_hub else []),
        "tags:",
        "- merge",
        "- merge_engine",
        "---",
        "",
        "# Merged model",
        "",
        f"Merged with merge_engine {versions()['merge_engine']}, method `{recipe.merge_method}`.",
        "",
        "## Models",
        "",
        *(f"- `{name}`" for name in names),
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.to_yaml().rstrip("\n"),
        "```",
        "",
    ]
    if result.counts:
        lines += [
            "## What became of the task vectors",
            "",
            "| model | kept | lost to the election | saved by trim slack | saved by sign slack |",
            "| --- | ---: | ---: | ---: | ---: |",
            *(
                f"| `{result.models[model]}` | {c.kept:,} | {c.lost:,} "
                f"| {c.saved_by_trim:,} | {c.saved_by_sign:,} |"
                for model, c in result.counts.items()
            ),
            "",
        ]
    lines += [
        "## Digest",
        "",
        f"XXH3 digest (128 bits) over all tensors: `{model_digest(digests)}`. The digest of each tensor is in "
        "`merge_manifest.json`. The same recipe gives the same digest on every device; it is no proof against forgery.",
        "",
    ]
    return "\n".join(lines).encode()
