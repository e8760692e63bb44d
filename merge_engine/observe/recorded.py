"""The manifest of a merge, read and checked: a folder may hold a file that no merge wrote."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from merge_engine.checkpoint import MANIFEST_NAME
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.checkpoint.unfinished import unfinished_files
from merge_engine.errors import ManifestError, way_out
from merge_engine.observe.digests import model_digest, tensor_digest
from merge_engine.observe.manifest import FORMAT
from merge_engine.observe.result import ModelCounts
from merge_engine.recipe.problems import describe
from merge_engine.storage.bounded import MAX_MANIFEST, read_bounded
from merge_engine.text import cut, shown, some

_LONGEST_NAME = 255  # bytes, on all common file systems


def _inside(name: str) -> str:
    """The name of a file in the folder, or in a subfolder. Raises ``ValueError`` for every other name."""
    path = PurePosixPath(name)
    parts = name.split("/")
    if path.is_absolute() or "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"{name!r:.100} is not the name of a file inside the folder")
    if any(len(part.encode()) > _LONGEST_NAME for part in parts):
        raise ValueError(f"{name!r:.100} is too long for the name of a file")
    return name


def _directly_inside(name: str) -> str:
    if "/" in name:
        raise ValueError(f"{name!r:.100} is not the name of a file in the folder")
    return _inside(name)


_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Signed = Annotated[int, Field(strict=True)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class RecordedCounts(BaseModel):
    """The counts of one model, in a tensor or in all tensors (see ``ModelCounts``)."""

    kept: _Signed
    lost: _Signed
    saved_by_trim: _Signed
    saved_by_sign: _Signed

    def plain(self) -> ModelCounts:
        """The counts as a run gives them."""
        return ModelCounts(self.kept, self.lost, self.saved_by_trim, self.saved_by_sign)


class RecordedTensor(BaseModel):
    """A merged tensor: its digest, the digests of its blocks if it has several, and its counts by recipe position."""

    digest: _Digest
    elements: _Count
    blocks: list[_Digest] = []
    counts: dict[int, RecordedCounts] = {}


class RecordedShard(BaseModel):
    """A weight file: its size in bytes, and the digest of all bytes before the tensors'."""

    bytes: _Count
    header: _Digest


class RecordedFile(BaseModel):
    """Another file of the output: its size in bytes and its digest."""

    bytes: _Count
    digest: _Digest


class RecordedInputFile(BaseModel):
    """A weight file of an input: its size in bytes, its time in nanoseconds, and a digest of its header."""

    bytes: _Count
    mtime_ns: _Signed
    header: str


class RecordedAdapter(BaseModel):
    """A LoRA adapter that was put into an input: its path, and its files by name."""

    path: Annotated[str, Field(min_length=1)]
    files: dict[str, RecordedInputFile]


class RecordedInput(BaseModel):
    """One input when it was merged: fingerprint, roles (``base``, or recipe positions), weight files by name.

    A model with an ``adapter`` is recorded under both paths, with a "+" between.
    """

    fingerprint: str
    roles: tuple[str, ...] = ()
    files: dict[str, RecordedInputFile]
    adapter: RecordedAdapter | None = None

    def paths(self, label: str) -> tuple[str, str | None]:
        """The paths of the model and of its adapter, from what the input is recorded under."""
        if self.adapter is None:
            return label, None
        return label.removesuffix(f"+{self.adapter.path}"), self.adapter.path


class RecordedIntermediate(BaseModel):
    """The output of another recipe that the merge is made of (see ``MergedIntermediate``)."""

    path: str | None
    recipe: str
    digest: _Digest
    inputs: dict[str, RecordedInput]


class Manifest(BaseModel):
    """The manifest of a merge: what ``encode_manifest`` wrote, without the ledger."""

    format: Literal[3]
    recipe: str
    digest: _Digest
    inputs: dict[str, RecordedInput]
    intermediates: dict[str, RecordedIntermediate] = {}
    versions: dict[str, str] = {}
    tensors: dict[str, RecordedTensor]
    shards: dict[Annotated[str, AfterValidator(_directly_inside)], RecordedShard]
    files: dict[Annotated[str, AfterValidator(_inside)], RecordedFile]
    counts: dict[int, RecordedCounts]
    notes: list[str] = []

    @property
    def lasting_inputs(self) -> dict[str, RecordedInput]:
        """All inputs by path that were there before the merge, or that it left: also those of removed intermediates."""
        removed = {name for name, each in self.intermediates.items() if each.path is None}
        sources = [
            self.inputs,
            *(each.inputs for name, each in self.intermediates.items() if name in removed),
        ]
        return {path: one for inputs in sources for path, one in inputs.items() if path not in removed}


def read_manifest(folder: Path) -> Manifest:
    """The manifest in the output folder of a merge.

    Raises ``ManifestError`` if there is none, if it is not one of ours, or if its digests do not go together.
    """
    path = folder / MANIFEST_NAME
    manifest = _read(folder, path)
    damaged = [
        name
        for name, tensor in manifest.tensors.items()
        if tensor.blocks and tensor_digest([bytes.fromhex(block) for block in tensor.blocks]) != tensor.digest
    ]
    if damaged:
        raise ManifestError(
            f"{path}: the digests of blocks are not those of their tensor: {some(damaged)}; the manifest is damaged"
        )
    if model_digest({name: tensor.digest for name, tensor in manifest.tensors.items()}) != manifest.digest:
        raise ManifestError(
            f"{path}: the digests of the tensors are not those of the model; the manifest is damaged"
        )
    return manifest


def _read(folder: Path, path: Path) -> Manifest:
    try:
        document = parse_json(read_bounded(path, MAX_MANIFEST))
        if not isinstance(document, dict):
            raise ManifestError(
                f"{path}: holds {shown(document)}, not the manifest of a merge; run the merge again"
            )
        found = document.get("format")
        if type(found) is int and found != FORMAT:
            raise ManifestError(
                f"{path}: has format {found}, and this version of merge_engine reads format {FORMAT}; "
                "run the merge again"
            )
        return Manifest.model_validate(document)
    except ManifestError:  # which is a ValueError too
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(folder) from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}{way_out(error)}") from error
    except ValidationError as error:
        problem = cut(describe(error)[0], 400)
        raise ManifestError(f"{path}: not the manifest of a merge: {problem}; run the merge again") from None
    except ValueError as error:
        raise ManifestError(f"{path}: no valid JSON: {error}; run the merge again") from None


def _missing(folder: Path) -> ManifestError:
    if not folder.is_dir():
        return ManifestError(f"{folder}: there is no such folder; name the output folder of a merge")
    if parts := unfinished_files(folder):
        return ManifestError(f"{folder}: an unfinished merge: it holds {some(parts)}; run the merge again")
    return ManifestError(f"{folder}: holds no {MANIFEST_NAME}; name the output folder of a merge")
