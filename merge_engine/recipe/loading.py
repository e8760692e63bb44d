"""From a file, a text or a mapping to recipes. Every problem is reported in one short line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from pydantic import ValidationError
from yaml.composer import Composer

from merge_engine.errors import RecipeError
from merge_engine.recipe.documents import in_order
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


RecipeSource: TypeAlias = str | Path | Mapping[str, Any] | Recipe


def load_recipe(source: RecipeSource, *, lenient: bool = False) -> Recipe:
    """Read and check a recipe.

    ``source`` is a file (a ``Path``, or text that ends in .yml or .yaml or names an existing file), YAML
    text, a mapping of the same keys, or a recipe, which is returned as it is. ``lenient`` ignores keys that do not
    exist, as mergekit does. Raises ``RecipeError`` with one line for each problem; lines begin with the file's name if
    there is one.
    """
    recipes = load_recipes(source, lenient=lenient)
    if len(recipes) > 1:
        raise RecipeError(
            f"{_file_of(source)}holds {len(recipes)} recipes, and one is needed here; give it a file of its own"
        )
    return recipes[0]


def load_recipes(
    source: RecipeSource,
    *,
    lenient: bool = False,
    check_method: Callable[[str], object] | None = None,
) -> tuple[Recipe, ...]:
    """Read and check the documents of a file, which may refer to each other by name.

    Returns the recipes in the order in which they can be merged: each after those that it refers to, and one without a
    name last. For ``source`` and ``lenient`` see
    ``load_recipe``. ``check_method`` raises ``RecipeError`` for the name of a method that does not exist: of a recipe
    with other problems, this is one more. Raises ``RecipeError`` with all problems of all recipes, also for names that
    are not unique and for references in a circle.
    """
    if isinstance(source, Recipe):
        return (source,)
    file = _file_of(source)
    documents = _documents(source, file, lenient)
    recipes: list[Recipe] = []
    problems: list[str] = []
    for number, (data, remarks) in enumerate(documents, 1):
        prefix = f"{file}document {number}: " if len(documents) > 1 else file
        try:
            recipes.append(validated(data, prefix, lenient, remarks))
        except RecipeError as error:
            problems += [*error.problems, *_of_method(data, check_method)]
    if problems:
        raise RecipeError(problems)
    return in_order(recipes, file)


def _of_method(data: object, check_method: Callable[[str], object] | None) -> list[str]:
    """What is wrong with the method of a recipe that has other problems."""
    name = data.get("merge_method") if isinstance(data, Mapping) else None
    if check_method is None or not isinstance(name, str) or not name:
        return []
    try:
        check_method(name)
    except RecipeError as error:
        return error.problems
    return []


def _documents(source: object, file: str, lenient: bool) -> list[tuple[object, Sequence[str]]]:
    """The documents of a source, each with warnings about its YAML. ``file`` begins messages."""
    if isinstance(source, Mapping):
        return [(dict(source), ())]
    if not isinstance(source, str | Path):
        raise RecipeError(f"a recipe is a file, YAML text or a map of keys to values, not {shown(source)}")
    if file:
        return read_yaml(_read_text(Path(source)), file, lenient)
    text = str(source)
    if "\n" in text or ":" in text:
        return read_yaml(text, "", lenient)
    raise RecipeError(f"{shown(source)} is neither an existing recipe file nor YAML text")


def _file_of(source: object) -> str:
    """The beginning of messages about a source: its file, if it is one."""
    is_file = isinstance(source, Path) or (isinstance(source, str) and _names_file(source))
    return f"{source}: " if is_file else ""


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


def validated(data: object, prefix: str, lenient: bool, remarks: Sequence[str]) -> Recipe:
    """The recipe of the keys and values of one document. ``prefix`` begins messages, and ``remarks`` are warnings.

    Raises ``RecipeError`` with a line for each problem.
    """
    try:
        recipe = Recipe.read(data, lenient=lenient, remarks=remarks)
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
    """YAML's safe loader, with two more errors: a key given twice, and a value that its tag does not fit.

    A key given twice with the same value is only worth a warning, in ``remarks``. So is, with ``lenient``, one with two
    values: the last one counts, as in every other reader of YAML.
    """

    def __init__(self, text: str, lenient: bool):
        super().__init__(text)
        self.remarks: list[str] = []
        self._lenient = lenient

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = key.tag, key.value
            if name in seen:
                self._twice(key, seen[name], value)
            seen[name] = value
        return node

    def _twice(self, key: yaml.ScalarNode, one: yaml.Node, other: yaml.Node) -> None:
        line = key.start_mark.line + 1
        if one is other or yaml.serialize(one) == yaml.serialize(other):
            self.remarks.append(f"line {line}: key {shown(key.value)} given twice, with the same value")
        elif self._lenient:
            self.remarks.append(f"line {line}: key {shown(key.value)} given twice; the last value counts")
        else:
            raise yaml.MarkedYAMLError(
                problem=f"key {shown(key.value)} given twice, with two values; remove one",
                problem_mark=key.start_mark,
            )

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


def read_yaml(text: str, prefix: str, lenient: bool) -> list[tuple[object, Sequence[str]]]:
    """The documents of a YAML text but the empty ones, each with warnings about its text.

    ``prefix`` begins messages. Raises ``RecipeError``.
    """
    documents: list[tuple[object, Sequence[str]]] = []
    try:
        loader = _Loader(text, lenient)
        while loader.check_data():  # type: ignore[no-untyped-call]
            loader.remarks = []
            data = loader.get_data()
            if data is not None:
                documents.append((data, loader.remarks))
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
    if not documents:
        raise RecipeError(f"{prefix}the recipe is empty")
    return documents
