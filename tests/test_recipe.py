"""Reading recipes: accepted and refused recipes, and the words of the errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from merge_engine import dtypes
from merge_engine.errors import RecipeError
from merge_engine.recipe import ModelReference, load_recipe

TIES = """\
merge_method: ties
base_model: org/base@main
models:
  - model: org/base@main
  - model: org/language
    parameters:
      weight: 0.5
      density: [0.2, 0.8, 1.0]
  - model: org/task
    parameters:
      weight:
        - filter: mlp
          value: [0, 1]
        - value: 1e-3
parameters:
  normalize: true
  int8_mask: true
dtype: torch.bfloat16
"""


def minimal(**keys: object) -> dict[str, object]:
    return {"merge_method": "linear", "models": [{"model": "org/a"}]} | keys


def problems(source: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "pydantic" not in message and "[type=" not in message
    return message.split("\n")


def test_reads_a_mergekit_recipe() -> None:
    recipe = load_recipe(TIES)
    assert recipe.merge_method == "ties"
    assert recipe.base_model == ModelReference(path="org/base", revision="main")
    assert [str(entry.model) for entry in recipe.models] == ["org/base@main", "org/language", "org/task"]
    assert recipe.models[0].parameters == {}
    assert recipe.models[1].parameters == {"weight": 0.5, "density": [0.2, 0.8, 1.0]}
    assert recipe.models[2].parameters == {
        "weight": [{"filter": "mlp", "value": [0, 1]}, {"value": "1e-3"}],
    }
    assert recipe.parameters == {"normalize": True, "int8_mask": True}
    assert recipe.dtype == "bfloat16" and recipe.out_dtype is None
    assert (recipe.arithmetic, recipe.seed, recipe.allow_nonfinite) == ("exact", 0, False)


def test_reads_our_own_keys() -> None:
    recipe = load_recipe(minimal(arithmetic="mergekit", seed=2**64 - 1, allow_nonfinite=True))
    assert (recipe.arithmetic, recipe.seed, recipe.allow_nonfinite) == ("mergekit", 2**64 - 1, True)


def test_a_file_a_path_a_text_and_a_mapping_say_the_same(tmp_path: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: org/a}]\n"
    named, unnamed = tmp_path / "recipe.yaml", tmp_path / "recipe"
    named.write_text(text)
    unnamed.write_text("\ufeff" + text, encoding="utf-8")
    expected = load_recipe(minimal())
    one_line = "{merge_method: linear, models: [{model: org/a}]}"
    mapping = MappingProxyType(minimal())
    for source in (text, one_line, named, unnamed, str(named), str(unnamed), mapping, expected):
        assert load_recipe(source) == expected


def test_null_means_not_given() -> None:
    recipe = load_recipe(minimal(base_model=None, parameters=None, dtype=None, out_dtype=None))
    assert recipe == load_recipe(minimal())


def test_a_recipe_does_not_change() -> None:
    recipe = load_recipe(minimal())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_a_recipe_keeps_no_hold_on_its_source() -> None:
    source = minimal(parameters={"weight": [{"filter": "a", "value": [1, 2]}]})
    recipe = load_recipe(source)
    source["parameters"]["weight"][0]["value"].append(3)  # type: ignore[index]
    assert recipe.parameters == {"weight": [{"filter": "a", "value": [1, 2]}]}


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(name: str) -> None:
    recipe = load_recipe(minimal(dtype=f"torch.{name}"))
    assert recipe.dtype == name
    assert recipe.working_dtype is recipe.output_dtype is dtypes.BY_NAME[name]
    assert load_recipe(minimal(out_dtype=name)).output_dtype is dtypes.BY_NAME[name]
    assert load_recipe(minimal(out_dtype=name)).working_dtype is None


def test_no_dtype_leaves_it_to_the_tensors() -> None:
    recipe = load_recipe(minimal())
    assert recipe.working_dtype is None and recipe.output_dtype is None


# --- model references


@pytest.mark.parametrize(
    ("raw", "path", "revision"),
    [
        ("org/a", "org/a", None),
        ("org/a@v1.0", "org/a", "v1.0"),
        ({"model": "org/a@v1"}, "org/a", "v1"),
        ({"model": {"path": "org/a"}}, "org/a", None),
        ({"model": {"path": "org/a", "revision": "v1"}}, "org/a", "v1"),
        ({"model": {"path": "x@y+z", "revision": None}, "lora": None}, "x@y+z", None),
        ({"path": "org/a", "revision": "v1"}, "org/a", "v1"),
        (Path("/models/a@b"), "/models/a@b", None),
    ],
)
def test_model_references(raw: object, path: str, revision: str | None) -> None:
    recipe = load_recipe(minimal(base_model=raw, models=[{"model": raw}]))
    assert recipe.base_model == recipe.models[0].model == ModelReference(path=path, revision=revision)


@pytest.mark.parametrize(
    "raw",
    [
        "org/a@v1+org/b@v2",
        {"model": "org/a@v1", "lora": "org/b@v2"},
        {"model": {"path": "org/a", "revision": "v1"}, "lora": {"path": "org/b", "revision": "v2"}},
    ],
)
def test_references_with_a_lora(raw: object) -> None:
    reference = load_recipe(minimal(base_model=raw)).base_model
    lora = ModelReference(path="org/b", revision="v2")
    assert reference == ModelReference(path="org/a", revision="v1", lora=lora)
    assert str(reference) == "org/a@v1+org/b@v2"
    assert ModelReference.model_validate("org/a+org/b") == ModelReference(
        path="org/a", lora=ModelReference(path="org/b")
    )
    with pytest.raises(ValidationError):
        ModelReference(path="a", lora=reference)


def test_an_existing_name_with_a_plus_has_a_lora_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a+b", "c@d"):
        (tmp_path / name).mkdir()
    for text, path, lora in (("a+b+x", "a+b", "x"), ("x+a+b", "x", "a+b"), ("c@d+c@d", "c@d", "c@d")):
        expected = ModelReference(path=path, lora=ModelReference(path=lora))
        assert ModelReference.model_validate(text) == expected


@pytest.mark.parametrize("path", ["a", "a+b", "a@b", "x/a"])
@pytest.mark.parametrize("lora", ["b", "c+d", "c@d"])
def test_references_with_a_lora_are_read_again(
    path: str, lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a folder with a file whose name is that of both."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    reference = ModelReference(path=path, revision="v", lora=ModelReference(path=lora))
    for one in (reference, reference.model_copy(update={"revision": None})):
        assert ModelReference.model_validate(one.to_plain()) == one
        assert load_recipe(load_recipe(minimal(base_model=one.to_plain())).to_yaml()).base_model == one


def test_a_reference_is_text_again() -> None:
    assert str(ModelReference(path="org/a", revision="v1")) == "org/a@v1"
    assert str(ModelReference(path="org/a")) == "org/a"


@pytest.mark.parametrize("name", ["at@sign", "plus+sign", "a@b@c"])
def test_an_existing_folder_is_never_split(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    reference = load_recipe(minimal(base_model=str(tmp_path / name))).base_model
    assert reference == ModelReference(path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ("a+b+c", 'base_model: must have one "+" between a model and its LoRA, not "a+b+c"; if a name holds'),
        ("a+", 'base_model: must be "model+lora", not "a+"'),
        ("+b", 'base_model: must be "model+lora", not "+b"'),
        ("a+b@", 'base_model: must be "path" or "path@revision", not "b@"'),
        ("a@x@y+b", 'base_model: must be "path" or "path@revision", not "a@x@y"'),
        ({"model": "a", "lora": 3}, "base_model.lora: must be a folder or a hub id, not 3"),
        ({"model": "a", "lora": {"path": "b", "lora": "c"}}, 'base_model.lora: unknown key "lora"'),
        ({"model": "a", "lora": {"path": 1}}, "base_model.lora.path: must be a folder or a hub id, not 1"),
        ({"modle": "a"}, 'unknown key "modle"; did you mean "model"?'),
        ({"model": {"path": "a", "revison": "b"}}, 'base_model.model: unknown key "revison"; did you mean'),
        ({"model": {"path": "a", "revision": 1}}, "base_model.model.revision: must be text, not 1"),
        ({"model": {"path": ""}}, 'base_model.model.path: must be a folder or a hub id, not ""'),
        ({"path": 3}, "base_model.path: must be a folder or a hub id, not 3"),
        ({"model": 3}, "base_model.model: must be a folder or a hub id, not 3"),
        ("a@b@c", 'base_model: must be "path" or "path@revision", not "a@b@c"'),
        ("a@", 'must be "path" or "path@revision", not "a@"'),
        ("@v1", 'must be "path" or "path@revision", not "@v1"'),
        ("", 'base_model: must be a folder or a hub id, not ""'),
        (7, "base_model: must be a folder or a hub id, not 7"),
        ("x" * 5000 + "@", "must be"),
    ],
)
def test_refused_model_references(raw: object, line: str) -> None:
    assert line in problems(minimal(base_model=raw))[0]


# --- refused keys and values


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, 'the recipe needs one of the keys "models", "slices", "modules"'),
        ({"models": [{"model": "a"}], "modules": {}}, "modules: "),
        (
            {"models": [{"model": "a"}], "slices": [{"sources": [{"model": "a"}]}]},
            'the recipe takes only one of the keys "models", "slices"',
        ),
        ({"slices": []}, "slices: must name at least one model"),
        ({"slices": [{"sources": []}]}, "slices[0].sources: must name at least one model"),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [0]}]}]},
            "slices[0].sources[0].layer_range: must be [",
        ),
        (
            {"slices": [{"sources": [{"model": "a", "layers": 3}]}]},
            'unknown key "slices[0].sources[0].layers"; ',
        ),
        ({"modules": {"text": {}}}, 'modules.text: needs one of the keys "models", "slices"'),
        ({"modules": {"text": {"modls": []}}}, 'unknown key "modules.text.modls"; did you mean "models"?'),
    ],
)
def test_the_three_ways_to_name_models(keys: dict[str, object], line: str) -> None:
    assert any(each.startswith(line) for each in problems({"merge_method": "linear"} | keys))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"base_modl": "x"}, 'unknown key "base_modl"; did you mean "base_model"?'),
        ({"lambda": 1}, 'unknown key "lambda"; known here: allow, allow_nonfinite, arithmetic'),
        (
            {"models": [{"model": "a", "parametrs": {}}]},
            'unknown key "models[0].parametrs"; did you mean "param',
        ),
        ({"models": [{"model": "a", "layer_range": [0, 8]}]}, 'unknown key "models[0].layer_range"; '),
        ({"models": [{"parameters": {}}]}, "models[0].model: missing, but required"),
        ({"models": ["a"]}, 'models[0]: must be a map of keys to values, not "a"'),
        ({"models": []}, "models: must name at least one model"),
        ({"models": None}, 'the recipe needs one of the keys "models", "slices", "modules"'),
        ({"models": [{"model": "a", "parameters": 3}]}, "models[0].parameters: must be a map of names"),
        ({"parameters": {1: 2}}, "parameters[1]: must be text, not 1"),
        ({"merge_method": 3}, "merge_method: must be text, not 3"),
        ({"dtype": "int64"}, 'dtype: must be one of float16, bfloat16, float32, float64, not "int64"'),
        ({"dtype": "BF16"}, "dtype: must be one of"),
        ({"out_dtype": 16}, "out_dtype: must be one of float16, bfloat16, float32, float64, not 16"),
        ({"arithmetic": "fast"}, 'arithmetic: must be "exact" or "mergekit", not "fast"'),
        ({"seed": -1}, "seed: must be greater than or equal to 0, not -1"),
        ({"seed": 2**64}, "seed: must be less than 18446744073709551616"),
        ({"seed": True}, "seed: must be a whole number, not true"),
        ({"seed": 1.5}, "seed: must be a whole number, not 1.5"),
        ({"allow_nonfinite": 1}, "allow_nonfinite: must be true or false, not 1"),
    ],
)
def test_refused_keys_and_values(keys: dict[str, object], line: str) -> None:
    [found] = problems(minimal(**keys))
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ([], "is an empty list; give one value or leave the key out"),
        (None, "must be a number, true, false or text, not null"),
        ([1, [2]], "[1]: must be a number, true, false or text, not [2]"),
        ([0.5, {"value": 1}], "mixes maps with plain values; write each entry as {filter: ..., value: ...}"),
        ({"filter": "mlp"}, 'a map needs the key "value"'),
        ({"filter": 3, "value": 1}, ".filter: must be text, not 3; put it in quotes"),
        ({"value": {"value": 1}}, '.value: must be a number, true, false or text, not {"value": 1}'),
        ({"value": []}, ".value: is an empty list; give one value or leave the key out"),
        ([{"value": 1}, {"fliter": "x", "value": 1}], '[1]: unknown key "fliter"; did you mean "filter"?'),
        ([{"value": [1, None]}], "[0].value[1]: must be a number, true, false or text, not null"),
    ],
)
def test_refused_shapes_of_settings(setting: object, line: str) -> None:
    path = "models[0].parameters.weight"
    glue = "" if line[0] in ".[" else ": "
    assert problems(minimal(models=[{"model": "a", "parameters": {"weight": setting}}])) == [
        path + glue + line
    ]


def test_all_problems_are_reported_at_once_each_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("merge_method: ties\nbase_modl: x\nseed: -1\nmodels: [{model: a, paramters: {}}, {}]\n")
    assert problems(path) == [
        f'{path}: unknown key "models[0].paramters"; did you mean "parameters"?',
        f"{path}: models[1].model: missing, but required",
        f"{path}: seed: must be greater than or equal to 0, not -1",
        f'{path}: unknown key "base_modl"; did you mean "base_model"?',
    ]


# --- sources that are no recipe


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("merge_method: ties\nmodels: [", "line "),
        ("a: b: c", "line 1, column 5: mapping values are not allowed"),
        (
            "merge_method: ties\nmerge_method: x",
            'line 2, column 1: key "merge_method" given twice, with two values; remove one',
        ),
        (
            "merge_method: ties\nmodels:\n- model: a\n  parameters: {weight: 1, weight: 2}",
            'line 4, column 27: key "weight" given twice, with two values; remove one',
        ),
        ("# nothing: here", "the recipe is empty"),
        ("- a\n- b", "the recipe must be a map of keys to values"),
        ("a: !!python/name:os.system", "line 1, column 4: no such tag in a recipe"),
        ("a: \x00", "not valid YAML: unacceptable character #x0000"),
        ("a: 2024-99-99", 'line 1, column 4: "2024-99-99" is no timestamp; write it as text, in quotes'),
        ("a: " + "[" * 5_000, "not a recipe: nested too deeply"),
        ("nowhere", '"nowhere" is neither an existing recipe file nor YAML text'),
    ],
)
def test_text_that_is_no_recipe(text: str, line: str) -> None:
    [found] = problems(text)
    assert found.startswith(line)


def test_a_key_may_override_a_merged_one() -> None:
    recipe = load_recipe(
        "merge_method: ties\nmodels:\n"
        "- {model: a, parameters: &shared {weight: 1, density: 0.5}}\n"
        "- {model: b, parameters: {<<: *shared, weight: 2}}\n"
    )
    assert recipe.models[1].parameters == {"weight": 2, "density": 0.5}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, binary = tmp_path / "no.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"merge_method: \xff")
    assert problems(str(missing)) == [f"{missing}: cannot read the recipe: No such file or directory"]
    assert problems(tmp_path) == [f"{tmp_path}: cannot read the recipe: a folder, not a file"]
    assert problems(binary) == [f"{binary}: byte 14 is not UTF-8 text; save it as UTF-8"]


# --- back to YAML


def test_to_yaml_holds_only_what_was_given() -> None:
    assert (
        load_recipe(minimal(parameters=None)).to_yaml() == "merge_method: linear\nmodels:\n- model: org/a\n"
    )


def test_to_yaml_is_canonical() -> None:
    recipe = load_recipe(TIES)
    assert load_recipe(recipe.to_yaml()).to_yaml() == recipe.to_yaml()
    assert "density: [0.2, 0.8, 1.0]" in recipe.to_yaml()
    assert recipe.to_yaml().endswith("dtype: bfloat16\n")


def test_to_yaml_writes_repeated_settings_in_full() -> None:
    gradient = [0.1, 0.2]
    models = [{"model": name, "parameters": {"weight": gradient}} for name in "ab"]
    assert "&" not in load_recipe(minimal(models=models)).to_yaml()


@pytest.mark.parametrize(
    "name", ["\x85", "\u2028", "two\nlines", "mudel/õ-keel", "1e-3", "no", "a: b", " a "]
)
def test_to_yaml_keeps_odd_text(name: str) -> None:
    recipe = load_recipe(minimal(base_model={"path": name}, parameters={"label": name}))
    assert load_recipe(recipe.to_yaml()) == recipe
    assert "õ" in recipe.to_yaml() or "õ" not in name


def test_numbers_of_numpy_become_plain() -> None:
    recipe = load_recipe(minimal(parameters={"weight": [np.float32(0.5), np.int64(1)]}))
    assert load_recipe(recipe.to_yaml()) == recipe


scalars = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = scalars | st.lists(scalars, min_size=1)
filtered = st.fixed_dictionaries({"value": values}, optional={"filter": st.none() | st.text()})
parameter_maps = st.dictionaries(st.text(), values | filtered | st.lists(filtered, min_size=1), max_size=4)
references = st.builds(
    lambda path, revision: {"model": {"path": path, "revision": revision}},
    st.text(min_size=1),
    st.none() | st.from_regex(r"[a-z0-9./-]+", fullmatch=True),
)
entries = st.fixed_dictionaries({"model": references}, optional={"parameters": parameter_maps})
recipes = st.fixed_dictionaries(
    {"merge_method": st.text(min_size=1), "models": st.lists(entries, min_size=1, max_size=3)},
    optional={
        "base_model": references,
        "parameters": parameter_maps,
        "out_dtype": st.sampled_from(["bfloat16", "torch.float32"]),
        "seed": st.integers(0, 2**64 - 1),
        "arithmetic": st.sampled_from(["exact", "mergekit"]),
    },
)


@settings(deadline=None)
@given(recipes)
def test_to_yaml_reads_back_as_the_same_recipe(raw: dict[str, object]) -> None:
    recipe = load_recipe(raw)
    again = load_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_importing_recipes_does_not_import_torch() -> None:
    code = "import sys, merge_engine.recipe; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
