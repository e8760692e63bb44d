"""The files of a checkpoint besides weights that its output inherits: settings, tokenizer, templates, code, licence."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from merge_engine.checkpoint.model_code import code_files, module_folders
from merge_engine.errors import CheckpointError, way_out
from merge_engine.storage.bounded import MAX_TOKENIZER, broken_link
from merge_engine.text import some

MANIFEST_NAME = "merge_manifest.json"
REPORT_NAMES = ("merge_report.html", "merge_report.json")
"""Files about an output that are not part of it: no other output inherits them."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "tokenizer.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "tekken.json",
    "normalizer.json",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.vocab",
    # templates
    "chat_template*.jinja",
    "chat_template*.json",
)
"""What a tokenizer is made of, with its chat templates."""

# What loaders of transformers, sentence-transformers and mistral-common read. A trainer's folder holds much more: logs,
# optimizers, adapters, scripts, private notes. docs/recipes.md has this list too.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    # pictures, sound, video
    "*preprocessor_config.json",
    "*processor_config.json",
    "feature_extractor_config.json",
    "audio_tokenizer_config.json",
    # sentence-transformers
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)
_TEMPLATES = "additional_chat_templates"
_BELONGS_IN_FOLDER = {_TEMPLATES: ("*.jinja",)}
_BELONGS_IN_MODULE = (*MODEL_FILES, "*.safetensors")  # a Dense layer of sentence-transformers has weights
_BLOB = re.compile(r"/models--[^/]+/blobs/([0-9a-f]{40}|[0-9a-f]{64})$")
_LICENCES = ("licen[cs]e*", "notice*", "use_policy*", "copying*")


@dataclass
class SideFiles:
    """The files that an output inherits, by relative name, sorted, and ``warnings`` about files that it does not."""

    carried: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def find_side_files(path: Path) -> SideFiles:
    """What an output inherits from the checkpoint at ``path``, a folder or a single weight file.

    These are the files that belong to a model by their names, in its folder, in the folders that modules.json names and
    in ``additional_chat_templates``; the Python files that its settings name; and the licence. Not inherited, with a
    warning, are links to files outside of the folder (those of the hub's cache lead to its blobs), files above
    100 MB, and what is no regular file.

    Raises ``CheckpointError`` if a folder or a file is not readable, or is a broken link.
    """
    folder = path if path.is_dir() else path.parent
    try:
        return _found(folder)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: cannot be read: {error.strerror}{way_out(error)}"
        ) from error


def carried_files(path: Path) -> dict[str, Path]:
    """The files that an output inherits; see ``find_side_files``."""
    return find_side_files(path).carried


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that an output inherits and that belong to the tokenizer. See ``find_side_files``."""
    return {
        name: path
        for name, path in find_side_files(folder).carried.items()
        if _matches(name, TOKENIZER_FILES) or name.startswith(f"{_TEMPLATES}/")
    }


def strange_model_files(folder: Path, known: Collection[str]) -> list[str]:
    """The files in ``folder`` that loaders read beside the weights, except the known ones. Raises ``OSError``."""
    names = (entry.name for entry in folder.iterdir())
    return sorted(name for name in names if name not in known and _matches(name, MODEL_FILES))


def leaves(file: Path, folder: Path) -> bool:
    """Whether a file in the model's folder is a link to somewhere else.

    A folder of the hub's cache, ``snapshots/<commit>``, has its files in ``blobs`` beside ``snapshots``, and older
    downloads into a folder of one's own are links to such blobs. Whoever names a blob knows the hash of its content.
    """
    home, target = folder.resolve(), file.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return not any(target.is_relative_to(one) for one in homes) and not _BLOB.search(target.as_posix())


def _found(folder: Path) -> SideFiles:
    named = {entry.name: entry for entry in folder.iterdir() if _belongs(entry.name)}
    found = _checked(folder, named)
    inner = dict.fromkeys(module_folders(folder, found.carried), _BELONGS_IN_MODULE) | _BELONGS_IN_FOLDER
    more = {
        f"{name}/{entry.name}": entry
        for name, patterns in inner.items()
        if (folder / name).is_dir()
        for entry in (folder / name).iterdir()
        if _matches(entry.name, patterns)
    }
    more |= {name: folder / name for name in code_files(folder, found.carried)}
    return _checked(folder, named | more)


def _belongs(name: str) -> bool:
    return _matches(name, MODEL_FILES) or _matches(name.lower(), _LICENCES)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _checked(folder: Path, named: dict[str, Path]) -> SideFiles:
    """The files that can be carried over, and a warning for each reason why others cannot."""
    side = SideFiles()
    outside, large, odd = [], [], []
    for name, file in sorted(named.items()):
        if file.is_symlink() and not file.exists():
            raise broken_link(file)
        if file.is_dir():
            continue
        if leaves(file, folder):
            outside.append(name)
        elif not file.is_file():
            odd.append(name)
        elif file.stat().st_size > MAX_TOKENIZER:
            large.append(name)
        elif not os.access(file, os.R_OK):
            raise CheckpointError(f"{file}: cannot be read: permission denied; make it readable or remove it")
        else:
            side.carried[name] = file
    if "config.json" in outside:  # without it the output is no model
        raise CheckpointError(
            f"{folder / 'config.json'}: a link to outside of the model's folder; copy the file into the folder"
        )
    if outside:
        side.warnings.append(
            f"{folder}: links to outside of the folder are not carried over: {some(outside)}; copy the files into it "
            "if the output needs them"
        )
    if large:
        side.warnings.append(
            f"{folder}: files above {MAX_TOKENIZER / 1e6:.0f} MB are not carried over: {some(large)}"
        )
    if odd:
        side.warnings.append(f"{folder}: only regular files are carried over, not {some(odd)}")
    return side
