"""JSON from others: broken text, numbers that JSON lacks, and keys given twice are errors."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from merge_engine.errors import CheckpointError, way_out
from merge_engine.storage.bounded import read_bounded
from merge_engine.text import shown

_MOST_VALUES = 5_000_000
_MAX_DEPTH = 100  # of settings, far below what exhausts the stack when they are copied or written


def parse_json(raw: bytes, *, repeated: bool = False) -> object:
    """Parse UTF-8 JSON. ``repeated`` lets a key occur twice: the last one counts, as for most readers.

    Infinity is read although JSON lacks it, because published models have it in config.json. Raises ``ValueError``
    with the reason if the text is malformed, if a key occurs twice, or if a text in it holds a lone surrogate such as
    "\\ud800", which is legal in JSON but cannot be written to a file again.
    """
    check_amount(raw)
    if not raw.strip():
        raise ValueError("it is empty")
    if raw.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it starts with a byte order mark, which JSON must not have")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text") from None
    try:
        unique = None if repeated else _without_duplicates
        document = json.loads(text, object_pairs_hook=unique, parse_constant=_infinity)
        if "\\u" in text:  # only an escape can give text that UTF-8 cannot encode
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"a text in it holds {error.object[error.start]!a}, half a character") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # Python's words are about Python
            raise ValueError("a number in it has thousands of digits") from None
        raise
    return document


def read_settings(path: Path, limit: int) -> dict[str, Any] | None:
    """The JSON object of a model's settings, such as config.json; None if there is no such file.

    Raises ``CheckpointError`` if the file cannot be read, has more than ``limit`` bytes, or is malformed.
    """
    try:
        raw = read_bounded(path, limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}{way_out(error)}") from error
    return parse_settings(raw, path)


def parse_settings(raw: bytes, path: Path) -> dict[str, Any]:
    """The JSON object of a model's settings, whose errors name ``path``. Raises ``CheckpointError``."""
    try:
        settings = parse_json(raw, repeated=True)
        depth = _depth(settings)
    except ValueError as error:
        raise CheckpointError(f"{path}: no valid JSON: {error}; repair it, or download it again") from None
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{path}: nested more than {_MAX_DEPTH} levels deep; no model's configuration")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: holds {shown(settings)}, not a JSON object; download it again")
    return settings


def check_amount(raw: bytes) -> None:
    """Raise ``ValueError`` for JSON with more values than any file of a model: each takes up to 100 bytes of memory.

    Commas and brackets are counted, in texts too: about as many as there are values. The largest known tokenizers have
    2 million, a header of 50,000 tensors 400,000.
    """
    amount = sum(map(raw.count, (b",", b"[", b"{")))
    if amount > max(_MOST_VALUES, len(raw) // 20):
        raise ValueError(f"it holds more than {_MOST_VALUES:,} values")


def _infinity(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds NaN, which is no number")
    return float(name)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.100} occurs twice")
            seen.add(key)
    return entries


def _depth(value: object) -> int:
    """The depth of nested objects and lists. It goes level by level, because recursion could exhaust the stack."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth
