"""What the settings of a model say of its vocabulary: its size, and the ids of special tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_SIZES = ("vocab_size", "padded_vocab_size")
_LANGUAGE = ("text_config", "language_config", "llm_config", "decoder")
_IDS = re.compile(
    r"(.*_)?(token_ids?|tokens_ids?|token_index|token_indices)|(begin_)?suppress_tokens|bad_words_ids|"
    r"force_words_ids|forced_decoder_ids"
)
_TOKEN = re.compile(r"(bos|eos|pad|unk|sep|cls|mask)_token_id")


def stated_size(config: Mapping[str, Any]) -> int | None:
    """The number of rows of the embedding as a config.json says it, at the top or in its language model."""
    for section in (config, *(config.get(name) for name in _LANGUAGE)):
        if isinstance(section, Mapping) and type(section.get("vocab_size")) is int:
            return int(section["vocab_size"])
    return None


def with_size(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A config.json whose language model has so many rows, in all sections that said another number for it."""
    said = stated_size(config)
    if said is None:
        return {**config, "vocab_size": rows}

    def change(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: rows if key in _SIZES and type(inner) is int and inner == said else change(inner)
            for key, inner in value.items()
        }

    changed: dict[str, Any] = change(config)
    return changed


def with_ids(
    settings: Mapping[str, Any],
    new_id: Callable[[int], int | None],
    fallback: Mapping[str, Any],
    lost: dict[str, Any],
) -> dict[str, Any]:
    """Settings with the new ids of tokens, under all keys whose names say that they are ids.

    ``new_id`` gives None for a token that the output lacks. Its key then has the value of ``fallback``, which has the
    output's own ids; without one null, and the key comes to ``lost``. In lists such a token is left out.
    """

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [new for each in value if (new := change(each)) is not None] or ([] if not value else None)
        return new_id(value) if type(value) is int and value >= 0 else value

    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found[key] = with_ids(value, new_id, fallback, lost)
        elif value is not None and _IDS.fullmatch(key):
            new = change(value)
            if new is None and (new := fallback.get(key)) is None:
                lost[key] = value
            found[key] = new
        else:
            found[key] = value
    return found


def named_tokens(tokenizer_config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """The ids of the special tokens that a tokenizer_config.json names, as ``eos_token_id`` and the like."""
    found = {}
    for key, token in tokenizer_config.items():
        content = token.get("content") if isinstance(token, Mapping) else token
        if _TOKEN.fullmatch(f"{key}_id") and isinstance(content, str) and content in ids:
            found[f"{key}_id"] = ids[content]
    return found
