"""References to models: a local folder or a hub id, with a revision and a LoRA adapter if they are given."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from merge_engine.recipe.problems import InvalidValue, unknown_key
from merge_engine.text import shown


class ModelReference(BaseModel):
    """A model's folder or hub id, the hub revision (branch, tag or commit), and the LoRA adapter that is put into it.

    It is read from ``path``, ``path@revision``, ``path+lora``, ``path@revision+lora@revision``,
    ``{model: {path, revision}, lora: {path, revision}}``, ``{path, revision}`` or a ``pathlib.Path``. An existing file
    or folder is used even if its name holds ``@`` or ``+``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    revision: str | None = None
    lora: ModelReference | None = None

    def __str__(self) -> str:
        model = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return model if self.lora is None else f"{model}+{self.lora}"

    def to_plain(self) -> str | dict[str, dict[str, str]]:
        """The reference as in a recipe: text, or a map if text would be ambiguous."""
        paths = self.path if self.lora is None else self.path + self.lora.path
        if not {"@", "+"} & set(paths) and (self.lora is None or not _exists(str(self))):
            return str(self)
        return {"model": self._fields()} | ({} if self.lora is None else {"lora": self.lora._fields()})

    def _fields(self) -> dict[str, str]:
        return {"path": self.path} | ({} if self.revision is None else {"revision": self.revision})

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: object) -> object:
        if isinstance(raw, ModelReference):
            return raw
        if isinstance(raw, os.PathLike):
            return {"path": os.fspath(raw)}
        if isinstance(raw, Mapping):
            return _from_map(raw)
        if isinstance(raw, str) and raw:
            return _from_text(raw)
        raise InvalidValue(("", f"must be a folder or a hub id, not {shown(raw)}"))


def _from_text(text: str) -> dict[str, Any]:
    """The fields of ``model`` or ``model+lora``, each with a revision if it has one. Raises ``InvalidValue``."""
    if "+" not in text or _exists(text):
        return _split_revision(text, "")
    found = list(_pairs(text))
    if len(found) != 1:
        raise InvalidValue(
            (
                "",
                f'must have one "+" between a model and its LoRA, not {shown(text)}; if a name holds "+", write '
                "{model: {path: ...}, lora: {path: ...}}",
            )
        )
    model, lora = found[0]
    if not model or not lora:
        raise InvalidValue(("", f'must be "model+lora", not {shown(text)}'))
    return {**_split_revision(model, ""), "lora": _split_revision(lora, "")}


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """The ways to read a text as a model and its LoRA: a name with another ``+`` in it must exist."""
    places = [at for at, character in enumerate(text[:_LONGEST]) if character == "+"]
    for at in places:
        pair = text[:at], text[at + 1 :]
        if all("+" not in one or _exists(one) for one in pair):
            yield pair


_LONGEST = 10_000
"""Characters of a text that are looked at: two names of files have fewer."""


def _split_revision(text: str, below: str) -> dict[str, Any]:
    if "@" not in text or _exists(text):
        return {"path": text}
    path, _, revision = text.partition("@")
    if not path or not revision or "@" in revision:
        raise InvalidValue((below, f'must be "path" or "path@revision", not {shown(text)}'))
    return {"path": path, "revision": revision}


def _from_map(raw: Mapping[Any, Any]) -> dict[str, Any]:
    """The fields of ``{model: ..., lora: ...}`` or ``{path, ...}``. Raises ``InvalidValue`` for other keys."""
    if "path" in raw:
        return _fields(raw, "")
    problems = [
        ("", unknown_key(str(key), str(key), ("model", "lora", "path", "revision")))
        for key, value in raw.items()
        if key not in ("model", "lora") and value is not None
    ]
    fields: dict[str, Any] = {}
    for key in ("model", "lora") if raw.get("lora") is not None else ("model",):
        try:
            fields |= {key: _one(raw.get(key), f".{key}")}
        except InvalidValue as error:
            problems += error.problems
    if problems:
        raise InvalidValue(*problems)
    lora = {"lora": fields["lora"]} if "lora" in fields else {}
    return {**fields["model"], **lora}


def _one(raw: object, below: str) -> dict[str, Any]:
    """The fields of a model or a LoRA: ``{path, revision}``, ``path`` or ``path@revision``."""
    if isinstance(raw, Mapping):
        return _fields(raw, below)
    if isinstance(raw, str) and raw:
        return _split_revision(raw, below)
    raise InvalidValue((below, f"must be a folder or a hub id, not {shown(raw)}"))


def _fields(raw: Mapping[Any, Any], below: str) -> dict[str, Any]:
    known = ("path", "revision") if below else ("path", "revision", "lora")
    problems = [(below, unknown_key(str(key), str(key), known)) for key in raw if key not in known]
    path, revision, lora = raw.get("path"), raw.get("revision"), raw.get("lora")
    if not isinstance(path, str) or not path:
        problems.append((f"{below}.path", f"must be a folder or a hub id, not {shown(path)}"))
    if revision is not None and (not isinstance(revision, str) or not revision):
        problems.append((f"{below}.revision", f"must be text, not {shown(revision)}; put it in quotes"))
    if isinstance(lora, ModelReference) and lora.lora is not None:
        problems.append((f"{below}.lora", "a LoRA has no LoRA of its own"))
    if problems:
        raise InvalidValue(*problems)
    fields: dict[str, Any] = {"path": path, "revision": revision}
    if lora is not None and not below:
        fields["lora"] = lora if isinstance(lora, ModelReference) else _one(lora, f"{below}.lora")
    return fields


def _exists(text: str) -> bool:
    """Whether this names a file or folder here, also a broken link: what is wrong with it is said when it is opened."""
    try:
        path = Path(text).expanduser()
        return path.exists() or path.is_symlink()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # too long for a file name, with a NUL in it, ~ without a home
        return False
