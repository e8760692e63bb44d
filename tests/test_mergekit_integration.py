"""mergekit's Python interface on our engine: arguments, gradients, errors, and mergekit itself served by it."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import merge_engine as me
from merge_engine.cli.mergekit import Options
from merge_engine.integrations import mergekit
from merge_engine.integrations.mergekit.formulas import FORMULAS
from merge_engine.integrations.mergekit.options import NAMES
from merge_engine.integrations.mergekit.sparsifying import sparsify
from merge_engine.methods import METHODS, Method
from merge_engine.recipe import Parameter

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "oracle" / "mergekit_served.py"
CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text("utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
VALUES = {
    "weight": [0.6, -0.3, 0.9],
    "t": 0.4,
    "density": 0.7,
    "rescale": True,
    "lambda": 0.8,
    "epsilon": 0.1,
}
NOT_DIFFERENTIABLE = ("sce",)
DIFFERENTIABLE = sorted(METHODS.keys() - set(NOT_DIFFERENTIABLE))


def value_of(method: Method, parameter: Parameter, models: int) -> Any:
    value = VALUES[parameter.name]
    return value[:models] if isinstance(value, list) else value


def arguments(name: str) -> tuple[int, dict[str, Any]]:
    """A number of models, and parameters for them."""
    method = METHODS[name]
    models = min(3, method.max_models or 3)
    return models, {p.name: value_of(method, p, models) for p in method.parameters if p.name in VALUES}


def inputs(name: str, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The base, if the method has one, and models."""
    models, _ = arguments(name)
    generator = torch.Generator().manual_seed(11)
    count = models + METHODS[name].uses_base
    return [torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def merged(name: str, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """Through the integration, with the base first, and always the same draws."""
    torch.manual_seed(3)
    base = 0 if METHODS[name].uses_base else None
    return mergekit.merge_tensors(
        list(tensors), name, base_index=base, parameters=arguments(name)[1], **options
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(name)]
    assert torch.autograd.gradcheck(lambda *x: merged(name, *x), tensors, fast_mode=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_with_gradients_are_the_bytes_of_the_engine(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        tensors = inputs(name, dtype)
        plain = merged(name, *tensors, out_dtype=torch.float16)
        followed = merged(name, *(tensor.requires_grad_() for tensor in tensors), out_dtype=torch.float16)
        assert plain.requires_grad is False and followed.requires_grad
        assert torch.equal(plain.view(torch.int16), followed.detach().view(torch.int16))
        followed.sum().backward()
        assert all(tensor.grad is not None and tensor.grad.dtype == dtype for tensor in tensors)


@pytest.mark.parametrize("name", sorted(FORMULAS.keys() & METHODS.keys()))
def test_formulas_have_the_values_of_the_engine(name: str) -> None:
    tensors, (models, given) = inputs(name), arguments(name)
    by_name = {p.name: given.get(p.name, p.default) for p in METHODS[name].parameters}
    base = tensors.pop(0) if METHODS[name].uses_base else None
    assert len(tensors) == models
    expected = me.merge_tensors(base, tensors, name, **given)
    torch.testing.assert_close(FORMULAS[name](base, tensors, by_name), expected)


def test_nothing_is_recorded_without_need() -> None:
    a, b = torch.ones(3, requires_grad=True), torch.zeros(3)
    with torch.no_grad():
        assert not mergekit.merge_tensors([a, b], "linear", parameters={"weight": 1}).requires_grad
    result = mergekit.merge_tensors([a, b], "linear", parameters={"weight": [0.25, 0.75]})
    [gradient] = torch.autograd.grad(result.sum(), [a], create_graph=True)
    assert gradient.tolist() == [0.25] * 3
    result.mul_(2)  # it is a tensor like any other
    assert torch.autograd.grad(result.sum(), [a])[0].tolist() == [0.5] * 3


@given(st.permutations(["base", "x", "y", "z"]), st.sampled_from(["ids", "order", "one"]))
@settings(max_examples=25)
def test_parameters_belong_to_ids(order: list[str], form: str) -> None:
    weights = {"x": 0.5, "y": -0.25, "z": 1.0} if form != "one" else dict.fromkeys("xyz", 0.75)
    tensors = {name: torch.randn(7, generator=torch.Generator().manual_seed(ord(name[0]))) for name in order}
    models = [name for name in order if name != "base"]
    given: Any = {
        "ids": {**weights, "base": 9.0},
        "order": [weights[name] for name in models],
        "one": 0.75,
    }[form]
    found = mergekit.merge_tensors(
        [tensors[name] for name in order],
        "ties",
        ids=order,
        base_index=order.index("base"),
        parameters={"weight": given, "density": 0.5},
    )
    expected = me.merge_tensors(
        tensors["base"],
        [tensors[name] for name in models],
        "ties",
        weight=[weights[name] for name in models],
        density=0.5,
    )
    assert torch.equal(found, expected)
    state_dicts = {name: {"tensor": tensors[name]} for name in order}
    again = mergekit.merge_state_dicts(
        state_dicts, "ties", base="base", parameters={"weight": given, "density": 0.5}
    )
    assert torch.equal(again["tensor"], expected)


def test_a_base_that_the_method_does_not_use_is_a_model() -> None:
    a, b = torch.tensor([1.0]), torch.tensor([4.0])
    found = mergekit.merge_tensors([a, b], "linear", base_index=0, parameters={"weight": [2.0, 1.0]})
    assert found.tolist() == [2.0]


def test_modules_mappings_and_buffers() -> None:
    modules = [torch.nn.BatchNorm1d(2) for _ in range(2)]
    for factor, module in enumerate(modules):
        torch.nn.init.constant_(module.weight, float(factor))
    found = mergekit.merge_state_dicts(modules, "linear", parameters={"weight": [1.0, 3.0]})
    assert list(found) == list(modules[0].state_dict())
    assert found["weight"].tolist() == [0.75] * 2 and found["num_batches_tracked"].dtype == torch.int64
    found["weight"].sum().backward()
    gradients = [module.weight.grad for module in modules]
    assert [g is not None and g.tolist() for g in gradients] == [[0.25, 0.25], [0.75, 0.75]]
    modules[1].num_batches_tracked += 1
    with pytest.raises(me.PlanError, match=r"num_batches_tracked: is torch\.int64, which is copied"):
        mergekit.merge_state_dicts(modules, "linear", parameters={"weight": 1.0})


def test_keys_must_agree_unless_told() -> None:
    models = [{"w": torch.ones(1), "x": torch.ones(1)}, {"w": torch.zeros(1), "y": torch.ones(1)}]
    with pytest.raises(me.PlanError) as caught:
        mergekit.merge_state_dicts(models, "linear", parameters={"weight": 1.0})
    assert caught.value.problems == [
        "0: lacks y, which other models have; strict=False merges what all have",
        "1: lacks x, which other models have; strict=False merges what all have",
    ]
    found = mergekit.merge_state_dicts(models, "linear", parameters={"weight": 1.0}, strict=False)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"w": [0.5]}


def test_torch_seeds_the_draws() -> None:
    base, model = torch.zeros(500), torch.ones(500)

    def kept() -> torch.Tensor:
        given = {"weight": 1.0, "density": 0.5, "rescale": False}
        return mergekit.merge_tensors([base, model], "dare_linear", base_index=0, parameters=given)

    torch.manual_seed(1)
    first, second = kept(), kept()
    torch.manual_seed(1)
    assert torch.equal(kept(), first) and not torch.equal(first, second)


def test_input_and_output_dtype_differ() -> None:
    tensor = torch.tensor([1.003])
    scaled = {"parameters": {"scale": 1000.0}}
    assert mergekit.merge_tensors([tensor], "passthrough", dtype=torch.bfloat16, **scaled).item() == 1000
    assert mergekit.merge_tensors([tensor], "passthrough", out_dtype=torch.bfloat16, **scaled).item() == 1004


ONE, TWO = torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": ["a"]}, "ids: 1 for 2 tensors; give one for each"),
        ({"ids": ["a", "a"]}, "ids: two inputs have the same id; give each its own"),
        ({"ids": ["a", None]}, "ids: an input's id cannot be None; give it another"),
        ({"base_index": 2}, "base_index: must be the position of one of 2 tensors, not 2"),
        ({"method": "ties"}, "ties: requires a base input; say which one it is"),
        ({"parameters": {}}, "weight: required by linear; add it to parameters"),
        (
            {"parameters": {"weight": [1.0]}},
            "weight: 1 values for 2 inputs; give one for each, or one for all",
        ),
        ({"parameters": {"weight": {0: 1.0}}}, "weight: has no value for [1]; add one for each input"),
        (
            {"dtype": torch.int64},
            "dtype: must be a floating-point torch.dtype, one of torch.float16, torch.bfloat16, torch.float32, "
            "torch.float64, not torch.int64",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_value_errors_of_one_line(given: dict[str, Any], message: str) -> None:
    call = {"method": "linear", "parameters": {"weight": 1.0}, **given}
    with pytest.raises(ValueError) as caught:
        mergekit.merge_tensors([ONE, TWO], **call)
    assert str(caught.value) == message and isinstance(caught.value, me.MergeError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([], {}, "models: at least one is needed"),
        ([3], {}, "0: must be a module or a state dict, not an object of type int"),
        ({"a": {"w": ONE}}, {"base": "b"}, "base: 'b' is not the id of an input; choose one of ['a']"),
    ],
)
def test_wrong_models_are_value_errors_of_one_line(models: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        mergekit.merge_state_dicts(models, "linear", parameters={"weight": 1.0}, **options)
    assert str(caught.value) == message


@given(st.integers(0, 60), st.floats(-0.5, 1.5), st.sampled_from(["magnitude", "magnitude_outliers"]))
@settings(max_examples=25)
def test_sparsify_keeps_an_exact_number(size: int, density: float, method: str) -> None:
    tensor = torch.ones(size)  # all magnitudes are equal
    kept = sparsify(tensor, density, method, gamma=0.2, rescale_norm="l1")
    share = min(max(density, 0.0), 1.0)
    least = 1 if method == "magnitude" and size and share > 0 else 0
    assert int(kept.count_nonzero()) == (size if share == 1 else max(least, int(share * size)))


def test_checkpoints(
    save_checkpoint: SaveCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [save_checkpoint(str(i), {"w": torch.full((64,), 2.0 * i)}) for i in range(2)]
    config: dict[str, Any] = {
        "merge_method": "dare_linear",
        "base_model": str(paths[0]),
        "models": [{"model": str(paths[1]), "parameters": {"weight": 1.0, "density": 0.5}}],
    }
    results = []
    for seed in (None, 0, 1):
        options = {"random_seed": seed, "num_threads": 1, "allow_crimes": True, "quiet": True}
        mergekit.run_merge(config, tmp_path / "out", options)
        results.append(load_file(tmp_path / "out" / "model.safetensors")["w"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    with caplog.at_level("WARNING"):
        config["parameters"] = {"t": 0.5}  # of slerp
        mergekit.run_merge(config, tmp_path / "out")
    assert "parameters.t" in caplog.text
    with pytest.raises(ValueError, match="nowhere: there is no such"):
        mergekit.run_merge({**config, "base_model": str(tmp_path / "nowhere")}, tmp_path / "out2")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"random_seed": -1}, "random_seed: must be a whole number from 0 to 2**64 - 1, not -1"),
        ({"random_seed": "7"}, "random_seed: must be a whole number from 0 to 2**64 - 1, not '7'"),
        ({"random_sed": 7}, 'random_sed: there is no such option; did you mean "random_seed"?'),
        ({"safe_serialization": False}, "safe_serialization: only safetensors are written; leave it out"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(me.OptionError) as caught:
        mergekit.run_merge(
            {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}, tmp_path / "out", options
        )
    assert caught.value.problems == [said]
    assert not (tmp_path / "out").exists()


def test_options_are_those_of_the_command_line() -> None:
    assert {each.name for each in fields(Options)} == NAMES


def test_nothing_is_imported_before_it_is_used() -> None:
    program = (
        "import sys; import merge_engine; assert 'merge_engine.integrations' not in sys.modules;"
        "from merge_engine.integrations import evolve, mergenetic;"
        "from merge_engine.integrations.mergekit import merge_tensors, run_merge; assert 'mergekit' not in sys.modules;"
        "from merge_engine.integrations import mergekit; mergekit.uninstall()\n"
        "try: mergekit.install()\n"
        "except merge_engine.BackendError as error: print(error)"
    )
    # Without site packages that hold mergekit: a module that cannot be imported.
    blocked = "import sys; sys.modules['mergekit'] = None; " + program.replace(
        "assert 'mergekit' not in sys.modules;", "assert sys.modules['mergekit'] is None;"
    )
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mergekit cannot be served: ")
    assert done.stdout.rstrip().endswith("install mergekit 0.1.5, or call the functions of this module")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str | None]:
    """What came of each check in mergekit's environment."""
    python = os.environ.get("MERGE_ENGINE_ORACLE")
    if not python:
        pytest.skip("MERGE_ENGINE_ORACLE is not set (tests/oracle/README.md)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, str(SCRIPT)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("name", CHECKS)
def test_mergekit_served(outcomes: dict[str, str | None], name: str) -> None:
    assert outcomes[name] is None, outcomes[name]
