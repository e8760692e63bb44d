"""The manifest: what a merge did, for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merge_engine.observe.digests import model_digest
from merge_engine.observe.result import MergeResult, ModelCounts
from merge_engine.observe.versions import versions

if TYPE_CHECKING:
    from merge_engine.backends import Backend
    from merge_engine.engine.plan import Plan


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
