"""The recipe's key ``tokenizer``: the vocabulary of the output, and where its rows of the embeddings come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from merge_engine.recipe.problems import InvalidValue, unknown_key
from merge_engine.recipe.reference import ModelReference
from merge_engine.text import shown

UNION, BASE = ModelReference(path="union"), ModelReference(path="base")
"""Words in place of a model: the tokens of all models, and those of the base model."""

Origin = Literal["mean", "zero", "models"]


class ModelToken(BaseModel):
    """The row of a token in a model, which is named by its text or by its id."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    model: ModelReference
    token: str | None = None
    token_id: int | None = None

    def to_plain(self) -> dict[str, object]:
        """The row as in a recipe."""
        which = {"token": self.token} if self.token is not None else {"token_id": self.token_id}
        return {"kind": "model_token", "model": self.model.to_plain(), **which}


class ZeroRow(BaseModel):
    """A row of zeros."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    def to_plain(self) -> dict[str, object]:
        """The row as in a recipe."""
        return {"kind": "zero"}


def _read_source(raw: object) -> object:
    if isinstance(raw, ModelToken | ZeroRow) or raw is None:
        return raw
    if not isinstance(raw, Mapping) or "kind" not in raw:
        return _read_model(raw, "")
    kind, rest = raw["kind"], {key: value for key, value in raw.items() if key != "kind"}
    if kind not in ("model_token", "zero"):
        raise InvalidValue((".kind", f"must be model_token or zero, not {shown(kind)}"))
    known = ("model", "token", "token_id") if kind == "model_token" else ()
    if unknown := [(f".{key}", unknown_key(str(key), str(key), known)) for key in rest if key not in known]:
        raise InvalidValue(*unknown)
    return ZeroRow() if kind == "zero" else _read_model_token(rest)


def _read_model_token(raw: Mapping[str, Any]) -> ModelToken:
    token, number = raw.get("token"), raw.get("token_id")
    problems = []
    if "model" not in raw:
        problems.append((".model", "missing, but required"))
    if (token is None) == (number is None):
        problems.append(("", "needs one of the keys token and token_id"))
    elif number is None and not isinstance(token, str):
        problems.append((".token", f"must be text, not {shown(token)}; put it in quotes"))
    elif token is None and (type(number) is not int or number < 0):
        problems.append((".token_id", f"must be a whole number from 0 on, not {shown(number)}"))
    if problems:
        raise InvalidValue(*problems)
    return ModelToken(model=_read_model(raw["model"], ".model"), token=token, token_id=number)


def _read_model(raw: object, below: str) -> ModelReference:
    try:
        return ModelReference.model_validate(raw)
    except ValidationError as error:
        causes = (detail["ctx"]["error"] for detail in error.errors() if "ctx" in detail)
        problems = [each for cause in causes if isinstance(cause, InvalidValue) for each in cause.problems]
        raise InvalidValue(*((below + place, message) for place, message in problems)) from None


class TokenSettings(BaseModel):
    """Where the row of a token comes from: for the models that lack it, with ``force`` for all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    source: Annotated[ModelReference | ModelToken | ZeroRow | None, BeforeValidator(_read_source)] = None
    force: Annotated[bool, Field(strict=True)] = False

    def to_plain(self) -> dict[str, object]:
        """The keys that are set, as in a recipe."""
        plain: dict[str, object] = {} if self.source is None else {"source": self.source.to_plain()}
        return plain | ({"force": True} if self.force else {})


class TokenizerSettings(BaseModel):
    """The output's vocabulary: ``union``, ``base``, or that of a model.

    ``tokens`` has sources for single tokens; those that the vocabulary lacks are added. ``pad_to_multiple_of`` rounds
    the number of rows up. ``origin`` is the base model's row of a token that several models have and the base lacks:
    the ``mean`` of its own rows, a row of ``zero``, or the mean of the ``models``, which they all get.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    source: ModelReference = UNION
    tokens: (
        Annotated[
            dict[Annotated[str, StringConstraints(min_length=1)], TokenSettings], Field(max_length=10_000)
        ]
        | None
    ) = None
    pad_to_multiple_of: Annotated[int, Field(strict=True, ge=1, le=1 << 20)] | None = None
    origin: Origin | None = None

    def to_plain(self) -> dict[str, object]:
        """The keys that are set, as in a recipe."""
        plain: dict[str, object] = {}
        if "source" in self.model_fields_set:
            plain["source"] = self.source.to_plain()
        if self.tokens:
            plain["tokens"] = {token: each.to_plain() for token, each in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            plain["pad_to_multiple_of"] = self.pad_to_multiple_of
        if self.origin is not None:
            plain["origin"] = self.origin
        return plain
