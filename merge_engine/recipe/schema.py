"""The recipe: which models to merge, how, and with which settings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from merge_engine.dtypes import BY_NAME, MERGEABLE, DType
from merge_engine.recipe.chat_template import read_chat_template
from merge_engine.recipe.problems import InvalidValue
from merge_engine.recipe.reference import ModelReference
from merge_engine.recipe.rewriting import models_in, with_maps, with_models
from merge_engine.recipe.settings import ParameterSetting, read_setting
from merge_engine.recipe.stacks import Stacks, expand
from merge_engine.recipe.tensor_names import TensorNames
from merge_engine.recipe.tokenizer import TokenizerSettings, TokenSettings
from merge_engine.recipe.tolerance import without_ignored
from merge_engine.text import shown


def _empty_if_null(raw: object) -> object:
    return {} if raw is None else raw


def _read_dtype(raw: object) -> str:
    names = [dtype.name for dtype in MERGEABLE]
    name = raw.removeprefix("torch.") if isinstance(raw, str) else raw
    if not isinstance(name, str) or name not in names:
        raise InvalidValue(("", f"must be one of {', '.join(names)}, not {shown(raw)}"))
    return name


def _read_range(raw: object) -> object:
    if not isinstance(raw, list | tuple) or len(raw) != 2:
        raise InvalidValue(("", f"must be [first, end] with two numbers of layers, not {shown(raw)}"))
    return tuple(raw)


_Settings = Annotated[
    dict[str, Annotated[ParameterSetting, PlainValidator(read_setting)]],
    Field(max_length=100),
    BeforeValidator(_empty_if_null),
]
_DTypeName = Annotated[str, BeforeValidator(_read_dtype)]


_LayerRange = Annotated[
    tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], BeforeValidator(_read_range)
]

Misfit = Literal["architecture", "layers", "names", "quantization", "tokenizer"]
"""A kind of misfit between the inputs: it is refused unless the recipe allows it."""


class ModelEntry(BaseModel):
    """One model to merge, its own settings, and what becomes of its tensors' names."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    model: ModelReference
    parameters: _Settings = {}
    tensors: TensorNames = TensorNames()


class SourceEntry(BaseModel):
    """One model in a slice: ``layer_range`` has its first layer and the one after its last, from 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    model: ModelReference
    layer_range: _LayerRange | None = None
    parameters: _Settings = {}


class SliceEntry(BaseModel):
    """Layers of the output, one after the other, and the layers of the models that they are made of.

    ``residual_weight`` is a key of mergekit without a meaning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    sources: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    base_model: ModelReference | None = None
    parameters: _Settings = {}
    residual_weight: float | None = None


class ModuleEntry(BaseModel):
    """A part of a model, mostly with layers of its own, such as its text decoder: of whole models, or of slices."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)] | None = None
    slices: Annotated[tuple[SliceEntry, ...], Field(min_length=1)] | None = None
    parameters: _Settings = {}

    @model_validator(mode="after")
    def _one_of(self) -> ModuleEntry:
        _check_one_of(self, ("models", "slices"))
        return self


class Recipe(BaseModel):
    """A checked recipe. ``load_recipe`` makes one, and raises ``RecipeError`` for problems.

    ``merge_method``: the method's name. One of ``models`` (whole models, in order), ``slices`` (the output's layers,
    one slice after the other) and ``modules`` (parts of models by name); ``stacks`` is one form of all three.
    ``base_model``: the base of the task vectors. ``parameters``: settings for all models and tensors; a model's own
    settings come before them. ``name``: how other recipes of the same file refer to the output. ``tokenizer`` and
    ``chat_template``: those of the output; by default the donor's.

    ``dtype``: the type that inputs are rounded to before merging (None: promoted per tensor). ``out_dtype``: the
    type of the output (None: ``dtype``, else the promoted type). Both are one of bfloat16, float16,
    float32 and float64.

    Ours beside mergekit's keys: ``arithmetic`` is ``exact``, or ``mergekit`` to repeat its rounding;
    ``seed`` (0 to 2**64 - 1) makes the random methods repeatable; ``allow_nonfinite`` lets NaN and
    infinity in the inputs pass; ``unsafe_truncate_embeddings`` cuts embeddings and heads to the rows that all inputs
    have, as mergekit's option of this name does; ``allow`` names kinds of misfits that are merged although the result
    may mean nothing;
    ``tensors`` maps names of all inputs and leaves tensors out, after what a model's own key does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    merge_method: Annotated[str, Field(strict=True, min_length=1)]
    base_model: ModelReference | None = None
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)] | None = None
    slices: Annotated[tuple[SliceEntry, ...], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, ModuleEntry], Field(min_length=1)] | None = None
    parameters: _Settings = {}
    name: Annotated[str, Field(strict=True, min_length=1)] | None = None
    tokenizer: TokenizerSettings | None = None
    tokenizer_source: ModelReference | None = None
    chat_template: (
        Annotated[str, Field(strict=True, min_length=1), AfterValidator(read_chat_template)] | None
    ) = None
    dtype: _DTypeName | None = None
    out_dtype: _DTypeName | None = None
    arithmetic: Literal["exact", "mergekit"] = "exact"
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**64)] = 0
    unsafe_truncate_embeddings: Annotated[bool, Field(strict=True)] = False
    allow_nonfinite: Annotated[bool, Field(strict=True)] = False
    allow: tuple[Misfit, ...] = ()
    tensors: TensorNames = TensorNames()

    _remarks: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def read(cls, raw: object, *, lenient: bool = False, remarks: Iterable[str] = ()) -> Recipe:
        """A recipe from the keys and values in YAML. Keys that mergekit ignores are left out (see ``tolerance``).

        ``lenient`` leaves all others out that do not exist. ``remarks`` are warnings about the YAML. Raises
        ``ValidationError``.
        """
        said = list(remarks)
        while True:
            try:
                recipe = cls.model_validate(raw)
            except ValidationError as error:
                if not isinstance(raw, Mapping):
                    raise
                raw, warnings = without_ignored(raw, error, lenient, known_keys)
                if not warnings:
                    raise
                said += warnings
            else:
                recipe._remarks = tuple(said)
                return recipe

    @model_validator(mode="after")
    def _one_of(self) -> Recipe:
        _check_one_of(self, ("models", "slices", "modules"))
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise InvalidValue(("tokenizer_source", 'says the same as "tokenizer"; leave one of the two out'))
        return self

    @property
    def stacks(self) -> Stacks:
        """The recipe's models in one form, whatever form it has."""
        return expand(self)

    @property
    def references(self) -> tuple[ModelReference, ...]:
        """Every model that is merged, each once, the bases first."""
        stacks = self.stacks
        bases = [each.base for each in stacks.slices if each.base is not None]
        return tuple(dict.fromkeys([*bases, *stacks.models]))

    @property
    def named_models(self) -> tuple[ModelReference, ...]:
        """Every model that the recipe names in any place, each once: also those of tokens."""
        return tuple(dict.fromkeys(models_in(self)))

    def replacing(self, models: Mapping[ModelReference, ModelReference]) -> Recipe:
        """The recipe with other models in place of some, wherever it names them."""
        replaced = with_models(self, models)
        assert isinstance(replaced, Recipe)
        return replaced

    def without(self, settings: Mapping[str, Collection[str]]) -> Recipe:
        """The recipe without some settings: names of parameters by their place, such as ``models[0].parameters``."""
        stripped = with_maps(
            self, settings, lambda place, found: {k: v for k, v in found.items() if k not in settings[place]}
        )
        assert isinstance(stripped, Recipe)
        return stripped

    def setting(self, settings: Mapping[str, Mapping[str, ParameterSetting]]) -> Recipe:
        """The recipe with more settings: parameters by their place, such as ``models[0].parameters``."""
        more = with_maps(self, settings, lambda place, found: {**found, **settings[place]})
        assert isinstance(more, Recipe)
        return more

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """The vocabulary of the output, whichever of two keys says it; None if it is the donor's, without a look."""
        if self.tokenizer is None and self.tokenizer_source is not None:
            return TokenizerSettings(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def remarks(self) -> tuple[str, ...]:
        """Warnings about what was given and is ignored."""
        return self._remarks

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
        return _plain_keys(self)

    def to_yaml(self) -> str:
        """``to_plain`` as YAML."""
        return yaml.dump(
            self.to_plain(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")
        )


def known_keys(place: tuple[int | str, ...]) -> Collection[str]:
    """The keys that the map at a place of a recipe may have. ``place`` ends in one of them, known or not."""
    keys: type[BaseModel] = Recipe
    for step in place[:-1]:
        if step in _BELOW:
            keys = _BELOW[step]
    return keys.model_fields


_BELOW: dict[int | str, type[BaseModel]] = {
    "models": ModelEntry,
    "slices": SliceEntry,
    "sources": SourceEntry,
    "modules": ModuleEntry,
    "tensors": TensorNames,
    "tokenizer": TokenizerSettings,
    "tokens": TokenSettings,
}
"""What the maps below a key have for keys."""


def _check_one_of(entry: BaseModel, keys: tuple[str, ...]) -> None:
    """Raise ``InvalidValue`` unless exactly one of the keys is set."""
    given = [key for key in keys if getattr(entry, key) is not None]
    if not given:
        raise InvalidValue(("", f"needs one of the keys {', '.join(map(shown, keys))}"))
    if len(given) > 1:
        raise InvalidValue(("", f"takes only one of the keys {', '.join(map(shown, given))}"))


def _plain_keys(entry: BaseModel) -> dict[str, Any]:
    """The keys of a map that were given and say something, in order, as plain data."""
    plain: dict[str, Any] = {}
    for key in type(entry).model_fields:
        value = getattr(entry, key)
        if key in entry.model_fields_set and value is not None and value not in ({}, (), TensorNames()):
            plain[key] = _plain(value)
    return plain


def _plain(value: object) -> object:
    if isinstance(value, ModelReference | TensorNames | TokenizerSettings):
        return value.to_plain()
    if isinstance(value, BaseModel):
        return _plain_keys(value)
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value


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
