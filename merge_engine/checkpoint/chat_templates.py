"""Where a model keeps its chat templates, as transformers reads and writes them.

The first of these files that has one counts: ``chat_template.jinja``; ``chat_template.json``, of older processors;
``tokenizer_config.json``, as text or as several templates by name. Of several, the one named ``default`` is used
unless the caller asks for another. Beside chat_template.jinja, the others are in ``additional_chat_templates``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from merge_engine.checkpoint.config import encode_config

JINJA = "chat_template.jinja"
PROCESSOR = "chat_template.json"
TOKENIZER = "tokenizer_config.json"
OTHERS = "additional_chat_templates/"
_KEY = "chat_template"


class SmallFiles(Protocol):
    """Small files of a model by name; None for one that is not there, or cannot be used."""

    def read(self, name: str) -> bytes | None:
        """The bytes of a file."""

    def settings(self, name: str) -> Mapping[str, Any] | None:
        """The JSON object in a file."""


class Template(NamedTuple):
    """The template that is used, and its file. ``text`` is None if there are only ``others``, by name."""

    text: str | None
    file: str
    others: Mapping[str, Any]


def find_template(files: SmallFiles) -> Template | None:
    """The chat template of a model, without white space around it; None if it has none."""
    raw = files.read(JINJA)
    if raw is not None:
        return Template(raw.decode("utf-8", "replace").strip(), JINJA, {})
    for file in (PROCESSOR, TOKENIZER):
        given = by_name((files.settings(file) or {}).get(_KEY))
        if given:
            text = given.pop("default", None)
            return Template(text.strip() if isinstance(text, str) else None, file, given)
    return None


def by_name(given: object) -> dict[str, Any]:
    """The templates in a value of a JSON file: text, a map, or a list of ``{name, template}``."""
    if isinstance(given, dict):
        return dict(given)
    if isinstance(given, list):
        return {str(one.get("name")): one.get("template") for one in given if isinstance(one, dict)}
    return {"default": given} if isinstance(given, str) and given else {}


def with_template(files: SmallFiles, text: str) -> dict[str, bytes]:
    """The files that a model needs so that ``text`` is its only template, by name.

    The text is written wherever the model keeps one; if nowhere, into tokenizer_config.json, which all versions of
    transformers read, or without that into chat_template.jinja. Files in ``additional_chat_templates`` are not
    looked at.
    """
    written = {}
    if files.read(JINJA) is not None:
        written[JINJA] = text.encode()
    settings = {file: found for file in (PROCESSOR, TOKENIZER) if (found := files.settings(file)) is not None}
    for file, found in settings.items():
        if _KEY in found or (file == TOKENIZER and not written):
            written[file] = encode_config({**found, _KEY: text})
    return written or {JINJA: text.encode()}
