"""The end of a merge: its result, and the files beside the weights, which make the output complete."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from merge_engine.checkpoint import (
    MANIFEST_NAME,
    CheckpointTransaction,
    CheckpointWriter,
    strange_model_files,
)
from merge_engine.engine.records import Collected
from merge_engine.engine.side_files import add_side_files
from merge_engine.fit import idle_models
from merge_engine.observe.card import encode_card
from merge_engine.observe.digests import model_digest
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.manifest import MergedInput, MergedIntermediate, encode_manifest
from merge_engine.observe.result import MergeResult, TensorResult
from merge_engine.planning import MergePlan, named
from merge_engine.storage import File
from merge_engine.text import some

RECIPE_NAME = "mergekit_config.yml"
"""The recipe in an output, under the name that mergekit gives it: tools that read outputs of mergekit look for it."""

CARD_NAME = "README.md"
OF_EVERY_OUTPUT = (CARD_NAME, RECIPE_NAME)
"""Files that a merge makes itself."""


def result_of(
    planned: MergePlan,
    results: Mapping[str, TensorResult],
    trimmed_to: Mapping[int, int],
    ledger: Ledger,
    notes: Iterable[str],
) -> MergeResult:
    """The result of a merge. Tensors without elements are never visited, but appear in it."""
    named = planned.recipe.stacks.models
    labels = {i: str(named[i]) for i in planned.models}
    per_tensor = [results.get(task.name) or TensorResult(task.name, 0) for task in planned.tasks]
    said = [*planned.notes, *notes]
    result = MergeResult(None, None, per_tensor, labels, ledger, said, trimmed_to, list(planned.warnings))
    kept = {i: counts.kept for i, counts in result.counts.items() if i not in planned.copies}
    result.warnings += idle_models(labels, kept)
    return result


def publish(
    planned: MergePlan,
    output: Path,
    collected: Collected,
    ledger: Ledger,
    writer: CheckpointWriter | CheckpointTransaction,
    side_files: Mapping[str, File],
    notes: Iterable[str] = (),
) -> MergeResult:
    """Add config, tokenizer, model card and manifest, wait for the disk, and give all files their names.

    ``side_files`` are those that the donor had when the merge began, from ``side_files_of``.
    Raises ``CheckpointError`` and ``OutputError``.
    """
    result = result_of(planned, collected.results, collected.trimmed_to, ledger, [*notes, *collected.notes])
    result.output = output
    start = time.perf_counter()
    add_side_files(planned, writer, side_files)
    digest = model_digest(collected.digests.by_name())
    recipes = [*(each.plan.recipe for each in planned.intermediates), planned.recipe]
    writer.add_file(CARD_NAME, encode_card(recipes, result, digest))
    writer.add_file(RECIPE_NAME, "---\n".join(recipe.to_yaml() for recipe in recipes).encode())
    if isinstance(writer, CheckpointWriter):
        writer.flush()
    ledger.publish.seconds = time.perf_counter() - start
    ledger.seconds += ledger.publish.seconds
    manifest = encode_manifest(
        planned.recipe,
        _inputs(planned),
        _intermediates(planned),
        result,
        ", ".join(collected.backends),
        collected.digests,
        planned.shards,
        writer.files,
    )
    writer.add_file(MANIFEST_NAME, manifest)
    writer.finish()
    if strange := strange_model_files(output, writer.files):
        # The manifest does not have it: a merge says the same of itself, whatever stood in the folder.
        result.warnings.append(
            f"{output}: holds {some(strange)}, which this merge did not write and a loader may read; remove what does "
            "not belong to the model"
        )
    if writer.complete:
        # No line of the manifest: it is the same, however often the merge was interrupted.
        result.notes.append(
            f"{len(writer.complete)} of {len(planned.shards)} shards were complete from an earlier run"
        )
    return result


def _inputs(planned: MergePlan) -> list[MergedInput]:
    """The inputs as the manifest names them: those that do not stay by the names of their recipes."""
    roles = {**planned.bases, **{str(i): model for i, model in planned.models.items()}}
    inputs = {given.label: given for given in planned.inputs}
    return [
        MergedInput(
            named(label, planned.intermediates),
            given.fingerprint,
            tuple(role for role, one in roles.items() if one.label == label),
            given.contents,
            given.adapter,
        )
        for label, given in inputs.items()
    ]


def _intermediates(planned: MergePlan) -> list[MergedIntermediate]:
    return [
        MergedIntermediate(
            each.name,
            str(each.folder) if each.kept else None,
            each.plan.recipe.to_yaml(),
            each.digest or "",
            _inputs(each.plan),
        )
        for each in planned.intermediates
    ]
