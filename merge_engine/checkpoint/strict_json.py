"""JSON from files that nobody vouches for: keys given twice and broken text are errors, not guesses."""

from __future__ import annotations

import json


def parse_json(raw: bytes) -> object:
    """Parse UTF-8 JSON. Raises ``ValueError`` with the reason when it is not, or when a key occurs twice."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
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
    # A lone surrogate such as "\ud800" is legal in JSON escapes but cannot be written to a file again.
    "".join(entries).encode("utf-8")
    return entries
