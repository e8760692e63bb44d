"""The model card, the README.md of an output, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from merge_engine.observe.result import MergeResult
from merge_engine.observe.versions import versions
from merge_engine.recipe import Recipe


def encode_card(recipes: Sequence[Recipe], result: MergeResult, digest: str) -> bytes:
    """The README.md of the output, as UTF-8: its models, recipes, counts and ``digest``, that of the model.

    The last of the ``recipes`` is that of the output. The others are those that it refers to, in their order.
    """
    # The import of ModelCard takes a tenth of a second in every merge, that of ModelCardData a hundredth.
    from huggingface_hub import ModelCardData

    # The hub links to models by their ids. Local paths mean nothing to others and may be private.
    recipe = recipes[-1]
    made = {each.name for each in recipes[:-1]}
    models = [model for each in recipes for model in each.references if model.path not in made]
    parts = [part for one in models for part in (one, one.lora) if part is not None]
    on_hub = [one.path for one in parts if not Path(one.path).expanduser().exists()]
    about = ModelCardData(
        library_name="transformers",
        base_model=list(dict.fromkeys(on_hub)) or None,
        tags=["merge", "merge_engine"],
    )
    lines = [
        "---",
        about.to_yaml(),
        "---",
        "",
        "# Merged model",
        "",
        f"Merged with merge_engine {versions()['merge_engine']}, method `{recipe.merge_method}`.",
        "",
        "## Models",
        "",
        *(f"- `{name}`" for name in dict.fromkeys(map(str, models))),
        "",
        "## Recipe",
        "",
        "```yaml",
        "---\n".join(each.to_yaml() for each in recipes).rstrip("\n"),
        "```",
        "",
    ]
    if result.warnings:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in result.warnings), ""]
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
        f"XXH3 digest (128 bits) of all tensors: `{digest}`. The digest of each tensor is in "
        "`merge_manifest.json`. The same recipe gives the same digest on every device; it is no proof against forgery.",
        "",
    ]
    return "\n".join(lines).encode()
