"""The contestants: commands that merge the same checkpoints by the same recipe."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import input_files, weight_bytes

MERGE_ENGINE, MERGEKIT, COPY = "merge_engine", "mergekit", "copy"
MERGEKIT_VARIABLE = "MERGE_ENGINE_MERGEKIT"

# Parameters of each model, and whether the method takes a base.
METHODS: dict[str, tuple[dict[str, float], bool]] = {
    "linear": ({"weight": 0.5}, False),
    "task_arithmetic": ({"weight": 0.5}, True),
    "ties": ({"weight": 0.5, "density": 0.2}, True),
    "dare_ties": ({"weight": 0.5, "density": 0.2}, True),
    "breadcrumbs": ({"weight": 0.5, "density": 0.2, "gamma": 0.01}, True),
    "della": ({"weight": 0.5, "density": 0.2, "epsilon": 0.1}, True),
}

_RUN = "import sys, merge_engine; merge_engine.run(sys.argv[1], sys.argv[2])"


@dataclass(frozen=True)
class Merge:
    """One merge to be timed: the method, and the folders of the base and the models."""

    method: str
    base: Path
    models: tuple[Path, ...]

    @property
    def folders(self) -> list[Path]:
        """Every folder that the method reads."""
        return [self.base, *self.models] if METHODS[self.method][1] else list(self.models)

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs, each model counted once."""
        return sum(weight_bytes(folder) for folder in self.folders)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output."""
        return weight_bytes(self.base)

    def recipe(self) -> dict[str, Any]:
        """The recipe that merge_engine and mergekit both read."""
        parameters, uses_base = METHODS[self.method]
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "models": [{"model": str(model), "parameters": parameters} for model in self.models],
            "parameters": {"normalize": True},
            "dtype": "bfloat16",
        }
        if uses_base:
            recipe["base_model"] = str(self.base)
        return recipe


def command(engine: str, merge: Merge, work: Path, mergekit: str | None = None) -> list[str]:
    """The command that runs ``engine``, writing below ``work``, which is empty.

    ``mergekit`` is the path of the ``mergekit-yaml`` script.
    """
    recipe, output = work / "recipe.yaml", work / "output"
    recipe.write_text(json.dumps(merge.recipe()))  # every JSON document is YAML
    match engine:
        case "merge_engine":
            return [sys.executable, "-c", _RUN, str(recipe), str(output)]
        case "mergekit":
            if mergekit is None:
                raise ValueError("the path of mergekit-yaml is not known")
            return [mergekit, str(recipe), str(output), "--quiet"]
        case "copy":
            output.mkdir()
            files = [str(file) for folder in merge.folders for file in input_files([folder])]
            script = Path(__file__).with_name("bare_copy.py")
            return [sys.executable, str(script), str(output / "model.safetensors"), *files]
    raise ValueError(f"there is no engine {engine!r}")


def check_output(engine: str, merge: Merge, work: Path) -> None:
    """Raise ``RuntimeError`` unless the output has the size that it must have, headers aside."""
    written = sum(file.stat().st_size for file in (work / "output").glob("*.safetensors"))
    if abs(written - merge.bytes_written) > merge.bytes_written // 100 + 65536:
        raise RuntimeError(f"{engine}: wrote {written} bytes of weights, not {merge.bytes_written}")


def engines(mergekit: str | None) -> list[str]:
    """The engines that can run here, in the order of their turns."""
    return [COPY, MERGE_ENGINE, *([MERGEKIT] if mergekit else [])]
