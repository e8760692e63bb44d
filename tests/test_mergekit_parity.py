"""`arithmetic: mergekit` with `ties: index` gives the bytes of mergekit 0.1.5 on CPU.

mergekit runs in an environment of its own (tests/oracle/README.md), once for everything here.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adversarial import generator, quantised_models
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merge_engine as me

pytestmark = pytest.mark.oracle

SCRIPT = Path(__file__).parent / "oracle" / "mergekit_oracle.py"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1,), (7,), (1000,), (4099,), (33, 31), (5, 1, 7))
MODELS = 8
TRIMMED = ("ties", "breadcrumbs", "breadcrumbs_ties")
ELEMENTWISE = ("nearswap", "ram", "ramplus_tl", "sce")
METHODS = (
    "linear", "task_arithmetic", *TRIMMED, "dare_linear", "dare_ties", "della", "della_linear", *ELEMENTWISE
)  # fmt: skip
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "nearswap": ({"t": 1e-3}, {"t": 1e-6}, {"t": 0.1}),
    "ram": ({}, {"epsilon": 3e-3}, {"epsilon": 0.0}),
    "ramplus_tl": ({}, {"r": 0.7, "alpha": 3.0}, {"epsilon": 3e-3}),
    "sce": ({}, {"select_topk": 0.3}, {"select_topk": 0.77}, {"select_topk": 0.0}),
}
"""Of methods without weights and densities."""
WEIGHTS = ((1.0,), (0.6, -0.3, 1.1, 0.37, 0.1), (0.5, 0.5, -0.5, 0.25), (-0.7, -0.23))
DENSITIES = (0.0, 1e-4, 0.2, 0.5, 0.9, 1.0)
GAMMAS = (0.0, 0.01, 0.3)
SCALES = (1.0, 0.7, -1.0)


@dataclass(frozen=True)
class Case:
    """One merge of one tensor by both engines."""

    method: str
    data: str
    models: int
    options: dict[str, Any] = field(hash=False)
    stable: bool = True

    @property
    def id(self) -> str:
        sort = "" if self.stable else " unstable"
        return f"{self.method} {self.data} x{self.models} {json.dumps(self.options)}{sort}"

    @property
    def names(self) -> list[str]:
        models = [f"{self.data} {i}" for i in range(self.models)]
        return models if self.method == "linear" else [f"{self.data} base", *models]

    def job(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "method": self.method,
            "base": self.method != "linear",
            "tensors": self.names,
            "parameters": self.options,
            "stable": self.stable,
        }

    def merged(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = [tensors[name] for name in self.names]
        base = None if self.method == "linear" else inputs.pop(0)
        options = dict(self.options)
        if self.method in (*TRIMMED, "sce"):
            options["ties"] = "index"
        if self.method == "ramplus_tl":
            options["out_dtype"] = "float32"  # mergekit's choice
        return me.merge_tensors(base, inputs, self.method, arithmetic="mergekit", **options)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_inputs() -> dict[str, torch.Tensor]:
    """Task vectors with heavy ties, and random ones, in every type and shape."""
    tensors = {}
    for dtype, shape in itertools.product(FLOATS, SHAPES):
        size = math.prod(shape)
        g = generator(size, 5)
        base = torch.randn(size, generator=g) * 0.02
        noisy = [base + torch.randn(size, generator=g) * 0.005 for _ in range(MODELS)]
        for kind, (origin, models) in {
            "tied": quantised_models(size, MODELS, dtype, seed=3),
            "random": (base.to(dtype), [model.to(dtype) for model in noisy]),
        }.items():
            for start, zero in (
                (5, 0.0),
                (6, -0.0),
            ):  # the models disagree with some of these, and not with others
                origin[start::11] = zero
                for i, model in enumerate(models):
                    model[start :: 11 * (i + 1)] = zero
            data = f"{name_of(dtype)} {'x'.join(map(str, shape))} {kind}"
            tensors[f"{data} base"] = origin.view(shape)
            tensors |= {f"{data} {i}": model.view(shape) for i, model in enumerate(models)}
    return tensors


def make_cases() -> list[Case]:
    """Every density and normalization for every method and input; the other options are drawn."""
    cases: dict[str, Case] = {}
    drawn = random.Random(0)
    for dtype, shape, kind, method in itertools.product(FLOATS, SHAPES, ("tied", "random"), METHODS):
        data = f"{name_of(dtype)} {'x'.join(map(str, shape))} {kind}"
        if method in ELEMENTWISE:
            if method == "sce" and dtype == torch.float32:
                continue  # see test_sce_in_float32
            for options in OPTIONS[method]:
                case = Case(method, data, 1 if method == "nearswap" else drawn.randint(1, MODELS), options)
                cases.setdefault(case.id, case)
            continue
        densities = DENSITIES if method in TRIMMED else (1.0,)
        repeats = range(6 if method in ("linear", "task_arithmetic") else 1)
        for density, normalize, _ in itertools.product(densities, (False, True), repeats):
            models = drawn.randint(1, MODELS)
            weights = drawn.choice(WEIGHTS)
            options: dict[str, Any] = {
                "weight": [weights[i % len(weights)] for i in range(models)],
                "normalize": normalize,
            }
            if method == "linear":
                if normalize and sum(options["weight"]) == 0:
                    continue
            else:
                options["lambda"] = drawn.choice(SCALES)
            if method not in ("linear", "task_arithmetic"):
                options["density"] = density
            if method.startswith("breadcrumbs"):
                options["gamma"] = drawn.choice(GAMMAS)
            case = Case(method, data, models, options)
            cases.setdefault(case.id, case)
    return list(cases.values())


UNSTABLE = [
    Case("ties", f"{name_of(dtype)} 4099 tied", 1, {"weight": [1.0], "density": density}, stable=False)
    for dtype, density in itertools.product(FLOATS, (0.2, 0.25, 0.5))
]

RESCALED = [
    Case(
        method,
        f"{name_of(dtype)} {shape} {kind}",
        models,
        {"weight": [1.0, 0.5, -0.3][:models], "density": density, "rescale": True},
    )
    for method, dtype, shape, kind, models, density in itertools.product(
        ("ties", "breadcrumbs"), FLOATS[:2], ("4099", "33x31", "7"), ("tied", "random"), (1, 3), (0.2, 0.6)
    )
]


IN_FLOAT32 = [
    Case("sce", f"float32 {shape} random", models, {"select_topk": share})
    for shape, models, share in itertools.product(("4099", "33x31"), (2, 4), (0.4, 1.0))
]


def llama(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of a tiny Llama of two layers."""
    hidden, middle, vocabulary, heads = 16, 24, 40, 8
    g = generator(seed, 17)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (heads, hidden),
            f"{prefix}self_attn.v_proj.weight": (heads, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (middle, hidden),
            f"{prefix}mlp.up_proj.weight": (middle, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, middle),
        }
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return {name: (torch.randn(shape, generator=g) * 0.02).to(dtype) for name, shape in shapes.items()}


LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

RECIPES = {
    "gradients, filters and precedence": """
        merge_method: ties
        models:
          - model: BASE
          - model: A
            parameters:
              density: [0.2, 0.9]
              weight:
                - {filter: mlp, value: [0.1, 0.6]}
                - {filter: self_attn, value: -0.4}
                - {value: 1.1}
          - model: B
            parameters:
              density: [{filter: down_proj, value: 0.3}]
              weight: [0, 1, 0.25]
        parameters: {density: 0.7, lambda: [{filter: layernorm, value: 0.5}, {value: 1}]}
        base_model: BASE
        dtype: bfloat16
        """,
    "float32 inside, bfloat16 outside": """
        merge_method: ties
        models:
          - {model: A, parameters: {density: 0.35, weight: 0.6}}
          - {model: B, parameters: {density: 0.6, weight: "0.5"}}
          - {model: C, parameters: {density: 1, weight: -0.25}}
        parameters: {normalize: false, lambda: 0.7}
        base_model: BASE
        dtype: float32
        out_dtype: bfloat16
        """,
    "types promoted tensor by tensor": """
        merge_method: breadcrumbs_ties
        models:
          - {model: A, parameters: {weight: [1, 0.5], gamma: 0.05}}
          - {model: C, parameters: {weight: 0.5, density: [0.5, 0.2]}}
        parameters: {density: 0.8, gamma: [0, 0.2], normalize: true}
        base_model: BASE
        """,
    "one filter for all": """
        merge_method: breadcrumbs
        models:
          - {model: B, parameters: {weight: [{filter: "*", value: [-1, 1]}]}}
          - {model: A, parameters: {density: 0.4}}
        parameters: {weight: 0.3, density: [{filter: layers.1., value: 0.2}, {value: 0.6}], gamma: 0.01}
        base_model: BASE
        dtype: float16
        """,
    "linear with gradients": """
        merge_method: linear
        models:
          - {model: A, parameters: {weight: [{filter: lm_head, value: 0.25}, {value: [1, 0]}]}}
          - {model: B, parameters: {weight: [0.1, 1]}}
          - {model: C, parameters: {weight: -0.3}}
        dtype: bfloat16
        """,
    "task arithmetic in float16": """
        merge_method: task_arithmetic
        models:
          - {model: A, parameters: {weight: [0.3, -0.6]}}
          - {model: C}
        parameters: {weight: 0.5, normalize: [{filter: mlp, value: true}, {value: false}], lambda: -1}
        base_model: BASE
        dtype: float16
        out_dtype: float32
        """,
    "stacked layers, scaled": """
        merge_method: passthrough
        slices:
          - sources: [{model: A, layer_range: [0, 2]}]
          - sources:
              - model: C
                layer_range: [1, 2]
                parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0}, {value: 1}]}
          - sources: [{model: B, layer_range: [0, 2], parameters: {scale: [0.5, 0.75]}}]
        dtype: bfloat16
        """,
    "pruned, with the head of another": """
        merge_method: passthrough
        slices:
          - sources: [{model: A, layer_range: [1, 2]}]
          - sources: [{model: B, layer_range: [2, 2]}]
        dtype: bfloat16
        """,
    "slices of a mean": """
        merge_method: linear
        slices:
          - sources:
              - {model: A, layer_range: [0, 2], parameters: {weight: [0.25, 0.5]}}
              - {model: B, layer_range: [0, 2], parameters: {weight: [{filter: "layers.1.mlp", value: 2}, {value: 1}]}}
          - sources:
              - {model: B, layer_range: [1, 2]}
              - {model: C, layer_range: [0, 1], parameters: {weight: [{filter: layers.0, value: -0.3}, {value: 1}]}}
            parameters: {weight: [0.7, 0.2], normalize: [{filter: layers.2., value: false}, {value: true}]}
        dtype: bfloat16
        """,
    "slices of task vectors": """
        merge_method: ties
        slices:
          - sources:
              - {model: BASE, layer_range: [0, 1]}
              - {model: A, layer_range: [0, 1], parameters: {density: 0.3}}
              - {model: B, layer_range: [0, 1]}
          - sources:
              - {model: B, layer_range: [0, 2]}
              - {model: BASE, layer_range: [0, 2]}
              - {model: A, layer_range: [0, 2]}
            parameters: {density: [0.8, 0.4], weight: [1, 0.5], lambda: 0.5}
        parameters: {density: 0.6, weight: 0.5}
        base_model: BASE
        dtype: bfloat16
        """,
    "a base for each slice": """
        merge_method: task_arithmetic
        slices:
          - sources: [{model: BASE, layer_range: [0, 1]}, {model: A, layer_range: [0, 1]}]
          - sources: [{model: A, layer_range: [1, 2]}, {model: B, layer_range: [0, 1]}]
            base_model: A
        parameters: {weight: 0.5}
        base_model: BASE
        dtype: bfloat16
        """,
    "the whole model as a module": """
        merge_method: ties
        modules:
          default:
            slices:
              - sources:
                  - {model: A, layer_range: [0, 2], parameters: {density: 0.5, weight: 0.5}}
                  - {model: BASE, layer_range: [0, 2]}
                  - {model: B, layer_range: [0, 2], parameters: {density: [0.2, 0.7], weight: 0.4}}
            parameters: {normalize: false}
        parameters: {lambda: 0.9}
        base_model: BASE
        dtype: bfloat16
        """,
}


def at_places(value: Any, places: Mapping[str, Path]) -> Any:
    """Plain data with paths in place of the names of models."""
    if isinstance(value, dict):
        return {key: at_places(each, places) for key, each in value.items()}
    if isinstance(value, list):
        return [at_places(each, places) for each in value]
    return str(places[value]) if isinstance(value, str) and value in places else value


def write_recipes(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Checkpoints and recipe files; gives the recipe and mergekit's output folder by the recipe's title."""
    base = llama(0, torch.bfloat16)
    places = {}
    for position, (name, dtype) in enumerate(
        (("BASE", torch.bfloat16), ("A", torch.bfloat16), ("B", torch.bfloat16), ("C", torch.float32))
    ):
        places[name] = folder / name
        places[name].mkdir()
        step = llama(position, torch.float32) if position else {}
        tensors = {
            key: (value.float() + 0.1 * step[key]).to(dtype) if step else value for key, value in base.items()
        }
        save_file(tensors, places[name] / "model.safetensors", {"format": "pt"})
        (places[name] / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    written = {}
    for number, (title, text) in enumerate(RECIPES.items()):
        recipe = at_places(yaml.safe_load(text), places)
        file = folder / f"recipe{number}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        written[title] = file, folder / f"mergekit{number}"
    return written


@dataclass(frozen=True)
class Oracle:
    """What goes in, and what mergekit makes of it."""

    tensors: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]
    recipes: dict[str, tuple[Path, Path]]  # recipe file and mergekit's output folder


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    python = os.environ.get("MERGE_ENGINE_ORACLE")
    if not python:
        pytest.skip(
            "MERGE_ENGINE_ORACLE is not set: install tests/oracle/requirements.txt in an environment of its "
            "own and set it to that environment's python (tests/oracle/README.md)"
        )
    folder = tmp_path_factory.mktemp("oracle")
    tensors = make_inputs()
    recipes = write_recipes(folder)
    save_file(tensors, folder / "inputs.safetensors")
    job = {
        "inputs": str(folder / "inputs.safetensors"),
        "output": str(folder / "output.safetensors"),
        "cases": [case.job() for case in make_cases() + RESCALED + UNSTABLE + IN_FLOAT32],
        "recipes": [{"config": str(file), "output": str(out)} for file, out in recipes.values()],
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [python, str(SCRIPT), str(folder / "job.json")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Oracle(tensors, load_file(folder / "output.safetensors"), recipes)


def layers_in(folder: Path) -> int:
    """The number of layers that a config says."""
    return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def comparable(case: Case, tensor: torch.Tensor) -> torch.Tensor:
    """The elements whose sums torch adds in the order of the models.

    For five and more float32 models it does so only in whole groups of 32 elements; the rest of a tensor it
    adds as (x0 + x4) + x1 + x2 + x3 and so on, which no engine that cuts tensors elsewhere can repeat.
    """
    flat = tensor.reshape(-1)
    ordered = case.models < 5 or case.method == "linear" or tensor.dtype != torch.float32
    return flat if ordered else flat[: len(flat) // 32 * 32]


def demand_same_bytes(oracle: Oracle, cases: list[Case]) -> None:
    different = []
    for case in cases:
        ours, theirs = case.merged(oracle.tensors), oracle.merged[case.id]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, case.id
        wrong = (bits(comparable(case, ours)) != bits(comparable(case, theirs))).sum().item()
        if wrong:
            different.append(f"{case.id}: {wrong} of {ours.numel()}")
    assert not different, f"{len(different)} of {len(cases)} cases differ:\n" + "\n".join(different[:20])


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_as_mergekit(oracle: Oracle, method: str, dtype: torch.dtype) -> None:
    cases = [
        case for case in make_cases() if case.method == method and case.data.startswith(name_of(dtype) + " ")
    ]
    assert len(cases) > 20 or (method, dtype) == ("sce", torch.float32)  # see test_sce_in_float32
    demand_same_bytes(oracle, cases)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=name_of)
def test_rescaled_like_mergekit(oracle: Oracle, dtype: torch.dtype) -> None:
    """In 16 bits: in float32 the ratio's last bits depend on the order in which torch adds up a whole tensor."""
    demand_same_bytes(oracle, [case for case in RESCALED if case.data.startswith(name_of(dtype))])


@pytest.mark.parametrize("case", IN_FLOAT32, ids=lambda case: case.id)
def test_sce_in_float32(oracle: Oracle, case: Case) -> None:
    """Its weights depend on the order in which torch adds up squares."""
    ours, theirs = case.merged(oracle.tensors), oracle.merged[case.id]
    assert torch.allclose(ours, theirs, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-8)


@pytest.mark.parametrize("case", UNSTABLE, ids=lambda case: f"{case.data} {case.options['density']}")
def test_only_ties_at_the_cut_depend_on_the_sort(oracle: Oracle, case: Case) -> None:
    base, model = (oracle.tensors[name] for name in case.names)
    ours, theirs = case.merged(oracle.tensors), oracle.merged[case.id]
    delta = (model - base).abs()
    kept = int(case.options["density"] * delta.numel())
    cut = delta.float().sort(descending=True).values[kept - 1]
    at_cut = delta.float() == cut
    assert cut > 0 and at_cut.sum() > 1
    assert torch.equal(bits(ours)[~at_cut], bits(theirs)[~at_cut])
    assert (ours != base).sum() == (theirs != base).sum() == kept


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_gives_the_files_of_mergekit(oracle: Oracle, title: str, tmp_path: Path) -> None:
    file, expected = oracle.recipes[title]
    recipe = yaml.safe_load(file.read_text())
    recipe["arithmetic"] = "mergekit"
    if recipe["merge_method"] in TRIMMED:
        recipe.setdefault("parameters", {})["ties"] = "index"
    me.run(recipe, tmp_path / "out", memory="20KB")
    theirs = {}
    for part in sorted(expected.glob("*.safetensors")):
        with safe_open(part, "pt") as opened:
            theirs |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert layers_in(tmp_path / "out") == layers_in(expected)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(bits(ours[name]), bits(tensor)), name
