"""The files of a checkpoint besides weights: configuration, tokenizer, templates, code."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merge_engine.checkpoint.tie_flags import set_tie_flags
from merge_engine.dtypes import DType
from merge_engine.errors import CheckpointError

MANIFEST_NAME = "merge_manifest.json"
REPORT_NAMES = ("merge_report.html", "merge_report.json")
"""Files about an output that are not part of it: no other output inherits them."""

_SUFFIXES = frozenset((".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".py"))
# A single weight file may be in a downloads folder: only files with the well-known names of a model are copied.
_BESIDE_A_FILE = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
# A larger text file is data, not configuration; big tokenizers take a third of this.
_MAX_BYTES = 100_000_000


def carried_files(path: Path) -> dict[str, Path]:
    """The files that an output inherits from the checkpoint at ``path``, by relative name, sorted.

    From a folder these are the licence, and all text and tokenizer files in it and in its direct subfolders
    (``1_Pooling/config.json``), except indexes of weights, manifests and reports of earlier merges, the
    ``checkpoint-*`` and hidden folders of training runs, and files above 100 MB, which are data and not
    configuration. For a single weight file they are the files beside it that have the well-known names of a model's
    files. Raises ``CheckpointError`` if a folder or a file is not readable.
    """
    try:
        if path.is_dir():
            found = {file.relative_to(path).as_posix(): file for file in _candidates(path)}
        else:
            found = {file.name: file for file in path.parent.iterdir() if _is_known(file)}
        carried = {name: found[name] for name in sorted(found) if _is_carried(found[name])}
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    for file in carried.values():
        if not os.access(file, os.R_OK):
            raise CheckpointError(f"{file}: cannot be read: permission denied; make it readable or remove it")
    return carried


def merged_config(config: dict[str, Any], out_dtype: DType | None, untied: bool) -> dict[str, Any]:
    """The config.json of the output: a copy of ``config`` with the output's dtype.

    The dtype is set under the key that the config uses, ``torch_dtype`` (old) or ``dtype``; None leaves it as it
    is. A nested ``text_config`` is changed in the same way. ``untied`` says that the output has a head of its own:
    ``tie_word_embeddings`` becomes false at all levels. Otherwise all levels get the value that decides.
    """
    merged = copy.deepcopy(config)
    text = merged.get("text_config")
    for section in (merged, text) if isinstance(text, dict) else (merged,):
        if out_dtype is not None:
            keys = [key for key in ("dtype", "torch_dtype") if key in section]
            if section is merged and not keys:
                keys = ["dtype"]
            section.update(dict.fromkeys(keys, out_dtype.name))
    set_tie_flags(merged, untied)
    return merged


def _candidates(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.name.startswith((".", "__", "checkpoint-")):
            yield from (file for file in entry.iterdir() if file.is_file())


def _is_known(file: Path) -> bool:
    return any(fnmatchcase(file.name, pattern) for pattern in _BESIDE_A_FILE) and file.is_file()


def _is_carried(file: Path) -> bool:
    return (
        (file.suffix in _SUFFIXES or file.name.startswith(("LICENSE", "NOTICE")))
        and not file.name.endswith((".safetensors.index.json", ".bin.index.json"))
        and file.name not in (MANIFEST_NAME, *REPORT_NAMES)
        and file.stat().st_size <= _MAX_BYTES
    )
