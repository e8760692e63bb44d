"""mergenetic's vectors and mergers, merged by this engine. mergenetic need not be installed for the first.

``Form`` makes the recipe that one of mergenetic 0.1.1's mergers makes of a vector. All six are covered: LinearMerger,
SlerpMerger, TaskArithmeticMerger, TiesMerger, TiesDareMerger and DareTaskArithmeticMerger. ``SessionMerger`` stands in
for any merger in mergenetic's problem classes, also one of your own, and merges through a session.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.errors import OptionError, RecipeError
from merge_engine.integrations.vectors import read_vector, shape_text
from merge_engine.recipe import Recipe, load_recipe
from merge_engine.text import did_you_mean, shown

if TYPE_CHECKING:
    from merge_engine.session import Session

_SLERP = "SlerpMerger"
_METHODS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "LinearMerger": ("linear", ("weight",)),
    "TaskArithmeticMerger": ("task_arithmetic", ("weight",)),
    "DareTaskArithmeticMerger": ("dare_linear", ("weight",)),
    "TiesMerger": ("ties", ("weight", "density")),
    "TiesDareMerger": ("dare_ties", ("weight", "density")),
    _SLERP: ("slerp", ("t",)),
}
"""The method of each merger, and the parameters that its vectors have numbers for."""

_GRADIENT = 5
"""The numbers of a gradient over the layers. A vector of SlerpMerger has one for attention, one for MLPs, and a number
for all other tensors."""


@dataclass(frozen=True)
class Form:
    """What one of mergenetic's mergers makes of a vector.

    ``merger`` is the name of its class, ``models`` are those that it merges, ``base_model`` its base (LinearMerger
    has none), ``dtype`` that of the merge, such as ``bfloat16``. SlerpMerger has ``layer_ranges``, one of the base and
    one of the model, each the first layer and the one after the last; without them all layers are merged. Raises
    ``OptionError`` for what does not go together.
    """

    merger: str
    models: Sequence[str | Path]
    base_model: str | Path | None = None
    dtype: str | None = None
    layer_ranges: tuple[Sequence[int], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if self.merger not in _METHODS:
            near = did_you_mean(str(self.merger), _METHODS) or f"; known are {', '.join(_METHODS)}"
            raise OptionError(f"merger: mergenetic has no {shown(self.merger)}{near}")
        problems = []
        if isinstance(self.models, str | Path) or not self.models:
            problems.append(f"models: must be a list of models, not {shown(self.models)}")
        elif self.merger == _SLERP and len(self.models) != 1:
            problems.append(f"models: {_SLERP} merges one model with its base, not {len(self.models)}")
        if self.merger == "LinearMerger" and self.base_model is not None:
            problems.append("base_model: LinearMerger merges no base; leave it out, or list it in models")
        if self.merger != "LinearMerger" and self.base_model is None:
            problems.append(f"base_model: missing, but {self.merger} needs one")
        if self.merger != _SLERP and self.layer_ranges is not None:
            problems.append(f"layer_ranges: only {_SLERP} has them; leave them out")
        if problems:
            raise OptionError(problems)

    @property
    def variables(self) -> int:
        """The length of a vector, ``n_var`` of mergenetic's problems.

        Vectors have the numbers of the first parameter for each model, then those of the second.
        """
        if self.merger == _SLERP:
            return 2 * _GRADIENT + 1
        _, parameters = _METHODS[self.merger]
        return len(self.models) * len(parameters)

    def recipe(self, vector: object) -> Recipe:
        """The recipe that the merger makes of a vector of ``variables`` numbers.

        A row of the results that mergenetic writes has them as ``genotype_1``, ``genotype_2``, ... Raises
        ``RecipeError`` for another number of numbers, and for NaN and infinity.
        """
        read = read_vector("vector", vector)
        if tuple(read.shape) != (self.variables,):
            raise RecipeError(
                f"vector: must have {self.variables} numbers for {self.merger}, not {shape_text(read.shape)}"
            )
        numbers = read.tolist()
        method, parameters = _METHODS[self.merger]
        keys: dict[str, Any] = {"merge_method": method, "base_model": self.base_model, "dtype": self.dtype}
        base = [] if self.base_model is None else [{"model": self.base_model}]
        if self.merger == _SLERP:
            [model] = self.models
            keys["parameters"] = {
                "t": [
                    {"filter": "self_attn", "value": numbers[:_GRADIENT]},
                    {"filter": "mlp", "value": numbers[_GRADIENT:-1]},
                    {"value": numbers[-1]},
                ]
            }
            sources = [*base, {"model": model}]
            if self.layer_ranges is None:
                return load_recipe({**keys, "models": sources})
            ranged = [
                {**source, "layer_range": list(layers)}
                for source, layers in zip(sources, self.layer_ranges, strict=True)
            ]
            return load_recipe({**keys, "slices": [{"sources": ranged}]})
        count = len(self.models)
        models = [
            {"model": model, "parameters": dict(zip(parameters, numbers[i::count], strict=True))}
            for i, model in enumerate(self.models)
        ]
        return load_recipe({**keys, "models": [*base, *models]})


class SessionMerger:
    """One of mergenetic's mergers, or your own, whose merges go through a session. A problem takes it as ``merger``.

    The merger makes the configuration of a vector, as ever. ``merge_model_from_configuration`` merges it, and writes
    the checkpoint where the merger would, for the problem to load.
    """

    def __init__(self, merger: Any, session: Session):
        self.merger = merger
        self.session = session

    def create_individual_configuration(self, vector: Any) -> Path:
        """The file with the merger's configuration for a vector."""
        return Path(self.merger.create_individual_configuration(vector))

    def merge_model_from_configuration(self, path_to_yaml: str | Path) -> Path:
        """The folder of the merged model; an earlier one in it is replaced. Raises ``MergeError``."""
        folder = Path(self.merger.path_to_store_merged_model)
        self.session.merge(load_recipe(Path(path_to_yaml))).save(folder, overwrite=True)
        return folder
