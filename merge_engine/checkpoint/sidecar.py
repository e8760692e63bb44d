"""What a checkpoint has besides weights: configuration, tokenizer, templates, code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merge_engine.dtypes import DType

MANIFEST_NAME = "merge_manifest.json"

_SUFFIXES = frozenset((".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".py"))


def carried_files(folder: Path) -> dict[str, Path]:
    """The files that an output inherits from the checkpoint in ``folder``, by relative name, sorted.

    These are the licence, and all text and tokenizer files of the folder and of its direct subfolders
    (``1_Pooling/config.json``), except indexes of weights, manifests of earlier merges, and the
    ``checkpoint-*`` and hidden folders of training runs.
    """
    found = {file.relative_to(folder).as_posix(): file for file in _candidates(folder)}
    return {name: found[name] for name in sorted(found) if _is_carried(found[name])}


def merged_config(config: dict[str, Any], out_dtype: DType | None, untied: bool) -> dict[str, Any]:
    """The config.json of the output: ``config`` with the output's dtype, and with tied weights undone.

    The dtype goes under the key that the config uses, ``torch_dtype`` (old) or ``dtype``; None leaves it as
    it is. ``untied`` says that the output has a head of its own. A nested ``text_config`` is kept in step.
    """
    merged = copy.deepcopy(config)
    text = merged.get("text_config")
    for section in (merged, text) if isinstance(text, dict) else (merged,):
        if out_dtype is not None:
            keys = [key for key in ("dtype", "torch_dtype") if key in section]
            if section is merged and not keys:
                keys = ["dtype"]
            section.update(dict.fromkeys(keys, out_dtype.name))
        if untied:
            section["tie_word_embeddings"] = False
    return merged


def _candidates(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.name.startswith((".", "__", "checkpoint-")):
            yield from (file for file in entry.iterdir() if file.is_file())


def _is_carried(file: Path) -> bool:
    return (
        (file.suffix in _SUFFIXES or file.name.startswith(("LICENSE", "NOTICE")))
        and not file.name.endswith((".safetensors.index.json", ".bin.index.json"))
        and file.name != MANIFEST_NAME
    )
