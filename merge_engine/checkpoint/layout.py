"""The weight files of a checkpoint's folder, and the file of each tensor.

Files are looked for in transformers' order: ``model.safetensors``, ``model.safetensors.index.json``,
``pytorch_model.bin``, ``pytorch_model.bin.index.json``; a folder without any of them may hold its weights
in a single file of another name. The first that exists is used: ``model.safetensors`` beside an index
means that the index is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merge_engine.checkpoint.no_weights import which_of, why_no_weight_file, why_no_weights
from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.checkpoint.unfinished import unfinished_files
from merge_engine.errors import CheckpointError, way_out
from merge_engine.storage.bounded import MAX_INDEX, broken_link, read_bounded
from merge_engine.text import shown, some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_NAME = re.compile(r".*-\d{5,}-of-\d{5,}\.(safetensors|bin)")

ONLY_SHARD = re.compile(r".*-0{4,}1-of-0{4,}1\.(safetensors|bin)")
"""A single shard is whole without an index."""

_SAFETENSORS_SUFFIXES = (".safetensors",)
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# Files that trainers write beside the weights in torch's format.
_TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
_MAX_NAME = 255  # bytes in a file name, on all common file systems


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights; all of them exist.

    ``path`` is the checkpoint's folder or single file, ``folder`` the folder of its config.json. ``weight_map`` is
    the index (tensor name to file name), empty when there is none.
    """

    path: Path
    folder: Path
    files: tuple[Path, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_safetensors(self) -> bool:
        """Whether the files are safetensors; otherwise they are torch's pickles."""
        return self.files[0].suffix in _SAFETENSORS_SUFFIXES


def find_weights(path: Path) -> WeightFiles:
    """Find the weights of the checkpoint at ``path``, a folder or a weight file.

    Raises ``CheckpointError`` if there are none, if the choice is unclear, if the index is wrong, or if the path is
    not accessible.
    """
    try:
        return _find_weights(path)
    except OSError as error:  # a name too long, a folder without permission, a broken link
        raise CheckpointError(
            f"{error.filename or path}: cannot be read: {error.strerror}{way_out(error)}"
        ) from error


def _find_weights(path: Path) -> WeightFiles:
    if _present(path):
        if path.suffix not in _SAFETENSORS_SUFFIXES + _TORCH_SUFFIXES:
            raise CheckpointError(f"{path}: {why_no_weight_file(path)}")
        return WeightFiles(path, path.parent, (path,))
    if not path.is_dir():
        what = (
            "a pipe, socket or device; name a folder or a weight file"
            if path.exists()
            else "no such file or folder"
        )
        raise CheckpointError(f"{path}: {what}")
    if found := _standard(path, SINGLE_FILE, INDEX_FILE, ".safetensors"):
        return found
    if parts := unfinished_files(path):
        raise CheckpointError(f"{path}: an unfinished merge: it holds {some(parts)}; run the merge again")
    if found := _standard(path, "pytorch_model.bin", "pytorch_model.bin.index.json", ".bin"):
        return found
    return WeightFiles(path, path, (_only_weight_file(path),))


def _present(file: Path) -> bool:
    """Whether this is a file. Raises ``OSError`` for a link to a file that does not exist."""
    if file.is_symlink() and not file.exists():
        raise broken_link(file)
    return file.is_file()


def place_tensors(weights: WeightFiles, contents: Mapping[Path, Collection[str]]) -> dict[str, Path]:
    """The file of each tensor, by name. ``contents`` has the names of the tensors in each file.

    The index decides for the tensors in it. Other tensors are part of the checkpoint too, as in transformers.
    Raises ``CheckpointError`` if the index names a file that lacks the tensor, or if two files hold a tensor that
    is not in the index.
    """
    misplaced = [
        f"{name!r} in {file_name}"
        for name, file_name in weights.weight_map.items()
        if name not in contents[weights.folder / file_name]
    ]
    if misplaced:
        raise CheckpointError(
            f"{weights.path}: the index places tensors in files that lack them: {some(misplaced)}"
        )
    places = {name: weights.folder / file_name for name, file_name in weights.weight_map.items()}
    for file, names in contents.items():
        for name in names:
            if name not in weights.weight_map and places.setdefault(name, file) != file:
                raise CheckpointError(
                    f"{weights.path}: tensor {name!r} is in both {places[name].name} and {file.name}, and "
                    "the index does not say which counts"
                )
    return places


def _standard(folder: Path, single: str, index: str, suffix: str) -> WeightFiles | None:
    if _present(folder / single):
        return WeightFiles(folder, folder, (folder / single,))
    if _present(folder / index):
        return _indexed(folder, folder / index, suffix)
    return None


def _indexed(folder: Path, index: Path, suffix: str) -> WeightFiles:
    try:
        document = parse_json(read_bounded(index, MAX_INDEX))
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}{way_out(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{index}: no valid JSON: {error}; download it again") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensor names to file names")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise CheckpointError(
                f"{index}: weight_map has {shown(file_name)} for {name!r:.100}, not a file name"
            )
    names = sorted(set(weight_map.values()))
    for file_name in names:
        if "/" in file_name or "\\" in file_name or "\0" in file_name:
            raise CheckpointError(f"{index}: {file_name!r:.100} points outside its folder; not read")
        if len(file_name.encode("utf-8", "surrogatepass")) > _MAX_NAME:
            raise CheckpointError(f"{index}: {file_name!r:.100}... is too long for a file name; not read")
        if not file_name.endswith(suffix):
            raise CheckpointError(f"{index}: {file_name!r:.100} is not a {suffix} file; not read")
    broken = [name for name in names if (folder / name).is_symlink() and not (folder / name).exists()]
    if broken:
        raise CheckpointError(
            f"{folder}: {len(broken)} of {len(names)} files named by {index.name} are broken links: "
            f"{some(broken)}; download them again"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} files named by {index.name} are missing: "
            f"{some(missing)}; download them again"
        )
    return WeightFiles(folder, folder, tuple(folder / name for name in names), weight_map)


def _only_weight_file(folder: Path) -> Path:
    """The weight file of a folder without files of a standard name. A shard of several is never a checkpoint."""
    files = sorted(file.name for file in folder.iterdir() if file.is_symlink() or file.is_file())
    shards = [name for name in files if SHARD_NAME.fullmatch(name) and not ONLY_SHARD.fullmatch(name)]
    if shards:
        raise CheckpointError(
            f"{folder}: it holds {some(shards)} but no index: an unfinished merge or download; complete it"
        )
    for suffixes in (_SAFETENSORS_SUFFIXES, _TORCH_SUFFIXES):
        loose = [name for name in files if name.endswith(suffixes) and not _TRAINING_STATE.fullmatch(name)]
        if len(loose) == 1 and _present(folder / loose[0]):
            return folder / loose[0]
        if loose:
            raise CheckpointError(f"{folder}: {which_of(loose)}")
    raise CheckpointError(f"{folder}: {why_no_weights(folder, files)}")
