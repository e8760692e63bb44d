"""What an output says about itself: a manifest for programs, a model card for people."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from merge_engine.backends import Backend
from merge_engine.engine.plan import Plan
from merge_engine.engine.result import MergeResult, ModelCounts


def model_digest(digests: Mapping[str, str]) -> str:
    """One XXH3 digest for all tensors: of the lines "<digest>  <name>" in order of the names.

    It does not depend on how the model is cut into shards.
    """
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return xxh3_128(lines.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what computed: the package, Python, and the platform."""
    try:
        package = version("merge_engine")
    except PackageNotFoundError:  # run from a source tree that is not installed
        package = "unknown"
    return {"merge_engine": package, "python": platform.python_version(), "platform": platform.platform()}


def encode_manifest(
    plan: Plan, result: MergeResult, backend: Backend, digests: Mapping[str, str], files: Sequence[str]
) -> bytes:
    """The manifest as JSON: recipe, inputs, digests, counts and ledger of the run, and what else was written."""
    roles = {"base": plan.base, **{str(i): model for i, model in plan.models.items()}}
    inputs = {
        str(c.path): {
            "fingerprint": c.fingerprint(),
            "roles": [role for role, checkpoint in roles.items() if checkpoint is c],
        }
        for c in dict.fromkeys((plan.donor, plan.base, *plan.models.values()))
        if c
    }
    manifest: dict[str, Any] = {
        "format": 1,
        "versions": versions(),
        "backend": backend.name,
        "recipe": plan.recipe.to_yaml(),
        "inputs": inputs,
        "digest": model_digest(digests),
        "tensors": {
            tensor.name: {
                "xxh3_128": digests.get(tensor.name),
                "elements": tensor.elements,
                **({"counts": _counts(tensor.counts)} if tensor.counts else {}),
            }
            for tensor in result.per_tensor
        },
        "counts": _counts(result.counts),
        "files": list(files),
        "notes": result.notes,
        "ledger": result.ledger.as_dict(),
        "usage": result.usage.as_dict() if result.usage else None,
        "predicted": result.predicted.as_dict() if result.predicted else None,
    }
    # A line for each subject: indented all through it would be long, and slow to write for many tensors.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _counts(counts: Mapping[int, ModelCounts]) -> dict[str, dict[str, int]]:
    return {str(model): c.as_dict() for model, c in counts.items()}


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
