"""The files of a search, and its command: nothing of others is replaced, and an interrupt loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint

import merge_engine as me
from merge_engine.cli.search_options import directions_of, function_named, space_of

RECIPE = """\
merge_method: ties
base_model: base
models: [{model: a}, {model: b}]
parameters: {weight: 0.5, density: 0.2}
"""
SPACE: dict[str, Any] = {"density": (0.3, 0.9)}


@pytest.fixture
def folder(save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        save_checkpoint(name, {"w": torch.randn(4, 8)})
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def density(merge: me.Merge) -> float:
    assert merge.tensors()["w"].shape == (4, 8)
    return float(merge.recipe.parameters["density"])  # type: ignore[arg-type]


def test_the_best_recipe_is_written_and_merges(folder: Path) -> None:
    with me.load("recipe.yaml") as session:
        found = me.search(session, density, SPACE, trials=3, output="out")
    assert {file.name for file in Path("out").iterdir()} == {
        "best.yaml",
        "history.html",
        "history.json",
        "study.db",
    }
    assert me.load_recipe(Path("out/best.yaml")) == found.recipes[0]
    merged = me.run("out/best.yaml").tensors
    assert merged is not None
    with me.load("recipe.yaml") as session:
        assert torch.equal(merged["w"], session.merge(found.recipes[0]).tensors()["w"])
    numbers = json.loads(Path("out/history.json").read_text())
    assert numbers["best"] == {"best.yaml": found.best.number}
    assert [trial["scores"]["score"] for trial in numbers["trials"]] == [t.scores[0] for t in found.trials]
    assert Path("out/best.yaml").read_text().startswith(f"# trial {found.best.number} of a search, score: 0.")


def test_a_smaller_front_replaces_a_larger_one_and_files_of_others_stay(folder: Path) -> None:
    directions = {"large": "maximize", "small": "minimize"}

    def both(merge: me.Merge) -> list[float]:
        return [density(merge)] * 2

    with me.load("recipe.yaml") as session:
        large = me.search(session, both, SPACE, trials=3, directions=directions, output="out")
        assert len(list(Path("out").glob("front-*.yaml"))) == len(large.front) == 4
        small = me.search(session, both, SPACE, trials=3, directions={"one": "maximize", "other": "maximize"})
        small.write("out")
        assert [file.name for file in Path("out").glob("*.yaml")] == ["front-1.yaml"]
        Path("other").mkdir()
        Path("other/best.yaml").write_text("mine")
        with pytest.raises(me.OutputError, match=r"holds best\.yaml of no search; move it away"):
            me.search(session, density, SPACE, output="other")
        (Path("out") / "best.yaml").mkdir()
        with pytest.raises(me.OutputError, match=r"best\.yaml"):
            me.search(session, density, SPACE, trials=1).write("out")
    assert not list(Path("out").glob(".*"))


def test_other_inputs_are_another_search(folder: Path) -> None:
    with me.load("recipe.yaml") as session:
        me.search(session, density, SPACE, trials=1, storage="study.db")
    os.utime("b/model.safetensors", (0, 0))
    with (
        me.load("recipe.yaml") as session,
        pytest.raises(me.SearchError, match=r"a search with other inputs \(b\)"),
    ):
        me.search(session, density, SPACE, trials=1, storage="study.db")


def test_what_was_scored_before_a_failure_is_written(folder: Path) -> None:
    scores = iter([0.1, 0.3])
    with (
        me.load("recipe.yaml") as session,
        pytest.raises(me.SearchError, match="evaluate raised StopIteration"),
    ):
        me.search(session, lambda merge: next(scores), SPACE, output="out")
    numbers = json.loads(Path("out/history.json").read_text())
    assert len(numbers["trials"]) == 2 and numbers["best"] == {"best.yaml": 1}


def test_an_interrupted_command_goes_on(folder: Path) -> None:
    Path("scorer.py").write_text(
        "import os, time\n"
        "def evaluate(merge):\n"
        "    if not os.path.exists('go') and merge.recipe.parameters['density'] > 0.2:\n"
        "        open('waits', 'w').close(); time.sleep(60)\n"
        "    return merge.recipe.parameters['density']\n"
    )
    command = [sys.executable, "-m", "merge_engine", "search", "recipe.yaml", "out", "--device", "cpu"]
    command += ["--space", "density=0.3..0.9", "--evaluate", "scorer:evaluate", "--trials", "3"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Path("waits").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert said == "error: interrupted; out has what was found, and the same command goes on from there\n"
    assert "# the recipe without changes, score: 0.2" in Path("out/best.yaml").read_text()
    Path("go").touch()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "wrote out" in done.stdout
    assert len(json.loads(Path("out/history.json").read_text())["trials"]) == 4


def test_spaces_of_the_command_line() -> None:
    texts = [
        "density=0.1..0.9",
        "lambda=1e-2..10:log",
        "t=0..4:0.5",
        "a=0,1,4",
        "b=ties",
        "c=true",
        "weight[1]=-1..1",
    ]
    assert space_of(texts) == {
        "density": {"low": 0.1, "high": 0.9},
        "lambda": {"low": 0.01, "high": 10, "log": True},
        "t": {"low": 0, "high": 4, "step": 0.5},
        "a": [0, 1, 4],
        "b": "ties",
        "c": True,
        "weight[1]": {"low": -1, "high": 1},
    }
    with pytest.raises(me.OptionError) as caught:
        space_of(["density", "t=0..x", "a=", "b=1", "b=2", "c=0.1.."])
    assert len(caught.value.problems) == 5
    assert space_of(["base_model=../a,../b"]) == {"base_model": ["../a", "../b"]}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scorer", "must be MODULE:FUNCTION"),
        ("no_such_module_here:f", "cannot be loaded: ModuleNotFoundError"),
        ("json:dump_it", 'the module "json" has no function "dump_it"'),
        ("broken:f", "cannot be loaded: ZeroDivisionError"),
        ("program:f", "cannot be loaded: SystemExit: 3"),
        ("json:dump_s", 'has no function "dump_s"; did you mean "dumps"?'),
        ("./broken.py:f", "is a file, not the name of a module; write broken:f"),
        ("scores/broken:f", "is a file, not the name of a module; write broken:f"),
    ],
)
def test_scorers_that_cannot_be_loaded(name: str, said: str, folder: Path) -> None:
    Path("broken.py").write_text("1 / 0\n")
    Path("program.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(me.OptionError, match=said):
        function_named(name)


def test_directions_of_the_command_line() -> None:
    assert directions_of(["minimize"]) == "minimize"
    assert directions_of(["a=minimize", "b=maximize"]) == {"a": "minimize", "b": "maximize"}
    for wrong, said in ((["a=minimize", "b"], "NAME=b"), (["a=minimize", "a=maximize"], "a is there twice")):
        with pytest.raises(me.OptionError, match=said):
            directions_of(wrong)


def test_nothing_is_written_into_an_input(folder: Path) -> None:
    before = sorted(Path("base").iterdir())
    with me.load("recipe.yaml") as session:
        for output in ("base", "base/below"):
            with pytest.raises(me.OutputError, match=f"{output}: lies in the folder of the input base"):
                me.search(session, density, SPACE, trials=1, output=output)
    assert sorted(Path("base").iterdir()) == before


def test_another_scorer_is_another_search(folder: Path) -> None:
    with me.load("recipe.yaml") as session:
        me.search(session, density, SPACE, trials=1, output="found")
        with pytest.raises(me.SearchError, match="holds a search with another scorer"):
            me.search(session, lambda merge: -density(merge), SPACE, trials=1, output="found")


def test_a_scorer_that_ends_the_process_is_an_error(folder: Path) -> None:
    def ends(merge: me.Merge) -> float:
        raise SystemExit(3)

    with (
        me.load("recipe.yaml") as session,
        pytest.raises(me.SearchError, match="evaluate raised SystemExit: 3"),
    ):
        me.search(session, ends, SPACE, trials=1)
