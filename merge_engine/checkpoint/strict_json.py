"""Strict JSON, for files from others: keys given twice and broken text are errors."""

from __future__ import annotations

import json


def parse_json(raw: bytes) -> object:
    """Parse UTF-8 JSON. Raises ``ValueError`` with the reason if it is malformed or a key occurs twice."""
    text = raw.decode("utf-8")
    try:
        # Only an escape can give text that UTF-8 cannot encode; the slower check is for texts with escapes only.
        return json.loads(text, object_pairs_hook=_encodable if "\\u" in text else _without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return entries


def _encodable(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a lone surrogate such as "\\ud800", which is legal in JSON but cannot be written to a file again."""
    entries = _without_duplicates(pairs)
    "".join(entries).encode("utf-8")
    return entries
