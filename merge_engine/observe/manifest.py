"""The manifest: what a merge did, for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_engine.observe.digests import model_digest
from merge_engine.observe.result import MergeResult, ModelCounts
from merge_engine.observe.versions import versions
from merge_engine.recipe import Recipe

FORMAT = 2
"""Raised when a reader of the manifest must know about a change."""


@dataclass(frozen=True)
class MergedInput:
    """A checkpoint that was merged: where it was, its fingerprint, and as what: ``base``, or recipe positions.

    An input without a role gave only the config and the tokenizer.
    """

    path: str
    fingerprint: str
    roles: tuple[str, ...]


def encode_manifest(
    recipe: Recipe,
    inputs: Sequence[MergedInput],
    result: MergeResult,
    backend: str,
    digests: Mapping[str, str],
    files: Sequence[str],
) -> bytes:
    """The manifest as JSON: recipe, inputs, digests, counts and ledger of the run.

    ``backend`` is the name of what computed, ``digests`` has the digest of each tensor by name, ``files`` are the
    names of what else was written into the folder.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "versions": versions(),
        "backend": backend,
        "recipe": recipe.to_yaml(),
        "inputs": {one.path: {"fingerprint": one.fingerprint, "roles": one.roles} for one in inputs},
        "digest": model_digest(digests),
        "tensors": {
            tensor.name: {
                "digest": digests[tensor.name],
                "elements": tensor.elements,
                **({"counts": _counts(tensor.counts)} if tensor.counts else {}),
            }
            for tensor in result.per_tensor
        },
        "counts": _counts(result.counts),
        "files": list(files),
        "notes": result.notes,
        "ledger": result.ledger.as_dict(),
    }
    # A line for each subject: indented all through it would be long, and slow to write for many tensors.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _counts(counts: Mapping[int, ModelCounts]) -> dict[str, dict[str, int]]:
    return {str(model): c.as_dict() for model, c in counts.items()}
