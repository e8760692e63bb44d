"""The flag ``tie_word_embeddings`` of a config, which says that the output head is the embedding.

A config of several modalities may hold it at the top, in the section of its language model, or at both. transformers
ties if one of them says so: versions before 5 stored it in the section, later ones at the top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_FLAG = "tie_word_embeddings"
_SECTIONS = (
    "text_config",
    "language_config",
    "llm_config",
    "thinker_config",
    "decoder",
    "decoder_config",
    "generator",
)
"""Where a config describes the language model in it."""


def tie_flag(config: Mapping[str, Any]) -> bool | None:
    """Whether the config ties the head to the embedding; None if it says nothing, as those of some tied models."""
    flags = [bool(section[_FLAG]) for section in _sections(config) if section.get(_FLAG) is not None]
    return any(flags) if flags else None


def set_tie_flags(config: dict[str, Any], untied: bool) -> None:
    """Make all flags of a config say the same: false if ``untied``, else what ``tie_flag`` says."""
    tied = False if untied else tie_flag(config)
    for section in _sections(config):
        if untied or section.get(_FLAG) is not None:
            section[_FLAG] = tied


def _sections(config: Mapping[str, Any]) -> Iterator[Any]:
    """The config and its sections for a language model."""
    yield config
    for name in _SECTIONS:
        if isinstance(config.get(name), dict):
            yield from _sections(config[name])
