"""The manifest of a merge, merge_manifest.json, for programs."""

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
"""The version of the format. It grows with every change that a reader must know."""


@dataclass(frozen=True)
class MergedInput:
    """A checkpoint that was merged: its path, its fingerprint, and its roles: ``base``, or recipe positions.

    An input without a role gave only config and tokenizer.
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

    ``backend`` is the backend's name, ``digests`` has the hexadecimal digest of each tensor by name, ``files`` are
    the names of the other files that were written into the folder.
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
        "warnings": result.warnings,
        "ledger": result.ledger.as_dict(),
    }
    # One line for each key: fully indented JSON of many tensors is long and slow to write.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _counts(counts: Mapping[int, ModelCounts]) -> dict[str, dict[str, int]]:
    return {str(model): c.as_dict() for model, c in counts.items()}
