"""Sweeps: the bytes, counts and manifests of single runs, from one reading; what is resumed, and what is refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from adversarial import quantised_models
from conftest import SaveCheckpoint
from emulated_cuda.backend import EmulatedCudaBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.methods import METHODS
from merge_engine.observe.result import MergeResult

SHAPES = {
    "embed.weight": (6, 4096),
    "layers.0.w": (5, 1111),
    "layers.0.norm": (64,),
    "layers.1.w": (3, 33),
    "layers.1.same": (9, 9),
    "empty": (0, 3),
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "passthrough": {},
    "slerp": {"t": 0.3},
    "nuslerp": {"nuslerp_flatten": False},
    "multislerp": {},
    "karcher": {},
    "model_stock": {"filter_wise": True},
    "task_arithmetic": {"lambda": 0.8},
    "ties": {"density": 0.3, "trim_slack": 0.05, "sign_slack": 0.5},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4, "rescale": "density"},
    "breadcrumbs": {"density": 0.4, "gamma": 0.1, "ties": "index", "rescale": "true"},
    "breadcrumbs_ties": {"density": 0.4, "gamma": 0.1, "ties": "index"},
    "della": {"density": 0.5, "epsilon": 0.1},
    "della_linear": {"density": 0.5, "epsilon": 0.1},
    "nearswap": {"t": 0.001},
    "ram": {"epsilon": 0.001},
    "ramplus_tl": {"epsilon": 0.001},
    "sce": {"select_topk": 0.3, "ties": "index"},
    "arcee_fusion": {},
}


def parameter_names(method: str) -> set[str]:
    return {parameter.name for parameter in METHODS[method].parameters}


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe over the inputs o, a and b."""
    method = draw(st.sampled_from(sorted(PARAMETERS)))
    known = parameter_names(method)
    parameters = dict(PARAMETERS[method])
    if "weight" in known:
        parameters["weight"] = draw(st.sampled_from([0.5, -0.3]))
    if "density" in known:
        parameters["density"] = draw(st.sampled_from([0.2, 0.5]))
    if "trim_scope" in known and not method.startswith(("dare", "della")) and draw(st.booleans()):
        parameters["trim_scope"] = "model"
    few = METHODS[method].max_models or draw(st.integers(max(1, METHODS[method].min_models), 2))
    few = max(few, METHODS[method].min_models)
    recipe = {
        "merge_method": method,
        "models": [{"model": name} for name in "ab"][:few],
        "parameters": parameters,
        "seed": draw(st.sampled_from([0, 3])),
        "arithmetic": draw(st.sampled_from(["exact", "mergekit"])),
        "dtype": draw(st.sampled_from(["bfloat16", "float32"])),
        "out_dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    }
    if METHODS[method].uses_base:
        recipe["base_model"] = "o"
    return recipe


def save_inputs(save: SaveCheckpoint) -> dict[str, str]:
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number, (name, shape) in enumerate(SHAPES.items()):
        base, tuned = quantised_models(torch.Size(shape).numel(), 2, torch.bfloat16, seed=number)
        tuned = [base.clone() for _ in tuned] if name == "layers.1.same" else tuned
        for state, values in zip(states, (base, *tuned), strict=True):
            state[name] = values.view(shape)
    for state in states:
        state["position_ids"] = torch.arange(7)
    return {name: str(save(name, state, shards=2)) for name, state in zip("oab", states, strict=True)}


class Inputs:
    """Three checkpoints, and single runs over them, each done once."""

    def __init__(self, folder: Path):
        def save(name: str, *arguments: Any, **options: Any) -> Path:
            return save_checkpoint_in(folder, name, *arguments, **options)

        self.folder = folder
        self.paths = save_inputs(save)
        self.single: dict[str, tuple[MergeResult, dict[str, Any]]] = {}

    def recipe(self, given: dict[str, Any]) -> dict[str, Any]:
        models = [{**each, "model": self.paths[each["model"]]} for each in given["models"]]
        base = {"base_model": self.paths[given["base_model"]]} if "base_model" in given else {}
        return {**given, **base, "models": models}

    def alone(self, given: dict[str, Any], backend: Any) -> tuple[MergeResult, dict[str, Any]]:
        key = json.dumps([given, str(backend)])
        if key not in self.single:
            output = self.folder / f"single{len(self.single)}"
            result = me.run(self.recipe(given), output, backend=backend, shard_size="30KB")
            self.single[key] = result, manifest(output)
        return self.single[key]


def save_checkpoint_in(folder: Path, name: str, tensors: dict[str, torch.Tensor], shards: int) -> Path:
    from safetensors.torch import save_file

    place = folder / name
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "test"}')
    names = list(tensors)
    files = {key: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(names)}
    for file in set(files.values()):
        save_file({key: tensors[key].contiguous() for key in names if files[key] == file}, place / file)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return place


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest without the times of the run."""
    found: dict[str, Any] = json.loads((folder / "merge_manifest.json").read_text())
    return {key: value for key, value in found.items() if key not in ("ledger", "files", "backend")}


def counts_of(result: MergeResult) -> Any:
    return {each.name: (each.elements, each.counts) for each in result.per_tensor}


CUDA = EmulatedCudaBackend()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    given_recipes=st.lists(recipes(), min_size=1, max_size=5),
    memory=st.sampled_from(["700KB", "2MB", "400MB"]),
    backend=st.sampled_from(["cpu", CUDA]),
    way=st.sampled_from(["cached", "direct"]),
)
def test_any_sweep_equals_single_runs(
    inputs: Inputs,
    tmp_path_factory: pytest.TempPathFactory,
    given_recipes: list[dict[str, Any]],
    memory: str,
    backend: Any,
    way: str,
) -> None:
    everything = {"merge_method": "ties", "base_model": "o", "models": [{"model": "a"}, {"model": "b"}]}
    everything |= {"parameters": {"weight": 1}, "dtype": "bfloat16"}
    chosen = [everything, *given_recipes]
    output = tmp_path_factory.mktemp("sweep")
    named = {f"r{number}": inputs.recipe(each) for number, each in enumerate(chosen)}
    with mock.patch("merge_engine.engine.scheduling.way_here", lambda files: way):
        result = me.sweep(named, output, backend=backend, memory=memory, shard_size="30KB", report=False)
    given_away: dict[str, dict[str, torch.Tensor]] = {label: {} for label in named}

    def take(label: str, name: str, tensor: torch.Tensor) -> None:
        assert name not in given_away[label]
        given_away[label][name] = tensor

    by_function = me.sweep(named, take, backend=backend, memory=memory)
    for (label, found), each in zip(result.results.items(), chosen, strict=True):
        expected, written = inputs.alone(each, backend)
        assert manifest(output / label) == written
        assert counts_of(found) == counts_of(by_function.results[label]) == counts_of(expected)
        assert found.counts == by_function.results[label].counts == expected.counts
        assert found.warnings == expected.warnings
        assert digests(given_away[label]) == {name: one["digest"] for name, one in written["tensors"].items()}


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    from merge_engine.observe.digests import Digests

    found = Digests({name: tensor.nbytes for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if tensor.nbytes:
            found.add(name, 0, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return found.by_name()


def ties(inputs: Inputs, **parameters: Any) -> dict[str, Any]:
    given = {"merge_method": "ties", "base_model": "o", "models": [{"model": "a"}, {"model": "b"}]}
    return inputs.recipe({**given, "parameters": {"weight": 0.5, "density": 0.3, **parameters}})


def test_inputs_are_read_once(inputs: Inputs) -> None:
    read = me.run(ties(inputs)).ledger.compute.bytes
    grid = me.grid(ties(inputs), density=[0.1, 0.2, 0.3], sign_slack=[0, 2])
    assert me.sweep(grid, lambda *_: None).ledger.compute.bytes == read


def test_an_interrupted_sweep_goes_on(inputs: Inputs, tmp_path: Path) -> None:
    """After complete outputs and complete shards, with shared needs; others of the same inputs may be added."""
    grid = me.grid(ties(inputs, trim_scope="model"), density=[0.2, 0.5])
    expected = {label: me.run(recipe).tensors for label, recipe in grid.items()}
    options: dict[str, Any] = {"report": False, "shard_size": "10KB", "device": "cpu"}
    me.sweep({"density=0.2": grid["density=0.2"]}, tmp_path, **options)
    finished = (tmp_path / "density=0.2" / "merge_manifest.json").stat().st_mtime_ns

    class Stop(Exception):
        pass

    def stop(nbytes: int) -> None:
        time.sleep(0.02)
        if list(tmp_path.glob("*/*.record.part")):
            raise Stop

    with pytest.raises(Stop):
        me.sweep(grid, tmp_path, progress=stop, memory="150KB", **options)
    kept = len(list(tmp_path.glob("*/*.record.part")))
    result = me.sweep(me.grid(ties(inputs, trim_scope="model"), density=[0.2, 0.5, 0.7]), tmp_path, **options)
    assert result.taken_over == ("density=0.2",)
    assert (tmp_path / "density=0.2" / "merge_manifest.json").stat().st_mtime_ns == finished
    assert kept and any(f"{kept} of" in note for note in result.results["density=0.5"].notes)
    for label, tensors in expected.items():
        assert tensors is not None
        written = manifest(tmp_path / label)["tensors"]
        assert digests(dict(tensors)) == {name: one["digest"] for name, one in written.items()}
        assert result.results[label].counts == me.run(grid[label]).counts


def test_a_value_too_large_names_its_recipe_and_costs_the_others_nothing(
    inputs: Inputs, tmp_path: Path
) -> None:
    given = ties(inputs) | {"out_dtype": "float16"}
    late = given | {
        "parameters": {**given["parameters"], "lambda": [{"filter": "1.w", "value": 1e9}, {"value": 1}]}
    }
    options: dict[str, Any] = {"shard_size": "10KB", "memory": "150KB", "report": False, "device": "cpu"}
    read = 0

    def wait(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        end = time.monotonic() + 20
        while read >= 3 * 2 * 6 * 4096 and not list(tmp_path.glob("fine/*.record.part")):  # the first tensor
            assert time.monotonic() < end
            time.sleep(0.01)

    with pytest.raises(me.NonFiniteError) as caught:
        me.sweep({"fine": given, "late": late}, tmp_path, progress=wait, **options)
    (problem,) = caught.value.problems
    assert problem.startswith("late: layers.1.w: ") and "shards are complete" in problem
    kept = {path.parent.name for path in tmp_path.glob("*/*.record.part")}
    assert kept == {"fine"} and not list(tmp_path.glob("*/merge_manifest.json"))
    result = me.sweep({"fine": given}, tmp_path, **options)
    assert "complete from an earlier run" in result.results["fine"].notes[-1]


def test_an_exception_of_the_function_ends_the_sweep(inputs: Inputs) -> None:
    class Mine(Exception):
        pass

    calls = []

    def fail(label: str, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        raise Mine(name)

    with pytest.raises(Mine):
        me.sweep(me.grid(ties(inputs), density=[0.2, 0.5]), fail)
    assert len(calls) == 1


def test_few_whole_tensors_are_in_memory_at_a_time(inputs: Inputs) -> None:
    """A tensor whose outputs do not fit into the memory budget together is read for a part of the recipes at a time."""
    grid = me.grid(ties(inputs), density=[i / 10 for i in range(1, 10)])
    found: dict[Any, torch.Tensor] = {}
    order: list[str] = []

    def take(label: str, name: str, tensor: torch.Tensor) -> None:
        found[label, name] = tensor
        if name == "embed.weight":
            order.append(label)

    for backend in ("cpu", CUDA):
        order.clear()
        result = me.sweep(grid, take, memory="150KB", backend=backend)
        rounds = [sorted(order[at : at + 3]) for at in (0, 3, 6)]
        assert [label for each in rounds for label in each] == list(grid)  # four of them would not fit
        assert result.ledger.compute.bytes >= 3 * 2 * 6 * 4096
        for label in ("density=0.1", "density=0.9"):
            expected = me.run(grid[label]).tensors
            assert expected is not None
            assert all(torch.equal(found[label, name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("list_of_folders", [False, True])
def test_places_of_the_outputs(inputs: Inputs, tmp_path: Path, list_of_folders: bool) -> None:
    recipes = {"a/b": ties(inputs), ".c": ties(inputs, density=0.4)}
    places = [tmp_path / "x", tmp_path / "y"] if list_of_folders else tmp_path
    result = me.sweep(recipes, places, report=False)
    folders = [merged.output for merged in result.results.values()]
    assert folders == (
        [tmp_path / "x", tmp_path / "y"] if list_of_folders else [tmp_path / "a_b", tmp_path / "_c"]
    )
    assert all(me.verify(folder).complete for folder in folders if folder is not None)


def problems(kind: type[me.MergeError], *arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(kind) as caught:
        me.sweep(*arguments, **options)
    return caught.value.problems


def test_recipes_that_cannot_be_swept(inputs: Inputs, tmp_path: Path) -> None:
    one, out = ties(inputs), tmp_path / "out"
    documents = tmp_path / "two.yaml"
    documents.write_text(
        "merge_method: linear\nmodels: [{model: a}]\nname: x\n---\nmerge_method: linear\nmodels: [{model: x}]"
    )
    assert problems(me.OptionError, {}, out) == ["recipes: a sweep has 1 to 4,096 recipes, not 0"]
    assert problems(me.OptionError, [one] * 4097, out)[0].endswith("not 4,097")
    assert problems(me.OptionError, "recipe.yaml", out)[0].startswith("recipes: must be a mapping")
    assert problems(me.OptionError, {1: one}, out) == ["recipes: a label must be text, not 1"]
    assert problems(me.OptionError, [one, one], [out]) == [
        "outputs: 1 folder for 2 recipes; give one for each"
    ]
    assert problems(me.OptionError, [one, one], [out, out])[0].startswith(f"{out}: is the output of")
    assert problems(me.OptionError, {"x": one, "y": one}, [out, out / "a" / "b"]) == [
        f'{out / "a" / "b"}: lies in the output of "x"; give it a folder beside it'
    ]
    assert problems(me.OptionError, {"a/b": one, "a_b": one}, out)[0].startswith(f"{out / 'a_b'}: is the")
    assert problems(me.OptionError, {"x" * 300: one}, out)[0].endswith("choose another label")
    assert problems(me.RecipeError, [documents], out)[0].endswith("give it a file of its own")
    assert problems(me.RecipeError, {"x": one, "y": one | {"sed": 1}}, out)[0].startswith("y: unknown key")
    assert not out.exists()


def test_scores_that_are_none(inputs: Inputs) -> None:
    swept = me.sweep({"x": ties(inputs)}, lambda label, name, tensor: None)
    for scores, said in (
        ({"y": {"a": 1}}, 'the sweep has no recipe "y"'),
        ({"x": 1}, "x: must be a map of names to scores, not 1"),
        ({"x": {"a": "good"}}, "x: a must be a number, or a pair with its standard error"),
    ):
        with pytest.raises(me.OptionError, match=said):
            swept.write_page("page.html", scores=scores)  # type: ignore[arg-type]


def test_all_problems_of_all_recipes_are_named_at_once(inputs: Inputs, tmp_path: Path) -> None:
    copy = shutil.copytree(inputs.paths["b"], tmp_path / "copy")
    strange = {"merge_method": "linear", "models": [{"model": str(copy), "parameters": {"weight": 1}}]}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    recipes = {"full": ties(inputs), "wrong": ties(inputs, density=2), "fine": ties(inputs)}
    assert problems(me.PlanError, recipes, tmp_path) == [
        f"full: {tmp_path / 'full'}: is not empty; choose another folder or pass --overwrite",
        "wrong: parameters.density: must be a number with 0 <= density <= 1, not 2",
    ]
    assert problems(me.PlanError, {"fine": ties(inputs), "strange": strange}, tmp_path) == [
        f"strange: merges {copy}, which fine does not; the recipes of a sweep share their inputs: merge this one on "
        "its own"
    ]
    missing = {label: ties(inputs) | {"base_model": "nowhere/at/all"} for label in "xy"}
    assert len(problems(me.CheckpointError, missing, tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "full"]


def test_a_grid_has_every_combination() -> None:
    recipe = {"merge_method": "ties", "base_model": "o", "models": [{"model": "a"}, {"model": "b"}]}
    grid = me.grid(recipe, density=[0.2, [0.1, 0.5]], **{"weight[1]": [1], "dtype": ["float32", None]})
    assert list(grid) == [
        "density=0.2,weight[1]=1,dtype=float32",
        "density=0.2,weight[1]=1,dtype=null",
        "density=[0.1,0.5],weight[1]=1,dtype=float32",
        "density=[0.1,0.5],weight[1]=1,dtype=null",
    ]
    last = grid["density=[0.1,0.5],weight[1]=1,dtype=null"]
    assert last.dtype is None and last.models is not None
    assert [entry.parameters for entry in last.models] == [{"density": 0.1}, {"density": 0.5, "weight": 1}]


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, "the grid has no axes"),
        ({"density": []}, "density: has no values"),
        ({"density": 0.2}, "density: must be a list of values, not 0.2"),
        ({"density": [0.2, 0.2]}, "density: has the value 0.2 twice"),
        ({"density": [i / 100 for i in range(100)], "seed": list(range(50))}, "the grid has 5,000 recipes"),
        ({"densty": [0.2, 0.5]}, "densty: is no parameter of ties"),
        ({"density": [0.2, 1.5]}, "density: must be a number with 0 <= density <= 1, not 1.5"),
        (
            {"merge_method": ["ties", "linear"], "density": [1]},
            "merge_method=linear,density=1: density: is no",
        ),
        (
            {"merge_method": ["ties", "linear"], "density": [1, 0.5]},
            "merge_method=linear,density=1, merge_method=linear,density=0.5: density: is no",
        ),
    ],
)
def test_grids_that_cannot_be(axes: dict[str, Any], expected: str) -> None:
    recipe = {"merge_method": "ties", "base_model": "o", "models": [{"model": "a"}]}
    with pytest.raises(me.RecipeError) as caught:
        me.grid(recipe, **axes)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(expected)


def test_norms_on_the_page(inputs: Inputs, tmp_path: Path) -> None:
    result = me.sweep({"a": ties(inputs), "b": ties(inputs, density=0.4)}, tmp_path, norms=True)
    assert result.page is not None
    recipes = json.loads(result.page.with_suffix(".json").read_text())["recipes"]
    assert all(recipe["merged_norm"] > 0 for recipe in recipes)
    with pytest.raises(me.OptionError, match="norms: stand on the page of a sweep"):
        me.sweep({"a": ties(inputs)}, tmp_path / "other", report=False, norms=True)
    assert not (tmp_path / "other").exists()
