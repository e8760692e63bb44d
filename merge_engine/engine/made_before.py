"""Whether a folder holds the output of a plan already, from an earlier run."""

from __future__ import annotations

from pathlib import Path

from merge_engine.checkpoint import MANIFEST_NAME
from merge_engine.engine.publishing import OF_EVERY_OUTPUT, result_of
from merge_engine.engine.records import plan_key
from merge_engine.engine.side_files import add_side_files, side_files_of
from merge_engine.errors import ManifestError
from merge_engine.observe.digests import digest_of
from merge_engine.observe.ledger import Ledger
from merge_engine.observe.result import MergeResult, TensorResult
from merge_engine.observe.versions import versions
from merge_engine.planning import MergePlan


def is_made(planned: MergePlan, folder: Path) -> bool:
    """Whether a folder holds the output of this plan, by its manifest and the sizes of its files.

    Raises ``CheckpointError`` if a file beside the weights of an input cannot be read.
    """
    if not plan_key(planned) or not (folder / MANIFEST_NAME).exists():
        return False
    from merge_engine.observe.recorded import read_manifest  # slow to load, and seldom needed

    try:
        manifest = read_manifest(folder)
    except ManifestError:
        return False
    inputs = {each.label: each.fingerprint for each in planned.inputs}
    shards = {shard.name: (shard.size, digest_of(shard.header)) for shard in planned.shards}
    sizes = {name: file.bytes for name, file in manifest.files.items()} | {
        name: shard.bytes for name, shard in manifest.shards.items()
    }
    beside = _Digests()
    add_side_files(planned, beside, side_files_of(planned))
    return (
        manifest.versions.get("merge_engine") == versions()["merge_engine"]
        and manifest.recipe == planned.recipe.to_yaml()
        and {path: one.fingerprint for path, one in manifest.inputs.items()} == inputs
        and {name: (shard.bytes, shard.header) for name, shard in manifest.shards.items()} == shards
        and {name: file.digest for name, file in manifest.files.items() if name not in OF_EVERY_OUTPUT}
        == beside.digests
        and all(_size(folder / name) == nbytes for name, nbytes in sizes.items())
    )


def result_of_made(planned: MergePlan, folder: Path) -> MergeResult:
    """The result of an earlier merge that made the output of this plan. Raises ``ManifestError``."""
    from merge_engine.observe.recorded import read_manifest

    manifest = read_manifest(folder)
    results = {
        name: TensorResult(name, each.elements, {model: c.plain() for model, c in each.counts.items()})
        for name, each in manifest.tensors.items()
    }
    result = result_of(planned, results, {}, Ledger(), manifest.notes[len(planned.notes) :])
    # What a trim over a whole model has saved is not known by tensor.
    result.trimmed_to = {
        model: counts.kept - counts.saved_by_trim
        for model, counts in manifest.counts.items()
        if counts.saved_by_trim != result.counts[model].saved_by_trim
    }
    result.output = folder
    return result


class _Digests:
    """The digests of an output's files beside the weights, instead of the files."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def add_file(self, name: str, data: bytes, /) -> None:
        self.digests[name] = digest_of(data)

    def copy_file(self, name: str, source: Path, /) -> None:
        self.add_file(name, source.read_bytes())


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1
