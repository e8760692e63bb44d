"""The one form of every recipe: modules, of slices, of sources.

``models``, ``slices`` and ``modules`` say the same thing in three ways. A recipe with ``models`` is one module of one
slice that has all layers. What follows (parameters, planning) knows this form only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merge_engine.recipe.reference import ModelReference
from merge_engine.recipe.settings import ParameterSetting
from merge_engine.recipe.tensor_names import TensorNames

if TYPE_CHECKING:
    from merge_engine.recipe.schema import ModelEntry, ModuleEntry, Recipe, SliceEntry


@dataclass(frozen=True)
class Scope:
    """The settings at one place of a recipe, such as ``slices[0].parameters``."""

    place: str
    settings: Mapping[str, ParameterSetting]


@dataclass(frozen=True)
class Source:
    """One model of a slice.

    ``position`` is its number among the models of the recipe, from 0 (see ``Stacks``). ``layers`` are those of its
    layers that are used; None for all.
    """

    position: int
    model: ModelReference
    settings: Scope
    layers: range | None = None
    tensors: TensorNames = field(default_factory=TensorNames)


@dataclass(frozen=True)
class Slice:
    """Layers of the output that are made of the same models.

    ``scopes`` are the settings for all of its sources, the nearest first: its own, those of its module, those of the
    recipe.
    """

    place: str
    sources: tuple[Source, ...]
    base: ModelReference | None
    scopes: tuple[Scope, ...]


@dataclass(frozen=True)
class Module:
    """A part of the model with layers of its own, in slices, one after the other. Without a name it is all of it."""

    name: str | None
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Stacks:
    """The modules of a recipe.

    ``models`` has the model at each position. Two sources have the same position if they name the same model, and the
    same number of sources before them in their slice name it. So a position stands for one model in all slices, and a
    model that stands twice in a slice has two positions.
    """

    modules: tuple[Module, ...]
    models: tuple[ModelReference, ...]

    @property
    def slices(self) -> Iterator[Slice]:
        """All slices of all modules, in order."""
        return (each for module in self.modules for each in module.slices)

    @property
    def bases(self) -> Mapping[str, ModelReference]:
        """The base models of the slices by role: "base" for the first, "base 1" for the second, and so on."""
        named = dict.fromkeys(each.base for each in self.slices if each.base is not None)
        return {f"base {i}" if i else "base": base for i, base in enumerate(named)}

    def label(self, position: int) -> str:
        """The model at a position for messages, with its place if the recipe is a list of models."""
        first = self.modules[0].slices[0]
        model = str(self.models[position])
        return f"models[{position}] ({model})" if first.place == "models" else model

    @property
    def scopes(self) -> Iterator[Scope]:
        """The settings at every place of the recipe, each once: those of all models first, then of each source."""
        common = {scope.place: scope for each in self.slices for scope in each.scopes}
        yield from common.values()
        for each in self.slices:
            yield from (source.settings for source in each.sources)


def expand(recipe: Recipe) -> Stacks:
    """The form of a recipe, from any of its three ways to name models."""
    expander = _Expander(recipe)
    if recipe.modules is None:
        modules = [Module(None, expander.slices("", recipe, ()))]
    else:
        modules = [
            Module(name, expander.slices(f"modules.{name}.", entry, _own(f"modules.{name}", entry)))
            for name, entry in recipe.modules.items()
        ]
    return Stacks(tuple(modules), tuple(expander.models))


class _Expander:
    def __init__(self, recipe: Recipe):
        self._base = recipe.base_model
        self._scope = Scope("parameters", recipe.parameters)
        self._numbers: dict[tuple[ModelReference, int], int] = {}
        self.models: list[ModelReference] = []

    def slices(self, below: str, entry: Recipe | ModuleEntry, scopes: tuple[Scope, ...]) -> tuple[Slice, ...]:
        """The slices of a module. ``below`` is its place, and ``scopes`` are its own settings."""
        outer = (*scopes, self._scope)
        if entry.slices is None:
            models = entry.models or ()
            return (Slice(f"{below}models", self._models(below, models), self._base, outer),)
        return tuple(
            Slice(
                place, self._sources(place, each), each.base_model or self._base, (*_own(place, each), *outer)
            )
            for place, each in ((f"{below}slices[{i}]", each) for i, each in enumerate(entry.slices))
        )

    def _models(self, below: str, entries: Sequence[ModelEntry]) -> tuple[Source, ...]:
        positions = self._positions([entry.model for entry in entries])
        return tuple(
            Source(
                position,
                entry.model,
                Scope(f"{below}models[{i}].parameters", entry.parameters),
                tensors=entry.tensors,
            )
            for i, (position, entry) in enumerate(zip(positions, entries, strict=True))
        )

    def _sources(self, place: str, entry: SliceEntry) -> tuple[Source, ...]:
        positions = self._positions([source.model for source in entry.sources])
        return tuple(
            Source(
                position,
                source.model,
                Scope(f"{place}.sources[{i}].parameters", source.parameters),
                None if source.layer_range is None else range(*source.layer_range),
            )
            for i, (position, source) in enumerate(zip(positions, entry.sources, strict=True))
        )

    def _positions(self, models: Sequence[ModelReference]) -> list[int]:
        positions = []
        for i, model in enumerate(models):
            key = model, models[:i].count(model)
            if key not in self._numbers:
                self._numbers[key] = len(self.models)
                self.models.append(model)
            positions.append(self._numbers[key])
        return positions


def _own(place: str, entry: ModuleEntry | SliceEntry) -> tuple[Scope, ...]:
    return (Scope(f"{place}.parameters", entry.parameters),) if entry.parameters else ()
