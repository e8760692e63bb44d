"""Several recipes in one file, which refer to each other by name."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import merge_engine as me
import merge_engine.engine.documents as documents
from merge_engine.engine.records import plan_key
from merge_engine.recipe import load_recipe, load_recipes
from merge_engine.storage import scratch
from merge_engine.storage.scratch import scratch_folder

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.w": (8, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}
FIRST = {"name": "first", "merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
FIRST["parameters"] = {"weight": 0.5}
SECOND = {"name": "second", "merge_method": "dare_ties", "base_model": "base", "models": [{"model": "first"}]}
SECOND["parameters"] = {"weight": 1, "density": 0.5}
RESULT: dict[str, Any] = {"merge_method": "ties", "base_model": "base"}
RESULT["models"] = [{"model": "second"}, {"model": "b"}, {"model": "first"}]
RESULT["parameters"] = {"weight": 0.5, "density": 0.5}


@pytest.fixture(autouse=True)
def place(save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model and two others. What is not kept goes to ``ram`` in it instead of a RAM disk."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        save_checkpoint(name, {key: torch.randn(shape).bfloat16() for key, shape in SHAPES.items()})
        Path(name, "tokenizer_config.json").write_text(json.dumps({"from": name}))
    Path("ram").mkdir()
    for module in (scratch, documents):
        monkeypatch.setattr(module, "RAM_DISK", tmp_path / "ram")
    monkeypatch.setattr(documents, "room_in_memory", lambda nbytes: True)
    return tmp_path


def text(*recipes: dict[str, Any]) -> str:
    return "---\n".join(yaml.safe_dump(recipe, sort_keys=False) for recipe in recipes)


def refused(*recipes: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(me.MergeError) as caught:
        me.run(text(*recipes), "out", **options)
    assert not Path("out").exists() and not list(Path("ram").iterdir())
    return caught.value.problems


def weights(folder: str | Path) -> dict[str, bytes]:
    shards = sorted(Path(folder).glob("*.safetensors"))
    return {shard.name: shard.read_bytes() for shard in shards}


@pytest.fixture
def one_after_the_other() -> dict[str, bytes]:
    """The weights that the recipes give as files of their own."""
    me.run(FIRST, "steps/first")
    second = SECOND | {"models": [{"model": "steps/first"}]}
    me.run(second, "steps/second")
    models = [{"model": "steps/second"}, {"model": "b"}, {"model": "steps/first"}]
    me.run(RESULT | {"models": models}, "steps/result")
    return weights("steps/result")


def test_the_bytes_are_those_of_one_after_the_other(one_after_the_other: dict[str, bytes]) -> None:
    result = me.run(text(RESULT, SECOND, FIRST), "out")
    assert weights("out") == one_after_the_other
    assert Path("out/config.json").read_bytes() == Path("steps/result/config.json").read_bytes()
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"from": "base"}
    assert set(result.models.values()) == {"second", "b", "first"}
    assert not list(Path("ram").iterdir())
    in_memory = me.run(text(FIRST, SECOND, RESULT)).tensors
    expected = load_file("out/model.safetensors")
    assert in_memory is not None and all(torch.equal(in_memory[name], expected[name]) for name in expected)


def test_the_output_says_what_it_is_made_of() -> None:
    me.run(text(RESULT | {"int8_mask": True}, SECOND, FIRST | {"normalize": 1}), "out")
    manifest = json.loads(Path("out/merge_manifest.json").read_text())
    assert list(manifest["intermediates"]) == ["first", "second"]
    me.run(FIRST, "alone")
    alone = json.loads(Path("alone/merge_manifest.json").read_text())
    first = manifest["intermediates"]["first"]
    assert (first["digest"], first["recipe"], first["path"]) == (alone["digest"], alone["recipe"], None)
    assert first["inputs"] == alone["inputs"]
    assert set(manifest["intermediates"]["second"]["inputs"]) == {"base", "first"}
    assert set(manifest["inputs"]) == {"base", "b", "first", "second"}
    warnings = [line.partition(": ignored")[0] for line in manifest["warnings"]]
    assert warnings == ["first: normalize", "int8_mask"]

    again = load_recipes(Path("out/mergekit_config.yml"))
    assert again == (load_recipe(FIRST), load_recipe(SECOND), load_recipe(RESULT))
    card = Path("out/README.md").read_text()
    assert all(f"\n- `{name}`\n" in card for name in ("base", "a", "b")) and "- `first`" not in card
    assert all(recipe.to_yaml() in card for recipe in again)
    assert "scratch" not in card + json.dumps(manifest)

    found = me.verify("out", inputs=True)
    assert found.complete and found.checked_inputs == 3
    os.utime("a/model.safetensors", (1, 1))
    [changed] = me.verify("out", inputs=True).input_findings
    assert str(changed).startswith("a: model.safetensors: was written 1970")


# --- order and references


@st.composite
def graphs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Recipes of which each refers only to those before it, and the last one to all that no other uses."""
    count = draw(st.integers(1, 8))
    recipes: list[dict[str, Any]] = []
    unused: set[str] = set()
    for i in range(count):
        used = draw(st.sets(st.sampled_from([f"n{j}" for j in range(i)]))) if i else set()
        unused = (unused - used) | {f"n{i}"}
        models = [{"model": name} for name in sorted(used)] + [{"model": "a"}]
        recipes.append({"name": f"n{i}", "merge_method": "linear", "models": models})
    last = {"merge_method": "linear", "models": [{"model": name} for name in sorted(unused)]}
    return [*recipes, last]


@given(graphs(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_order_in_the_file_does_not_matter(recipes: list[dict[str, Any]], shuffle: random.Random) -> None:
    shuffled = recipes.copy()
    shuffle.shuffle(shuffled)
    ordered = load_recipes(text(*shuffled))
    assert ordered[-1].name is None and len(ordered) == len(recipes)
    made: set[str | None] = {"a"}
    for recipe in ordered:
        assert {model.path for model in recipe.references} <= made
        made.add(recipe.name)


@given(graphs().filter(lambda recipes: len(recipes) > 2), st.data())
@settings(max_examples=60)
def test_circles_are_found_and_named(recipes: list[dict[str, Any]], data: st.DataObject) -> None:
    named = recipes[:-1]
    length = data.draw(st.integers(1, len(named)))
    circle = data.draw(st.permutations(range(len(named))))[:length]
    for i, one in enumerate(circle):
        named[one]["models"].append({"model": named[circle[(i + 1) % length]]["name"]})
    with pytest.raises(me.RecipeError) as caught:
        load_recipes(text(*recipes))
    links = {recipe["name"]: {model["model"] for model in recipe["models"]} for recipe in named}
    for line in caught.value.problems:
        start, way = line.split(" in a circle: ")
        names = [json.loads(name) for name in way.split(" -> ")]
        assert start == "recipes refer to each other" and names[0] == names[-1]
        assert all(below in links[name] for name, below in pairwise(names))


def test_of_very_many_circles_some_are_named() -> None:
    names = [f"n{i}" for i in range(100)]
    recipes = [
        {"name": name, "merge_method": "linear", "models": [{"model": other} for other in names]}
        for name in names
    ]
    with pytest.raises(me.RecipeError) as caught:
        load_recipes(text(*recipes))
    assert len(caught.value.problems) == 20


@pytest.mark.parametrize(
    "key",
    [
        {"base_model": "first", "models": [{"model": "a"}]},
        {"models": [{"model": {"model": {"path": "first"}}}]},
        {"slices": [{"sources": [{"model": "first"}]}]},
        {"slices": [{"sources": [{"model": "a"}], "base_model": "first"}]},
        {"modules": {"text": {"models": [{"model": "first"}]}}},
        {"models": [{"model": "a"}], "tokenizer_source": "first"},
        {"models": [{"model": "a"}], "tokenizer": {"source": "first"}},
    ],
)
def test_a_name_counts_in_every_place(key: dict[str, Any]) -> None:
    recipe = {"name": "last", "merge_method": "linear"} | key
    assert [one.name for one in load_recipes(text(recipe, FIRST))] == ["first", "last"]


@pytest.mark.parametrize(
    ("recipes", "lines"),
    [
        ((FIRST, FIRST), ['name: "first" is the name of 2 recipes; give each its own']),
        ((RESULT, FIRST, RESULT), ["2 of 3 recipes have no name; only that of the result may have none"]),
        (
            (FIRST | {"name": "../x"}, FIRST | {"name": ".x"}, FIRST | {"name": "base"}),
            [
                'name: "../x" cannot be the name of a folder; choose another',
                'name: ".x" cannot be the name of a folder; choose another',
                'name: "base" means something else as a tokenizer\'s source; choose another',
            ],
        ),
        (
            (FIRST, RESULT | {"models": [{"model": "first@main"}]}),
            ["first@main: a recipe's output has no revision; leave it out"],
        ),
        (
            (FIRST, FIRST | {"name": "other"}),
            [
                'which recipe is the result is not clear: no other uses "first", "other"; leave out the name of '
                "the one that is"
            ],
        ),
        (
            (FIRST | {"models": []}, RESULT | {"typo": 1, "merge_method": "tise"}),
            [
                "document 1: models: must name at least one model",
                'document 2: unknown key "typo"; did you mean "dtype"?',
                'merge_method: there is no method "tise"; did you mean "ties"?',
            ],
        ),
    ],
)
def test_recipes_that_do_not_go_together(recipes: tuple[dict[str, Any], ...], lines: list[str]) -> None:
    found = refused(*recipes)
    assert len(found) == len(lines)
    assert all(one.startswith(line) for one, line in zip(found, lines, strict=True)), found


def test_one_recipe_is_needed_where_one_is_loaded() -> None:
    Path("two.yaml").write_text(text(FIRST, RESULT))
    with pytest.raises(me.RecipeError, match=r"^two.yaml: holds 2 recipes, and one is needed here"):
        load_recipe("two.yaml")
    Path("one.yaml").write_text("---\n" + text(FIRST) + "---\n---\n")
    assert load_recipe("one.yaml").name == "first"


# --- planning before merging


def test_the_problems_of_all_recipes_are_reported_at_once(save_checkpoint: SaveCheckpoint) -> None:
    save_checkpoint("odd", {"model.layers.0.w": torch.zeros(3, 3)})
    lines = refused(
        FIRST | {"models": [{"model": "a"}, {"model": "odd"}]},
        SECOND | {"models": [{"model": "first"}, {"model": "./nowhere"}]},
        RESULT | {"parameters": {"weight": 0.5, "density": 7}},
    )
    assert all(line.startswith("first: ") for line in lines[:-2]) and len(lines) > 2
    assert lines[-2] == "second: ./nowhere: there is no such folder or file"
    assert lines[-1] == "parameters.density: must be a number with 0 <= density <= 1, not 7"


def test_what_an_output_lacks_is_known_before_it_is_made() -> None:
    first = FIRST | {"tensors": {"exclude": ["model.norm.weight"]}}
    second = {"merge_method": "task_arithmetic", "base_model": "first", "models": [{"model": "a"}]}
    [line] = refused(first, second | {"parameters": {"weight": 1}})
    assert line.startswith("model.norm.weight: in a, but not in the base model first; ")


def test_a_plan_has_the_intermediates_and_equals_nothing() -> None:
    planned = me.plan(
        text(FIRST, FIRST | {"name": "twin"}, RESULT | {"models": [{"model": "first"}, {"model": "twin"}]})
    )
    assert [each.name for each in planned.intermediates] == ["first", "twin"]
    assert planned.warnings == ()  # no values are there yet that could be equal
    assert not list(Path("ram").iterdir())
    with pytest.raises(me.OptionError, match="a plan of several recipes cannot be run"):
        me.run(planned)


def test_equal_outputs_are_seen_when_they_are_made() -> None:
    twins = RESULT | {"models": [{"model": "first"}, {"model": "twin"}]}
    warnings = me.run(text(FIRST, FIRST | {"name": "twin"}, twins)).warnings
    assert warnings == ["twin: its tensors are those of first, byte for byte; it counts twice"]


def test_a_report_says_that_intermediates_were_removed() -> None:
    pytest.importorskip("matplotlib")
    me.run(text(FIRST, SECOND, RESULT), "out")
    _, numbers = me.write_report("out")
    missing = json.loads(numbers.read_text())["task_vectors"]["missing"]
    assert missing == "first, second: made by other recipes and removed; --intermediate-dir keeps it"


def test_what_the_result_does_not_need_is_not_merged() -> None:
    result = me.run(text(FIRST, SECOND, RESULT | {"models": [{"model": "first"}]}))
    assert result.warnings == ["not merged, because the result does not need them: second"]


# --- where outputs go


def test_intermediates_are_kept_and_taken_over_while_nothing_changes(
    one_after_the_other: dict[str, bytes],
) -> None:
    def times() -> dict[str, int]:
        me.run(text(FIRST, SECOND, RESULT), "out", intermediate_dir="kept", overwrite=True)
        assert weights("out") == one_after_the_other
        return {
            name: Path(f"kept/{name}/model.safetensors").stat().st_mtime_ns for name in ("first", "second")
        }

    before = times()
    assert weights("kept/second") == weights("steps/second")
    assert times() == before
    Path("kept/second/config.json").write_text("{} ")  # damaged
    after = times()
    assert after["first"] == before["first"] and after["second"] > before["second"]
    Path("a/tokenizer_config.json").write_text("{}")
    before, after = after, times()
    assert after["first"] > before["first"]
    os.utime("a/model.safetensors")  # may have another content
    assert all(new > old for new, old in zip(times().values(), after.values(), strict=True))
    manifest = json.loads(Path("out/merge_manifest.json").read_text())
    assert set(manifest["inputs"]) == {"base", "b", "kept/first", "kept/second"}
    assert me.verify("out", inputs=True).checked_inputs == 4
    before = times()
    me.run(text(FIRST, SECOND, RESULT), "out", intermediate_dir="kept", overwrite=True, lazy=False)
    assert Path("kept/first/model.safetensors").stat().st_mtime_ns > before["first"]


def test_kept_folders_are_not_overwritten_unasked() -> None:
    Path("kept/first").mkdir(parents=True)
    Path("kept/first/notes.txt").write_text("mine")
    [line] = refused(FIRST, RESULT | {"models": [{"model": "first"}]}, intermediate_dir="kept")
    assert line == "first: kept/first: is not empty; choose another folder or pass --overwrite"
    [line] = refused(
        FIRST | {"name": "x"}, RESULT | {"models": [{"model": "x"}]}, intermediate_dir=Path("out")
    )
    assert line.startswith("out: lies inside or around out/x, which another recipe writes")


def test_without_room_in_memory_they_lie_beside_the_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_after_the_other: dict[str, bytes]
) -> None:
    monkeypatch.setattr(documents, "room_in_memory", lambda nbytes: nbytes < 100)
    seen: set[Path] = set()

    def look(schedule: me.Schedule) -> None:
        seen.update(given.path.parent for given in schedule.plan.models.values())

    me.run(text(FIRST, SECOND, RESULT), "to/out", on_schedule=look)
    assert weights("to/out") == one_after_the_other
    assert {place.parent for place in seen if place != Path()} == {tmp_path}  # "to" is not there yet
    assert {entry.name for entry in Path().iterdir()} == {"base", "a", "b", "ram", "steps", "to"}

    free = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(documents.shutil, "disk_usage", lambda place: free)
    with pytest.raises(
        me.PlanError, match=r"2 outputs that the result is made of, and the result itself, need"
    ):
        me.run(text(FIRST, SECOND, RESULT), "to/other")
    assert not Path("to/other").exists()


def test_the_rule_for_the_ram_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scratch, "available_memory", lambda: 1000)
    assert not scratch.room_in_memory(1)  # it is no RAM disk
    memory = type("Mount", (), {"in_memory": True})
    monkeypatch.setattr(scratch, "mount_of", lambda path: memory)
    assert scratch.room_in_memory(500) and not scratch.room_in_memory(501)
    free = type("Usage", (), {"free": 400})
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda place: free)
    assert scratch.room_in_memory(400) and not scratch.room_in_memory(401)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken"), me.OutputError("full")])
def test_nothing_is_left_after_an_error(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(schedule: me.Schedule) -> None:
        calls.append(schedule)
        if len(calls) == 2:
            raise error

    with pytest.raises(type(error)):
        me.run(text(FIRST, SECOND, RESULT), "out", on_schedule=fail)
    assert not list(Path("ram").iterdir()) and not Path("out").exists()


def test_an_error_names_the_recipe_and_no_folder_that_goes(save_checkpoint: SaveCheckpoint) -> None:
    save_checkpoint("odd", {key: torch.full(shape, torch.inf).bfloat16() for key, shape in SHAPES.items()})
    with pytest.raises(me.NonFiniteError) as caught:
        me.run(text(FIRST | {"models": [{"model": "odd"}]}, RESULT | {"models": [{"model": "first"}]}), "out")
    assert caught.value.problems[0].startswith("first: ") and "ram" not in str(caught.value)
    allowed = FIRST | {"models": [{"model": "odd"}], "allow_nonfinite": True}
    with pytest.raises(me.NonFiniteError) as caught:
        me.run(text(allowed, RESULT | {"models": [{"model": "first"}]}), "out")
    assert "first" in str(caught.value) and "ram" not in str(caught.value)


KILLED = """
import os, sys, signal
from pathlib import Path
import merge_engine as me
import merge_engine.engine.documents as documents
from merge_engine.storage import scratch
scratch.RAM_DISK = documents.RAM_DISK = Path("ram").absolute()
documents.room_in_memory = lambda nbytes: True
def on_schedule(schedule):
    if "second" in map(str, schedule.plan.recipe.stacks.models):
        os.kill(os.getpid(), signal.SIGKILL)
me.run(sys.stdin.read(), "out", on_schedule=on_schedule)
"""


def test_the_next_run_removes_what_a_killed_one_left(one_after_the_other: dict[str, bytes]) -> None:
    recipes = text(FIRST, SECOND, RESULT)
    done = subprocess.run([sys.executable, "-c", KILLED], input=recipes, text=True)
    assert done.returncode == -signal.SIGKILL
    [left] = Path("ram").iterdir()
    assert {entry.name for entry in left.iterdir()} == {"first", "second"}
    me.run(recipes, "out")
    assert weights("out") == one_after_the_other and not list(Path("ram").iterdir())


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = "file: no folder can be made in it: Not a directory"
    with pytest.raises(me.OutputError, match=said), scratch_folder(tmp_path / "file"):
        pass


def test_a_folder_in_use_and_those_of_others_stay(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as one, scratch_folder(tmp_path) as other:
        assert one.is_dir() and other.is_dir() and one != other
        assert one.stat().st_mode & 0o077 == 0
        (tmp_path / f"{scratch._PREFIX}link").symlink_to(tmp_path / "a")
        with scratch_folder(tmp_path):
            assert one.is_dir() and other.is_dir()
    assert not one.exists() and not other.exists() and (tmp_path / "a").is_dir()


def test_the_result_is_resumed_although_intermediates_are_made_again(
    one_after_the_other: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of a result do not depend on where and when its intermediates were made."""
    merged = []
    original = documents._plan

    def plan(*arguments: Any) -> Any:
        planned = original(*arguments)
        merged.append(planned)
        return planned

    monkeypatch.setattr(documents, "_plan", plan)
    keys = []
    for _ in range(2):
        me.run(text(FIRST, SECOND, RESULT), "out", overwrite=True)
        keys.append(plan_key(merged[-1]))
        time.sleep(0.01)
    assert keys[0] == keys[1] and keys[0]
    os.utime("a/model.safetensors")
    torch.manual_seed(9)
    me.run(text(FIRST | {"parameters": {"weight": [0.4, 0.5]}}, SECOND, RESULT), "out", overwrite=True)
    assert plan_key(merged[-1]) != keys[0]
