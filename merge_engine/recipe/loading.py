"""From a file, a text or a mapping to a recipe. Every problem is reported in one short line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError
from yaml.composer import Composer

from merge_engine.errors import RecipeError
from merge_engine.recipe.problems import describe
from merge_engine.recipe.schema import Recipe, known_keys
from merge_engine.storage.bounded import MAX_RECIPE, read_bounded
from merge_engine.text import shortened, shown

if TYPE_CHECKING or not yaml.__with_libyaml__:
    Parser = yaml.SafeLoader
else:

    class Parser(Composer, yaml.CSafeLoader):
        """libyaml's events, several times as quick as Python's, put together in Python.

        Deep nesting exhausts the stack of libyaml's own composer, and the process dies.
        """

        def __init__(self, text: str) -> None:
            yaml.CSafeLoader.__init__(self, text)
            Composer.__init__(self)


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
    if not isinstance(source, str | Path):
        raise RecipeError(f"a recipe is a file, YAML text or a map of keys to values, not {shown(source)}")
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
        raise RecipeError(f"{shortened(path)}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8 text; save it as UTF-8") from None


def _validated(data: object, prefix: str) -> Recipe:
    try:
        recipe = Recipe.read(data)
        json.dumps(recipe.to_plain(), ensure_ascii=False).encode()  # the output holds the recipe
    except ValidationError as error:
        lines = describe(error, known_keys)
        raise RecipeError([prefix + line for line in lines]) from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RecipeError(
            f"{prefix}a text in it holds {half!a}, half a character; write the whole one"
        ) from None
    except ValueError:
        raise RecipeError(f"{prefix}a number in it has too many digits; no parameter is so large") from None
    return recipe


class _Loader(Parser):
    """YAML's safe loader, with two more errors: a key given twice, and a value that its tag does not fit."""

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

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        # Merged maps that are merged again, and so on, would give more and more copies of the same few keys.
        last = {
            (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key: (key, v)
            for key, v in node.value
        }
        node.value = list(last.values())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError, MemoryError):
            raise
        # PyYAML's functions for tags raise whatever int(), datetime and dictionaries do.
        except Exception as error:
            kind = str(node.tag).rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{shown(node.value)} is no {kind}; write it as text, in quotes, or leave the tag out",
                problem_mark=node.start_mark,
            ) from error


_WORDING = {
    "found unhashable key": "a key is a list or a map; keys must be text",
    "could not determine a constructor for the tag": "no such tag in a recipe; leave it out:",
}
"""What PyYAML says about its own workings, and what it means."""


def _parse(text: str, prefix: str) -> object:
    try:
        documents = list(yaml.load_all(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context or "not valid YAML"
        for theirs, ours in _WORDING.items():
            problem = problem.replace(theirs, ours)
        raise RecipeError(f"{prefix}{place}{problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a control character, half a character
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
