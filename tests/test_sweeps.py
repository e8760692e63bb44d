"""Sweeps: the bytes, counts and manifests of single runs, from one reading; what is resumed, and what is refused."""

from __future__ import annotations

import json
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
