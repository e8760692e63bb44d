"""References to models: a local folder or a hub id, optionally with a revision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from merge_engine.recipe.problems import InvalidValue, unknown_key
from merge_engine.text import shown

_LORA = "merging a LoRA is not supported yet; first merge it into its model and name the result"


class ModelReference(BaseModel):
    """A model's folder or hub id, and the hub revision (branch, tag or commit) if one is given.

    It is read from ``path``, ``path@revision``, ``{model: {path, revision}}``, ``{path, revision}`` or a
    ``pathlib.Path``. An existing file or folder is used even if its name holds ``@`` or ``+``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    def to_plain(self) -> str | dict[str, dict[str, str]]:
        """The reference as in a recipe: text, or a map if text would be ambiguous."""
        if not {"@", "+"} & set(self.path):
            return str(self)
        fields = {"path": self.path} | ({} if self.revision is None else {"revision": self.revision})
        return {"model": fields}

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
    if "+" in text and not _exists(text):
        raise InvalidValue(("", f'{shown(text)} names a LoRA after "+"; {_LORA}'))
    return _split_revision(text, "")


def _split_revision(text: str, below: str) -> dict[str, Any]:
    if "@" not in text or _exists(text):
        return {"path": text}
    path, _, revision = text.partition("@")
    if not path or not revision or "@" in revision:
        raise InvalidValue((below, f'must be "path" or "path@revision", not {shown(text)}'))
    return {"path": path, "revision": revision}


def _from_map(raw: Mapping[Any, Any]) -> dict[str, Any]:
    """The fields of ``{model: ...}`` or ``{path, ...}``. Raises ``InvalidValue`` for other keys, such as ``lora``."""
    if "path" in raw:
        return _fields(raw, "")
    problems = []
    for key, value in raw.items():
        if key == "lora" and value is not None:
            problems.append((".lora", _LORA))
        elif key not in ("model", "lora") and value is not None:
            problems.append(("", unknown_key(str(key), str(key), ("model", "path", "revision"))))
    fields: dict[str, Any] = {}
    inner = raw.get("model")
    try:
        if isinstance(inner, Mapping):
            fields = _fields(inner, ".model")
        elif isinstance(inner, str) and inner:
            fields = _split_revision(inner, ".model")
        else:
            problems.append((".model", f"must be a folder or a hub id, not {shown(inner)}"))
    except InvalidValue as error:
        problems += error.problems
    if problems:
        raise InvalidValue(*problems)
    return fields


def _fields(raw: Mapping[Any, Any], below: str) -> dict[str, Any]:
    known = ("path", "revision")
    problems = [(below, unknown_key(str(key), str(key), known)) for key in raw if key not in known]
    path, revision = raw.get("path"), raw.get("revision")
    if not isinstance(path, str) or not path:
        problems.append((f"{below}.path", f"must be a folder or a hub id, not {shown(path)}"))
    if revision is not None and (not isinstance(revision, str) or not revision):
        problems.append((f"{below}.revision", f"must be text, not {shown(revision)}; put it in quotes"))
    if problems:
        raise InvalidValue(*problems)
    return {"path": path, "revision": revision}


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
