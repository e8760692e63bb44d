"""mergekit-evolve's genome: from the numbers that a search proposes to the recipe that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from merge_engine.checkpoint import locate, read_settings
from merge_engine.checkpoint.config_layers import COUNTS
from merge_engine.errors import RecipeError
from merge_engine.integrations.evolve.definition import Definition, read_definition
from merge_engine.integrations.vectors import read_vector, shape_text
from merge_engine.recipe import ModelReference, Recipe, load_recipe
from merge_engine.storage.bounded import MAX_CONFIG

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
"""The parameters that a genotype has numbers for, by method, in their order."""

_NORMALIZED = ("linear", "ties", "dare_ties")
"""Methods whose weights are divided by their sum unless the genome says otherwise."""


@dataclass(frozen=True)
class Genome:
    """A space that mergekit-evolve searches. ``Genome.of`` reads one; ``recipe`` makes the recipe of a genotype.

    ``layers`` is the number of layers of the models.

    A genotype has ``shape``: groups of layers, models, sets (one for each filter, and one for all other tensors),
    parameters (``PARAMETERS``). With slerp a model's number says how much it is wanted: of each group of layers the two
    models with the largest ones are merged, from the first towards the second, as far as the softmax of the two says.
    """

    definition: Definition
    layers: int

    @classmethod
    def of(cls, source: object, *, layers: int | None = None) -> Genome:
        """Read the map below ``genome`` in a configuration of mergekit-evolve, or the whole configuration.

        mergekit's own ``ModelGenomeDefinition`` is taken too. ``layers`` is the number of layers of the models, by
        default that in the config.json of the first one. Raises ``RecipeError`` with every problem, and
        ``CheckpointError`` if there is no such model.
        """
        definition = read_definition(source)
        count = _layers_of(definition.models[0]) if layers is None else layers
        step = definition.layer_granularity
        if count < 1 or (step > 0 and count % step):
            raise RecipeError(
                f"genome: layer_granularity: must divide {count}, the number of layers, not {step}"
            )
        return cls(definition, count)

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """The models that are merged, as the genome names them."""
        return self.definition.models

    @property
    def base_model(self) -> ModelReference | None:
        """The base model, if the genome names one."""
        return self.definition.base_model

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that a genotype has numbers for."""
        return PARAMETERS[self.definition.merge_method]

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a genotype: groups of layers, models, sets, parameters."""
        filters = self.definition.filters or ()
        return (self.layers // self._step, len(self.models), len(filters) + 1, len(self.parameters))

    @property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest numbers that are used as they are: two float64 tensors of ``shape``.

        Densities are from 0 to 1; weights have no upper bound, and a lower one, 0, unless they may be negative.
        mergekit refuses no numbers outside, nor does ``recipe``: signs are dropped, and a density above 1 is 1.
        """
        least = torch.full(self.shape, -torch.inf, dtype=torch.float64)
        most = torch.full(self.shape, torch.inf, dtype=torch.float64)
        for number, name in enumerate(self.parameters):
            if self._is_unsigned(name):
                least[..., number] = 0
            if name == "density":
                most[..., number] = 1
        return least, most

    def initial_genotype(self, random: bool = False) -> torch.Tensor:
        """Where mergekit-evolve begins: a float32 tensor of ``shape`` with equal weights that sum to 1, and density 1.

        ``random``: numbers from 0 to 1 by torch's random generator instead.
        """
        if random:
            return torch.rand(self.shape)
        genotype = torch.ones(self.shape)
        genotype[..., 0] = 1 / len(self.models)
        return genotype

    def recipe(self, genotype: object) -> Recipe:
        """The recipe that mergekit-evolve merges for a genotype.

        ``genotype`` is a tensor or an array of ``shape``, or flat in the same order; or a sequence of Python's numbers,
        which are float64. Numbers keep their precision. Raises ``RecipeError`` for another shape, and for NaN and
        infinity.
        """
        values = self._read(genotype)
        given = self.definition
        keys: dict[str, Any] = {
            "merge_method": given.merge_method,
            "base_model": given.base_model,
            "tokenizer_source": given.tokenizer_source,
            "dtype": "bfloat16",
        }
        if given.merge_method == "slerp":
            return load_recipe({**keys, "slices": self._arcs(values[:, :, 0, 0])})
        values = self._used(values)
        normalize = given.merge_method in _NORMALIZED if given.normalize is None else given.normalize
        keys["parameters"] = {"normalize": normalize}
        base = [] if self.base_model is None or self.base_model in self.models else [self.base_model]
        if given.smooth:
            models = [
                {"model": model, "parameters": self._settings(values[:, i])}
                for i, model in enumerate(self.models)
            ]
            return load_recipe({**keys, "models": [*models, *({"model": model} for model in base)]})
        slices = []
        for group in range(self.shape[0]):
            sources = [
                {**self._source(model, group), "parameters": self._settings(values[group : group + 1, i])}
                for i, model in enumerate(self.models)
            ]
            slices.append({"sources": [*sources, *(self._source(model, group) for model in base)]})
        return load_recipe({**keys, "slices": slices})

    @property
    def _step(self) -> int:
        """The number of layers in a group."""
        step = self.definition.layer_granularity
        return step if step > 0 else self.layers

    def _is_unsigned(self, name: str) -> bool:
        return name == "density" or (name == "weight" and not self.definition.allow_negative_weights)

    def _source(self, model: ModelReference, group: int) -> dict[str, Any]:
        return {"model": model, "layer_range": [group * self._step, (group + 1) * self._step]}

    def _read(self, genotype: object) -> torch.Tensor:
        """The numbers in their shape, on the CPU. Raises ``RecipeError``."""
        given = read_vector("genotype", genotype)
        if tuple(given.shape) not in (self.shape, (prod(self.shape),)):
            raise RecipeError(
                f"genotype: must have {prod(self.shape)} numbers, {shape_text(self.shape)} (groups of layers, models, "
                f"sets, parameters), not {shape_text(given.shape)}"
            )
        return given.reshape(self.shape)

    def _used(self, values: torch.Tensor) -> torch.Tensor:
        """The numbers within the bounds."""
        used = values.clone()
        for number, name in enumerate(self.parameters):
            if self._is_unsigned(name):
                used[..., number].abs_()
            if name == "density":
                used[..., number].clamp_(max=1)
        return used

    def _settings(self, values: torch.Tensor) -> dict[str, Any]:
        """The settings of one model for numbers [groups, sets, parameters]. Those of several groups are a gradient."""
        filters = self.definition.filters or ()
        settings: dict[str, Any] = {}
        for name, of_sets in zip(self.parameters, values.unbind(-1), strict=True):
            each = [_one_or_all(numbers.tolist()) for numbers in of_sets.unbind(-1)]
            *filtered, others = each
            settings[name] = others
            if filtered:
                entries = [{"filter": part, "value": it} for part, it in zip(filters, filtered, strict=True)]
                settings[name] = [*entries, {"value": others}]
        return settings

    def _arcs(self, values: torch.Tensor) -> list[dict[str, Any]]:
        """The slices of slerp for numbers [groups, models]."""
        slices = []
        for group, wanted in enumerate(values):
            largest = torch.topk(wanted, 2)  # of equal ones it takes those that mergekit's call takes
            pair = [self.models[i] for i in largest.indices.tolist()]
            slices.append(
                {
                    "sources": [self._source(model, group) for model in pair],
                    "base_model": pair[0],
                    "parameters": {"t": torch.softmax(largest.values, dim=-1)[1].item()},
                }
            )
        return slices


def _one_or_all(numbers: list[float]) -> float | list[float]:
    return numbers[0] if len(numbers) == 1 else numbers


def _layers_of(model: ModelReference) -> int:
    """The number of layers that a model's config.json states. Raises ``CheckpointError`` and ``RecipeError``."""
    place = locate(model.path, model.revision, weights=False)
    file = (place if place.is_dir() else place.parent) / "config.json"
    config = read_settings(file, MAX_CONFIG) or {}
    text = config.get("text_config")
    sections = [config, text if isinstance(text, dict) else {}]
    counts = [section[key] for section in sections for key in COUNTS if type(section.get(key)) is int]
    if not counts:
        raise RecipeError(f"genome: models[0]: {file} does not say how many layers there are; give layers")
    return int(counts[0])
