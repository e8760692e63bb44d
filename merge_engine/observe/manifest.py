"""The manifest of a merge, merge_manifest.json, for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_engine.checkpoint import AdapterFiles, ShardLayout
from merge_engine.observe.digests import Digests, digest_of, model_digest
from merge_engine.observe.result import MergeResult, ModelCounts
from merge_engine.observe.versions import versions
from merge_engine.recipe import Recipe
from merge_engine.storage import File

FORMAT = 3
"""The version of the format. It grows with every change that a reader must know."""


@dataclass(frozen=True)
class MergedInput:
    """A checkpoint that was merged: its path, its fingerprint, and its roles: ``base``, or recipe positions.

    An input without a role gave only config and tokenizer. ``contents`` has each weight file with a digest of its
    header, as in ``Checkpoint``. For a model with an adapter, ``path`` is both paths with a "+" between.
    """

    path: str
    fingerprint: str
    roles: tuple[str, ...]
    contents: tuple[tuple[File, str], ...]
    adapter: AdapterFiles | None = None


@dataclass(frozen=True)
class MergedIntermediate:
    """The output of another recipe that the merge is made of: its name, recipe, inputs, and the digest of its tensors.

    ``path`` is its folder; None if it was removed when the result was there.
    """

    name: str
    path: str | None
    recipe: str
    digest: str
    inputs: Sequence[MergedInput]


def encode_manifest(
    recipe: Recipe,
    inputs: Sequence[MergedInput],
    intermediates: Sequence[MergedIntermediate],
    result: MergeResult,
    backend: str,
    digests: Digests,
    shards: Sequence[ShardLayout],
    files: Mapping[str, tuple[int, str]],
) -> bytes:
    """The manifest as JSON: recipe, inputs, digests, counts and ledger of the run.

    ``intermediates`` are the outputs of other recipes that it is made of, in the order of their making.

    ``backend`` is the backend's name. ``digests`` has all bytes of all tensors. ``files`` has the size and the
    hexadecimal digest of each other file that was written into the folder, by name. Raises ``OutputError`` when
    digests are missing.
    """
    by_name, blocks = digests.by_name(), digests.blocks()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "versions": versions(),
        "backend": backend,
        "recipe": recipe.to_yaml(),
        "inputs": {one.path: _input(one) for one in inputs},
        **_intermediates(intermediates),
        "digest": model_digest(by_name),
        "tensors": {
            tensor.name: {
                "digest": by_name[tensor.name],
                "elements": tensor.elements,
                **_blocks(blocks.get(tensor.name, {})),
                **({"counts": _counts(tensor.counts)} if tensor.counts else {}),
            }
            for tensor in result.per_tensor
        },
        "counts": _counts(result.counts),
        "shards": {shard.name: {"bytes": shard.size, "header": digest_of(shard.header)} for shard in shards},
        "files": {name: {"bytes": nbytes, "digest": digest} for name, (nbytes, digest) in files.items()},
        "notes": result.notes,
        "warnings": result.warnings,
        "ledger": result.ledger.as_dict(),
    }
    # One line for each key: fully indented JSON of many tensors is long and slow to write.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _input(given: MergedInput) -> dict[str, Any]:
    described = {"fingerprint": given.fingerprint, "roles": given.roles, "files": _files(given.contents)}
    if given.adapter is not None:
        described["adapter"] = {"path": str(given.adapter.path), "files": _files(given.adapter.contents)}
    return described


def _files(contents: Iterable[tuple[File, str]]) -> dict[str, Any]:
    return {
        file.path.name: {"bytes": file.size, "mtime_ns": file.mtime_ns, "header": header}
        for file, header in contents
    }


def _intermediates(intermediates: Sequence[MergedIntermediate]) -> dict[str, Any]:
    described = {
        one.name: {
            "path": one.path,
            "recipe": one.recipe,
            "digest": one.digest,
            "inputs": {each.path: _input(each) for each in one.inputs},
        }
        for one in intermediates
    }
    return {"intermediates": described} if described else {}


def _blocks(blocks: Mapping[int, bytes]) -> dict[str, list[str]]:
    """The digests of a tensor's blocks. That of a single block is left out: it would be as long as the tensor's."""
    return {"blocks": [blocks[number].hex() for number in range(len(blocks))]} if len(blocks) > 1 else {}


def _counts(counts: Mapping[int, ModelCounts]) -> dict[str, dict[str, int]]:
    return {str(model): c.as_dict() for model, c in counts.items()}
