"""What differs between two checkpoints besides tensors: config.json, tokenizers, other files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_engine.checkpoint import carried_files
from merge_engine.errors import CheckpointError, way_out
from merge_engine.fit.vocabulary import MALFORMED, from_tokenizer_json
from merge_engine.storage.bounded import MAX_TOKENIZER, read_bounded

_TOKENIZER = "tokenizer.json"
_PIECE = 1 << 20  # bytes of a file that are held at a time


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that differ, by dotted path. Each has its values under ``a`` and ``b``, or only one of the two."""
    found: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys([*a, *b]):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            inner = config_differences(x, y)
            found |= {f"{key}.{path}": values for path, values in inner.items()}
        elif (key in a) != (key in b) or _text(x) != _text(y):
            found[key] = {side: one[key] for side, one in (("a", a), ("b", b)) if key in one}
    return found


def file_differences(a: Path, b: Path) -> dict[str, str]:
    """``equal``, ``different``, ``only in a`` or ``only in b`` for each file, but config.json if both have it.

    ``a`` and ``b`` are folders or weight files; the files are those that an output would inherit. Raises
    ``CheckpointError`` for a file that cannot be read.
    """
    in_a, in_b = carried_files(a), carried_files(b)
    found = {}
    for name in sorted({*in_a, *in_b}):
        if name not in in_b:
            found[name] = "only in a"
        elif name not in in_a:
            found[name] = "only in b"
        elif name != "config.json":
            found[name] = "equal" if _are_equal(in_a[name], in_b[name]) else "different"
    return found


def differing_tokens(a: Path, b: Path) -> int | None:
    """The number of positions in the vocabularies of two folders' tokenizer.json whose tokens differ.

    A position that only one of them has counts too. None if they have no such files, or no vocabulary is found in them.
    Raises ``CheckpointError`` for a file that cannot be read.
    """
    files = a / _TOKENIZER, b / _TOKENIZER
    if not all(file.is_file() for file in files) or _are_equal(*files):
        return None
    in_a, in_b = map(_vocabulary, files)
    if in_a is None or in_b is None:
        return None
    return sum(in_a.get(position) != in_b.get(position) for position in {*in_a, *in_b})


def _are_equal(a: Path, b: Path) -> bool:
    try:
        if a.stat().st_size != b.stat().st_size:
            return False
        with a.open("rb") as in_a, b.open("rb") as in_b:
            while piece := in_a.read(_PIECE):
                if piece != in_b.read(_PIECE):
                    return False
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or a}: cannot be read: {error.strerror}{way_out(error)}"
        ) from error
    return True


def _vocabulary(file: Path) -> dict[int, str] | None:
    """Tokens by position; None for a malformed file."""
    try:
        found = from_tokenizer_json(read_bounded(file, MAX_TOKENIZER))
        tokens = (*found.ids.items(), *found.added.items())
        return {position: token for token, position in tokens}
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}{way_out(error)}") from error
    except MALFORMED:
        return None


def _text(value: object) -> str:
    """A value of JSON as text: 1, 1.0 and true are three values."""
    return json.dumps(value, sort_keys=True)
