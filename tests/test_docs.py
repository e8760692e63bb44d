"""The documentation is right: its Python runs, its recipes can be planned, its tables come from the code.

Every Python block of README.md and docs/*.md runs. A block that imports merge_engine begins a new module, in a folder
that holds ``recipe.yaml`` (the page's first recipe, or that of docs/recipes.md) and small checkpoints in place of the
models in it. Any other block continues the one above it. If ``<!-- check: NAME -->`` follows a block, which no reader
sees, ``CHECKS[NAME]`` is called with the module.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from conftest import SaveCheckpoint, Snapshot
from emulated_cuda.backend import EmulatedCudaBackend
from method_tables import meanings, row_of, with_tables
from safetensors.torch import save_file
from vocabularies import SPECIAL, tokenizer_json

import merge_engine as me
from merge_engine.backends import create_backend
from merge_engine.cli.app import call
from merge_engine.methods import METHODS, Method
from merge_engine.recipe import Parameter, Recipe, load_recipes
from merge_engine.recipe.chat_template import AUTO, BUILT_IN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(page.relative_to(ROOT)): page.read_text("utf-8")
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
}

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```$"
    r"(\s*<!-- check: (?P<check>[\w ]+) -->)?",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Lines of a page, the number of the first (from 1), and the check that its comment names."""

    text: str
    line: int
    check: str | None


def blocks(page: str, language: str) -> Iterator[Block]:
    """The blocks of a page in this language, in order."""
    for found in BLOCK.finditer(page):
        if found["language"] == language:
            line = page.count("\n", 0, found.start("text")) + 1
            yield Block(textwrap.dedent(found["text"]), line, found["check"])


def examples(page: str) -> list[list[Block]]:
    """The Python of a page: lists of blocks, each of which continues the one before it."""
    found: list[list[Block]] = []
    for block in blocks(page, "python"):
        if not found or re.search(r"^(import|from) merge_engine\b", block.text, re.MULTILINE):
            found.append([])
        found[-1].append(block)
    return found


def recipes(page: str) -> list[str]:
    """The whole recipes of a page."""
    return [block.text for block in blocks(page, "yaml") if "merge_method:" in block.text]


EXAMPLES = {f"{name}:{e[0].line}": (name, e) for name, page in PAGES.items() for e in examples(page)}
RECIPES = {f"{name}:{i}": recipe for name, page in PAGES.items() for i, recipe in enumerate(recipes(page))}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a block runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_scene(recipe: str, folder: Path, save_checkpoint: SaveCheckpoint) -> None:
    """``recipe.yaml``, and a small checkpoint for each model that it names."""
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    loaded = load_recipes(recipe)
    made = {one.name for one in loaded}
    references = [model for one in loaded for model in one.references if model.path not in made]
    for seed, name in enumerate(dict.fromkeys(reference.path for reference in references)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(name, tensors(seed))
        if any(one.vocabulary is not None for one in loaded):
            tokenizer = tokenizer_json([*SPECIAL, "<|im_start|>", "<|im_end|>", "one", "two", "three"])
            (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    for seed, reference in enumerate(references):
        if reference.lora is not None:
            save_adapter(folder / reference.lora.path, seed)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(32)))
    return {name: torch.randn(8, 16, generator=generator) for name in names}


def save_adapter(adapter: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = "base_model.model.model.layers.1.mlp.up_proj"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    factors = {"A": torch.randn(2, 16, generator=generator), "B": torch.randn(8, 2, generator=generator)}
    save_file(
        {f"{module}.lora_{side}.weight": factor for side, factor in factors.items()},
        adapter / "adapter_model.safetensors",
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_python_runs(
    name: str, folder: Path, save_checkpoint: SaveCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, example = EXAMPLES[name]
    set_scene([*recipes(PAGES[page]), *recipes(PAGES["docs/recipes.md"])][0], folder, save_checkpoint)
    module = ModuleType("docs_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with patch.dict(METHODS):  # a block may register a method
        for block in example:
            lines = "\n" * (block.line - 1) + block.text  # so that a traceback names the line of the page
            exec(compile(lines, str(ROOT / page), "exec"), module.__dict__)
            if block.check is not None:
                CHECKS[block.check](module)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_can_be_planned(
    name: str, folder: Path, save_checkpoint: SaveCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_scene(RECIPES[name], folder, save_checkpoint)
    monkeypatch.setattr(sys, "argv", ["merge-engine", "plan", "recipe.yaml", "merged/"])
    assert call() == 0


def interpolates(module: ModuleType) -> None:
    """The method in the block gives b + t * (x - b) on every backend."""
    defined = [value for value in vars(module).values() if isinstance(value, type)]
    METHODS.update({cls.name: cls() for cls in defined if issubclass(cls, Method) and cls is not Method})
    base, model = tensors(0), tensors(1)
    for name, state in (("b.safetensors", base), ("x.safetensors", model)):
        save_file(state, name)
    recipe = {
        "merge_method": "interpolate",
        "base_model": "b.safetensors",
        "models": [{"model": "x.safetensors"}],
        "parameters": {"t": 0.3},
    }
    expected = {name: b + 0.3 * (model[name] - b) for name, b in base.items()}
    for backend in (create_backend("cpu"), EmulatedCudaBackend()):
        merged = me.run(recipe, backend=backend).tensors
        assert merged is not None and merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items()), backend.name
    with pytest.raises(me.RecipeError, match="must be a number with 0 <= t <= 1, not 2"):
        me.run(recipe | {"parameters": {"t": 2}})


CHECKS = {"interpolates": interpolates}


def test_every_block_is_found() -> None:
    for page in PAGES.values():
        assert len(list(blocks(page, "python"))) == page.count("```python")
    page = """Text, and `code`.

```python
import merge_engine as me
```
<!-- check: it is so -->

```bash
python
```

- An item:

  ```python
  if me:
      a = 2
  ```

```python
from merge_engine import run
```
"""
    assert examples(page) == [
        [Block("import merge_engine as me\n", 4, "it is so"), Block("if me:\n    a = 2\n", 15, None)],
        [Block("from merge_engine import run\n", 20, None)],
    ]


def test_tables_are_made_from_the_code(assert_snapshot: Snapshot) -> None:
    page = (DOCS / "recipes.md").read_text("utf-8")
    assert_snapshot(DOCS / "recipes.md", with_tables(page))


def test_the_table_says_what_each_parameter_means() -> None:
    rows = {row_of(parameter) for method in METHODS.values() for parameter in method.parameters}
    words = meanings(PAGES["docs/recipes.md"])
    assert rows <= words.keys()
    assert len(set(words.values())) == len(words)  # of a name with two rows each says which method it is of


def test_a_new_method_comes_into_the_tables() -> None:
    power = Parameter("power", float, "tensor", default=0.5, minimum=0)
    weight = Parameter("weight", float, "model", required=True)
    page = PAGES["docs/recipes.md"]
    with patch.dict(METHODS, {"new": SimpleNamespace(name="new", parameters=(weight, power))}):
        added = set(with_tables(page).splitlines()) - set(page.splitlines())
    assert added == {
        "| `new` | **weight**, power: 0.5 |",
        "| `power` | tensor | a number with 0 <= power |  |",
    }


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return (DOCS / "recipes.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("key", Recipe.model_fields)
def test_key_is_documented(key: str, lines: list[str]) -> None:
    assert any(line.startswith(f"| `{key}` |") for line in lines)


def test_nothing_is_documented_that_is_not_there(lines: list[str]) -> None:
    rows = {line.split("`")[1] for line in lines if line.startswith("| `")}
    parameters = {p.name for method in METHODS.values() for p in method.parameters}
    known = parameters | set(METHODS) | set(Recipe.model_fields)
    assert rows <= known | {AUTO, *BUILT_IN}
    assert rows >= {AUTO, *BUILT_IN}
