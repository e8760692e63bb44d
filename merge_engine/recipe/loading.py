"""From a file, a text or a mapping to a recipe. Every problem is reported in one short line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from merge_engine.errors import RecipeError
from merge_engine.recipe.problems import describe, shown
from merge_engine.recipe.schema import KNOWN_KEYS, Recipe
from merge_engine.storage.bounded import MAX_RECIPE, read_bounded


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """Read and check a recipe.

    ``source`` is a file (a ``Path``, or text that ends in .yml or .yaml or names an existing file), YAML
    text, a mapping of the same keys, or a recipe, which is returned as it is. Raises ``RecipeError`` with
    one line for each problem; lines begin with the file's name if there is one.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _validated(dict(source), "")
    if isinstance(source, Path) or _names_file(source):
        return _validated(_parse(_read_text(Path(source)), f"{source}: "), f"{source}: ")
    if "\n" in source or ":" in source:
        return _validated(_parse(source, ""), "")
    raise RecipeError(f"{shown(source)} is neither an existing recipe file nor YAML text")


def _names_file(text: str) -> bool:
    if "\n" in text:
        return False
    if text.endswith((".yml", ".yaml")):
        return True
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a file name, or with a NUL in it
        return False


def _read_text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_RECIPE).decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8 text; save it as UTF-8") from None


def _validated(data: object, prefix: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = describe(error, KNOWN_KEYS)
        raise RecipeError([prefix + line for line in lines]) from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {shown(key.value)} given twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def _parse(text: str, prefix: str) -> object:
    try:
        documents = list(yaml.load_all(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{prefix}{place}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a control character; a date that does not exist
        raise RecipeError(f"{prefix}not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{prefix}not a recipe: nested too deeply") from None
    if len(documents) > 1:
        raise RecipeError(
            f"{prefix}holds {len(documents)} YAML documents; several recipes in one file are "
            "not supported yet, give each a file of its own"
        )
    if not documents or documents[0] is None:
        raise RecipeError(f"{prefix}the recipe is empty")
    return documents[0]
