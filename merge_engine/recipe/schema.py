"""The recipe: which models to merge, how, and with which settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, PrivateAttr

from merge_engine.dtypes import BY_NAME, MERGEABLE, DType
from merge_engine.recipe.problems import InvalidValue
from merge_engine.recipe.reference import ModelReference
from merge_engine.recipe.settings import ParameterSetting, read_setting
from merge_engine.recipe.tensor_names import TensorNames
from merge_engine.text import shown


def _empty_if_null(raw: object) -> object:
    return {} if raw is None else raw


def _read_dtype(raw: object) -> str:
    names = [dtype.name for dtype in MERGEABLE]
    name = raw.removeprefix("torch.") if isinstance(raw, str) else raw
    if not isinstance(name, str) or name not in names:
        raise InvalidValue(("", f"must be one of {', '.join(names)}, not {shown(raw)}"))
    return name


_Settings = Annotated[
    dict[str, Annotated[ParameterSetting, PlainValidator(read_setting)]],
    Field(max_length=100),
    BeforeValidator(_empty_if_null),
]
_DTypeName = Annotated[str, BeforeValidator(_read_dtype)]


HARMLESS = ("int8_mask", "name")
"""Keys that published recipes have at the top level. No method's result depends on them, so they are ignored."""

_TOKENIZER = "tokenizer_source"

Misfit = Literal["architecture", "layers", "names", "quantization", "tokenizer"]
"""A kind of misfit between the inputs: it is refused unless the recipe allows it."""


class ModelEntry(BaseModel):
    """One model to merge, its own settings, and what becomes of its tensors' names."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    model: ModelReference
    parameters: _Settings = {}
    tensors: TensorNames = TensorNames()


class Recipe(BaseModel):
    """A checked recipe. ``load_recipe`` makes one, and raises ``RecipeError`` for problems.

    ``merge_method``: the method's name. ``models``: at least one, in order. ``base_model``: the base of the task
    vectors. ``parameters``: settings for all models and tensors; a model's own settings come before them.

    ``dtype``: the type that inputs are rounded to before merging (None: promoted per tensor). ``out_dtype``: the
    type of the output (None: ``dtype``, else the promoted type). Both are one of bfloat16, float16,
    float32 and float64.

    Ours beside mergekit's keys: ``arithmetic`` is ``exact``, or ``mergekit`` to repeat its rounding;
    ``seed`` (0 to 2**64 - 1) makes the random methods repeatable; ``allow_nonfinite`` lets NaN and
    infinity in the inputs pass; ``allow`` names kinds of misfits that are merged although the result may mean nothing;
    ``tensors`` maps names of all inputs and leaves tensors out, after what a model's own key does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    merge_method: Annotated[str, Field(strict=True, min_length=1)]
    base_model: ModelReference | None = None
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    parameters: _Settings = {}
    dtype: _DTypeName | None = None
    out_dtype: _DTypeName | None = None
    arithmetic: Literal["exact", "mergekit"] = "exact"
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**64)] = 0
    allow_nonfinite: Annotated[bool, Field(strict=True)] = False
    allow: tuple[Misfit, ...] = ()
    tensors: TensorNames = TensorNames()

    _ignored: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def read(cls, raw: object) -> Recipe:
        """A recipe from the keys and values in YAML. Raises ``ValidationError``."""
        if not isinstance(raw, dict):
            return cls.model_validate(raw)
        ignored = tuple(key for key in HARMLESS if key in raw)
        if raw.get(_TOKENIZER) == "base":  # which the output always gets
            ignored += (_TOKENIZER,)
        recipe = cls.model_validate({key: value for key, value in raw.items() if key not in ignored})
        recipe._ignored = ignored
        return recipe

    @property
    def ignored(self) -> tuple[str, ...]:
        """The keys that were given and have no effect."""
        return self._ignored

    @property
    def working_dtype(self) -> DType | None:
        """The type that inputs are rounded to; None if it is promoted tensor by tensor."""
        return None if self.dtype is None else BY_NAME[self.dtype]

    @property
    def output_dtype(self) -> DType | None:
        """The type of the output; None if each tensor has the working dtype of its inputs."""
        return self.working_dtype if self.out_dtype is None else BY_NAME[self.out_dtype]

    def to_plain(self) -> dict[str, Any]:
        """The recipe as plain data, with the keys that were given, always in the same order."""
        plain: dict[str, Any] = {}
        for key in type(self).model_fields:
            value = getattr(self, key)
            if key not in self.model_fields_set or value is None or value in ({}, (), TensorNames()):
                continue
            if isinstance(value, ModelReference | TensorNames):
                value = value.to_plain()
            elif key == "models":
                value = [_plain_entry(entry) for entry in self.models]
            elif isinstance(value, tuple):
                value = list(value)
            plain[key] = value
        return plain

    def to_yaml(self) -> str:
        """``to_plain`` as YAML."""
        return yaml.dump(
            self.to_plain(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")
        )


KNOWN_KEYS: dict[int, Iterable[str]] = {
    1: Recipe.model_fields,
    2: TensorNames.model_fields,
    3: ModelEntry.model_fields,
    4: TensorNames.model_fields,
}
"""The known keys by the length of their path: ``dtype`` has length 1, ``models[0].parameters`` 3."""


def _plain_entry(entry: ModelEntry) -> dict[str, Any]:
    plain: dict[str, Any] = {"model": entry.model.to_plain()}
    if entry.parameters:
        plain["parameters"] = entry.parameters
    if names := entry.tensors.to_plain():
        plain["tensors"] = names
    return plain


class _Dumper(yaml.SafeDumper):
    """Writes gradients on one line, and no anchors: repeated values are written in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: _Dumper, values: list[Any]) -> yaml.SequenceNode:
    scalars = not any(isinstance(value, dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=scalars)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Outside double quotes, PyYAML writes some line breaks (such as U+0085) but reads them as spaces.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)
