"""``verify``: the files of an output against the manifest of its merge."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from xxhash import xxh3_128, xxh3_128_hexdigest

from merge_engine.arguments import path_of
from merge_engine.checkpoint import MANIFEST_NAME, Header, read_header, strange_model_files
from merge_engine.checkpoint.layout import INDEX_FILE
from merge_engine.checkpoint.sidecar import leaves
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.checkpoint.unfinished import unfinished_files
from merge_engine.errors import CheckpointError, ManifestError
from merge_engine.inspect.blocks import Block, Damage, blocks_of, check_blocks
from merge_engine.inspect.inputs import input_changes
from merge_engine.observe.recorded import Manifest, RecordedFile, RecordedShard, read_manifest
from merge_engine.storage import File
from merge_engine.storage.bounded import MAX_INDEX, read_bounded
from merge_engine.text import counted, size_text, some

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".safetensors.index.json",
    ".bin.index.json",
    "adapter_config.json",
)
_PIECE = 1 << 20  # bytes of a side file that are held at a time


@dataclass(frozen=True)
class Finding:
    """What is wrong with one file, in one line. ``file`` is its name in the folder, or the path of an input.

    Where bytes of tensors are wrong, ``tensors`` names those tensors, and ``first`` and ``last`` are the first and the
    last byte of the file in the wrong blocks.
    """

    file: str
    problem: str
    tensors: tuple[str, ...] = ()
    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@dataclass
class Verification:
    """An output held against its manifest: everything that is wrong with the weights, other files and inputs.

    ``tensors``, ``shards`` and ``files`` are the numbers of tensors, weight files and other files in the manifest,
    ``nbytes`` their size. ``checked_inputs`` is the number of inputs that were looked at.
    """

    output: Path
    tensors: int
    shards: int
    files: int
    nbytes: int
    checked_inputs: int = 0
    weight_findings: list[Finding] = field(default_factory=list)
    file_findings: list[Finding] = field(default_factory=list)
    input_findings: list[Finding] = field(default_factory=list)

    @property
    def findings(self) -> list[Finding]:
        """All findings: first those about weights, then those about other files, then those about inputs."""
        return [*self.weight_findings, *self.file_findings, *self.input_findings]

    @property
    def complete(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    @property
    def lines(self) -> list[str]:
        """The findings for people: one line for each problem, with the files that have it."""
        files: dict[str, list[str]] = {}
        for finding in self.findings:
            files.setdefault(finding.problem, []).append(finding.file)
        return [f"{some(names)}: {problem}" for problem, names in files.items()]

    @property
    def summary(self) -> str:
        """The outcome in one line."""
        if self.complete:
            inputs = f"; {counted(self.checked_inputs, 'input')} unchanged" if self.checked_inputs else ""
            return (
                f"complete: {self.output}: {counted(self.tensors, 'tensor')} in {counted(self.shards, 'file')} and "
                f"{counted(self.files, 'other file')} are as they were merged, {size_text(self.nbytes)}{inputs}"
            )
        if self.weight_findings:
            return f"damaged: {self.output}: the weights are not as they were merged"
        if self.file_findings:
            names = some([finding.file for finding in self.file_findings])
            return (
                f"changed: {self.output}: the weights are as they were merged, other files are not: {names}"
            )
        return f"inputs changed: {self.output}: all files are as they were merged, but the inputs are not"


def verify(
    output: str | Path,
    *,
    inputs: bool = False,
    on_start: Callable[[int], None] = lambda nbytes: None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Read all files of an output once, and hold them against the manifest of its merge.

    ``inputs`` says to look also whether the inputs are still those that were merged, from their sizes, times and
    headers. ``on_start`` is called with the bytes of tensor data that will be read, ``progress`` with the bytes of
    each finished part. Everything that is wrong is in the result, also files that cannot be read.

    Raises ``OptionError`` for what is no path, and ``ManifestError`` if the folder holds no finished merge, or if its
    manifest is damaged.
    """
    folder = path_of("output", output)
    manifest = read_manifest(folder)
    sizes = [shard.bytes for shard in manifest.shards.values()] + [
        file.bytes for file in manifest.files.values()
    ]
    nbytes = sum(sizes)
    found = Verification(folder, len(manifest.tensors), len(manifest.shards), len(manifest.files), nbytes)
    headers = {}
    for name, shard in manifest.shards.items():
        header = _open_shard(folder, name, shard)
        if isinstance(header, Finding):
            found.weight_findings.append(header)
        else:
            headers[name] = header
    blocks = _blocks(folder, manifest, headers)
    found.weight_findings += _check_index(folder, manifest, headers)
    on_start(sum(one.end - one.start for of_file in blocks.values() for one in of_file))
    found.weight_findings += map(_damage, check_blocks(blocks, progress))
    found.file_findings += _strangers(folder, manifest)
    for name, file in manifest.files.items():
        found.file_findings += _check_file(folder, name, file)
    if inputs:
        found.checked_inputs = len(manifest.lasting_inputs)
        found.input_findings += [
            Finding(path, problem)
            for path, recorded in manifest.lasting_inputs.items()
            for problem in input_changes(path, recorded)
        ]
    return found


def _open_shard(folder: Path, name: str, shard: RecordedShard) -> Header | Finding:
    """The header of a weight file, or what is wrong with the file as a whole."""
    path = folder / name
    size = _size(folder, name)
    if isinstance(size, str):
        return Finding(name, size)
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "longer than it was"
        return Finding(name, f"{what}: has {size} bytes, not {shard.bytes}; not read")
    try:
        header = read_header(path)
        with path.open("rb") as file:
            digest = xxh3_128_hexdigest(file.read(header.data_start))
    except CheckpointError:
        digest = ""
    except OSError as error:
        return Finding(name, f"cannot be read: {error.strerror}")
    if digest != shard.header:
        return Finding(name, "the header is not as it was merged; the tensors in it are not read")
    return header


def _blocks(folder: Path, manifest: Manifest, headers: Mapping[str, Header]) -> dict[File, list[Block]]:
    """The blocks of all tensors in these files, in the order of the file.

    Raises ``ManifestError`` if the manifest does not have the tensors of the headers that it has the digests of.
    """
    files = {name: File.of(folder / name) for name in headers}
    try:
        blocks = {
            files[name]: [
                block
                for tensor in header.tensors.values()
                for block in blocks_of(tensor, manifest.tensors[tensor.name])
            ]
            for name, header in headers.items()
        }
    except KeyError as error:
        raise _inconsistent(folder, f"tensor {error.args[0]!r} is in a file but not in it") from None
    except ValueError as error:
        raise _inconsistent(folder, f"it has {error}") from None
    placed = {name for header in headers.values() for name in header.tensors}
    unplaced = [name for name in manifest.tensors if name not in placed]
    if unplaced and len(headers) == len(manifest.shards):
        raise _inconsistent(folder, f"no weight file holds {some(unplaced)}")
    return blocks


def _inconsistent(folder: Path, what: str) -> ManifestError:
    return ManifestError(f"{folder / MANIFEST_NAME}: does not go with the weights: {what}; it is damaged")


def _check_index(folder: Path, manifest: Manifest, headers: Mapping[str, Header]) -> Iterable[Finding]:
    """Whether the index places each tensor in the file that holds it. A single weight file has no index."""
    if len(manifest.shards) < 2:
        return []
    size = _size(folder, INDEX_FILE)
    if isinstance(size, str):
        return [Finding(INDEX_FILE, size)]
    try:
        index = parse_json(read_bounded(folder / INDEX_FILE, MAX_INDEX))
    except OSError as error:
        return [Finding(INDEX_FILE, f"cannot be read: {error.strerror}")]
    except ValueError as error:
        return [Finding(INDEX_FILE, f"no valid JSON: {error}")]
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        return [Finding(INDEX_FILE, "has no weight_map from tensor names to file names")]
    held = {tensor: name for name, header in headers.items() for tensor in header.tensors}
    unread = [name for name in manifest.shards if name not in headers]  # each of them is a finding of its own
    wrong = [
        repr(name)
        for name in {**manifest.tensors, **places}
        if places.get(name) not in ([held[name]] if name in held else unread)
    ]
    return [Finding(INDEX_FILE, f"tensors are in other files than it says: {some(wrong)}")] if wrong else []


def _strangers(folder: Path, manifest: Manifest) -> list[Finding]:
    """Files that a loader may read, and that are not those of the merge."""
    known = {*manifest.shards, *manifest.files, *([INDEX_FILE] if len(manifest.shards) > 1 else [])}
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return [Finding(str(folder), f"its files cannot be listed: {error.strerror}")]
    strange = [name for name in names if name.endswith(_WEIGHTS) and name not in known]
    findings = [
        Finding(name, "not a part of this merge; a loader may take it for weights") for name in strange
    ]
    findings += [
        Finding(name, "not a part of this merge; a loader may read it")
        for name in strange_model_files(folder, known)
    ]
    if parts := unfinished_files(folder):
        findings.append(Finding(some(parts), "left by another merge into this folder, which is not finished"))
    return findings


def _damage(damage: Damage) -> Finding:
    first, last = damage.blocks[0], damage.blocks[-1]
    names = tuple(dict.fromkeys(block.tensor for block in damage.blocks))
    if len(damage.blocks) == 1:
        which = f"block {first.number} of {first.of} of " if first.of > 1 else ""
        what = f"{which}tensor {first.tensor!r}"
    elif len(names) == 1:
        what = f"blocks {first.number} to {last.number} of {first.of} of tensor {first.tensor!r}"
    else:
        what = f"{len(names)} tensors: {some([repr(name) for name in names])}"
    verb = "are " if damage.reason.startswith("not") else ""
    return Finding(
        damage.file.path.name,
        f"bytes {first.start} to {last.end - 1} {verb}{damage.reason} ({what})",
        names,
        first.start,
        last.end - 1,
    )


def _check_file(folder: Path, name: str, recorded: RecordedFile) -> list[Finding]:
    """Hold a file other than weights against its size and digest."""
    size = _size(folder, name)
    if isinstance(size, str):
        return [Finding(name, size)]
    if size != recorded.bytes:
        return [Finding(name, f"changed after the merge: has {size} bytes, not {recorded.bytes}")]
    digest = xxh3_128()
    try:
        with (folder / name).open("rb") as file:
            while data := file.read(_PIECE):
                digest.update(data)
    except OSError as error:
        return [Finding(name, f"cannot be read: {error.strerror}")]
    if digest.hexdigest() != recorded.digest:
        return [Finding(name, "changed after the merge")]
    return []


def _size(folder: Path, name: str) -> int | str:
    """The size of a regular file in the folder, or the reason why it is not read."""
    path = folder / name
    try:
        found = path.stat()
        if leaves(path, folder):
            return "a link that leaves the folder; not read"
    except FileNotFoundError:
        return "a link to a file that does not exist" if path.is_symlink() else "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "a folder, pipe or device, not a regular file; not read"
    if not os.access(path, os.R_OK):
        return "cannot be read: Permission denied"
    return found.st_size
