"""The contestants: commands that merge the same checkpoints by the same recipe."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_engine.bench.checkpoints import weight_bytes, weight_files
from merge_engine.bench.measuring import ContestantError
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE

COPY, MERGE_ENGINE, TORCH, MERGEKIT = CONTESTANTS = ("copy", "merge_engine", "torch", "mergekit")


@dataclass(frozen=True)
class Setting:
    """The parameters of a method: those of each model, those of the merge, whether it takes a base, and most models."""

    model: dict[str, float]
    merge: dict[str, bool | float]
    uses_base: bool = True
    most_models: int | None = None


_NORMALIZE: dict[str, bool | float] = {"normalize": True}
METHODS = {
    "linear": Setting({"weight": 0.5}, _NORMALIZE, uses_base=False),
    "passthrough": Setting({}, {}, uses_base=False),
    "task_arithmetic": Setting({"weight": 0.5}, _NORMALIZE),
    "ties": Setting({"weight": 0.5, "density": 0.2}, _NORMALIZE),
    "dare_linear": Setting({"weight": 0.5, "density": 0.2}, _NORMALIZE),
    "dare_ties": Setting({"weight": 0.5, "density": 0.2}, _NORMALIZE),
    "breadcrumbs": Setting({"weight": 0.5, "density": 0.2, "gamma": 0.01}, _NORMALIZE),
    "breadcrumbs_ties": Setting({"weight": 0.5, "density": 0.2, "gamma": 0.01}, _NORMALIZE),
    "della": Setting({"weight": 0.5, "density": 0.2, "epsilon": 0.1}, _NORMALIZE),
    "della_linear": Setting({"weight": 0.5, "density": 0.2, "epsilon": 0.1}, _NORMALIZE),
    "slerp": Setting({}, {"t": 0.5}, most_models=1),
    "nuslerp": Setting({"weight": 0.5}, {}, uses_base=False, most_models=2),
    "multislerp": Setting({"weight": 0.5}, {}),
    "karcher": Setting({}, {}, uses_base=False),
    "model_stock": Setting({}, {}),
    "nearswap": Setting({}, {"t": 0.001}, most_models=1),
    "ram": Setting({}, {}),
    "ramplus_tl": Setting({}, {}),
    "sce": Setting({}, {"select_topk": 0.2}),
    "arcee_fusion": Setting({}, {}, most_models=1),
}


@dataclass(frozen=True)
class Merge:
    """One merge to be timed: the method, the folders of the base and the models, and a density of its own."""

    method: str
    base: Path
    models: tuple[Path, ...]
    density: float | None = None

    @property
    def folders(self) -> list[Path]:
        """Every folder that the method reads."""
        return [self.base, *self.merged] if METHODS[self.method].uses_base else list(self.merged)

    @property
    def merged(self) -> tuple[Path, ...]:
        """The models that the method takes, the first of all."""
        return self.models[: METHODS[self.method].most_models]

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs, each model counted once."""
        return sum(weight_bytes(folder) for folder in self.folders)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output."""
        return weight_bytes(self.base)

    @property
    def of_model(self) -> dict[str, float]:
        """The parameters of each model."""
        setting = METHODS[self.method].model
        return setting if self.density is None else {**setting, "density": self.density}

    def recipe(self) -> dict[str, Any]:
        """The recipe that merge_engine and mergekit both read."""
        setting = METHODS[self.method]
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "models": [{"model": str(model), "parameters": self.of_model} for model in self.merged],
            "parameters": setting.merge,
            "dtype": "bfloat16",
        }
        if setting.uses_base:
            recipe["base_model"] = str(self.base)
        return recipe


def plays(contestant: str, method: str, slow: bool) -> bool:
    """Whether the contestant has the method, and, with a ``slow`` disk, can be slowed down."""
    has_method = contestant != TORCH or method == "ties"
    return has_method and (not slow or contestant in (COPY, MERGE_ENGINE))


def command(
    contestant: str,
    merge: Merge,
    work: Path,
    mergekit: Path | None = None,
    pace: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
) -> list[str]:
    """The command that runs a contestant, writing to ``work / "output"``; ``work`` is empty.

    ``mergekit`` is the path of the ``mergekit-yaml`` script, ``pace`` the bytes per second of a slow disk. The copy
    and merge_engine write files of ``shard_size`` bytes.
    """
    recipe, output = work / "recipe.yaml", work / "output"
    recipe.write_text(json.dumps(merge.recipe()))  # every JSON document is YAML
    if contestant == MERGEKIT:
        return [str(mergekit), str(recipe), str(output), "--quiet"]
    if contestant == MERGE_ENGINE:
        module = ["merge_engine", "run", str(recipe), str(output), "--shard-size", str(shard_size)]
    elif contestant == TORCH:
        numbers = [str(merge.of_model["density"]), str(merge.of_model["weight"])]
        module = ["merge_engine.bench.torch_ties", str(output), *numbers, *map(str, merge.folders)]
    else:
        output.mkdir()
        files = [str(file) for folder in merge.folders for file in weight_files(folder)]
        module = [
            "merge_engine.bench.bare_copy",
            str(output),
            str(merge.bytes_written),
            str(shard_size),
            *files,
        ]
    slowed = [] if pace is None else ["merge_engine.bench.slow_disk", str(pace)]
    return [sys.executable, "-m", *slowed, *module]


def check_output(contestant: str, merge: Merge, work: Path) -> None:
    """Raise ``ContestantError`` unless the output has the size that it must have, headers aside."""
    written = sum(file.stat().st_size for file in (work / "output").glob("*.safetensors"))
    if abs(written - merge.bytes_written) > merge.bytes_written // 100 + 2**20:
        raise ContestantError(f"{contestant}: wrote {written} bytes of weights, not {merge.bytes_written}")
