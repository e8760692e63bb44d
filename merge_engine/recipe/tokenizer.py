"""The recipe's key ``tokenizer``: the vocabulary of the output, and where its rows of the embeddings come from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from merge_engine.recipe.reference import ModelReference


class TokenizerSettings(BaseModel):
    """The output's vocabulary: ``union``, ``base``, or that of a model.

    ``tokens`` has sources for single tokens. ``pad_to_multiple_of`` rounds the number of rows up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    source: ModelReference = ModelReference(path="union")
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None

    def to_plain(self) -> dict[str, object]:
        """The keys that are set, as in a recipe."""
        plain = {key: getattr(self, key) for key in type(self).model_fields if key in self.model_fields_set}
        return plain | ({"source": self.source.to_plain()} if "source" in plain else {})
