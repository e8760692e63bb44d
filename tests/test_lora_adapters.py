"""Adapters that fit a model under other names, and those that are refused: one line each, before anything is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LLAMA, save_model, state_dict
from lora import MODULES, PREFIX, factors, save_adapter
from test_lora import assert_same, passthrough, put_in

import merge_engine as me
from merge_engine.checkpoint.lora_settings import lora_settings

WITH_PEFT = "merge it into its model with PEFT (merge_and_unload) and name the result"
BEFORE = "name the model that it belongs to before the +"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(model: str = "base+lora", **keys: Any) -> list[str]:
    with pytest.raises(me.MergeError) as caught:
        me.plan({"merge_method": "passthrough", "models": [{"model": model}], **keys})
    return caught.value.problems


def scale(module: str, rank: int = 4, **settings: Any) -> float:
    found, lines = lora_settings(Path("x"), {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings)
    assert found is not None, lines
    return found.scale(module, rank)


def test_scales() -> None:
    """The first pattern that fits a name or the end of it counts; behind a "^", only the whole name."""
    q, k = (f"model.layers.0.attn.{one}_proj" for one in "qk")
    assert scale(q) == 2.0
    assert scale(q, lora_alpha=3, use_rslora=True, r=5, rank=5) == 3 / math.sqrt(5)
    for patterns, expected in (
        ({"q_proj": 4}, 1.0),
        ({"k_proj": 4, "attn.q_proj": 12, "q_proj": 4}, 3.0),
        ({"q_proj": 4, "attn.q_proj": 12}, 1.0),
        ({"^q_proj": 4}, 2.0),
        ({f"^{q}": 4}, 1.0),
        ({r"^model\.layers\.0\.attn\.q_proj": 4}, 1.0),
        ({"proj": 4}, 2.0),
    ):
        assert scale(q, alpha_pattern=patterns) == expected
    assert scale(k, alpha_pattern={"q_proj": 4}) == 2.0


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({}, True),
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["model.layers.3.attn.q_proj", "x"]}, True),
        ({"target_modules": ["proj", "layers.3.attn"]}, False),
        ({"target_modules": "all-linear"}, True),
        ({"layers_to_transform": 3}, True),
        ({"layers_to_transform": [0, 2]}, False),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, True),
        ({"layers_to_transform": [3], "layers_pattern": ["h", "blocks"]}, False),
    ],
)
def test_which_modules_have_factors(settings: dict[str, Any], fits: bool) -> None:
    found, _ = lora_settings(Path("x"), {"peft_type": "LORA"} | settings)
    assert found is not None and found.has_factors("model.layers.3.attn.q_proj") is fits


@pytest.mark.parametrize(
    ("old", "new"), [("model.", ""), ("model.", "language_model.model."), ("model.", "backbone."), ("", "")]
)
def test_names_may_begin_otherwise(old: str, new: str) -> None:
    """A checkpoint of the model without its head has no ``model.``, one of a multimodal model has more."""
    expected = put_in(state_dict(0), factors())
    renamed = {new + name.removeprefix(old): tensor for name, tensor in state_dict(0).items()}
    save_model(Path("base"), 0, tensors=renamed)
    save_adapter("lora")
    found = passthrough("base+lora")
    assert_same(found, {new + name.removeprefix(old): tensor for name, tensor in expected.items()})


def test_names_that_fit_two_parts_of_a_model_are_refused() -> None:
    state = {
        f"{part}.{name}": tensor for part in ("text", "vision") for name, tensor in state_dict(0).items()
    }
    save_model(Path("base"), 0, tensors=state)
    save_adapter("lora", base_model_name_or_path="org/tiny")
    assert problems() == [
        "lora: 2 tensors of the adapter without a place in base: model.layers.0.self_attn.q_proj.weight, "
        f"model.layers.1.mlp.up_proj.weight; it was trained on org/tiny; {BEFORE}"
    ]


def test_tensors_that_replace_the_models() -> None:
    save_model(Path("base"), 0)
    whole = {
        "model.norm.modules_to_save.default.weight": torch.full((16,), 3.0).bfloat16(),
        "lm_head.weight": torch.full((64, 16), 4.0).bfloat16(),
        "model.layers.0.self_attn.k_proj.base_layer.weight": torch.full((16, 16), 5.0).bfloat16(),
    }
    save_adapter("lora", factors() | {PREFIX + name: tensor for name, tensor in whole.items()})
    names = ("model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.weight")
    expected = put_in(state_dict(0), factors()) | dict(zip(names, whole.values(), strict=True))
    assert_same(passthrough("base+lora"), expected)


def test_all_that_is_wrong_is_said_at_once() -> None:
    settings = {"use_dora": True, "lora_alpha": "x", "init_lora_weights": "olora"}
    save_adapter("lora", **settings)
    assert problems("nowhere/base+lora") == [
        "nowhere/base: neither a folder here nor a model on the hub that can be fetched: "
        + problems("nowhere/base")[0].split("fetched: ")[1],
        f"lora/adapter_config.json: DoRA (use_dora) cannot be put into a model exactly; {WITH_PEFT}",
        'lora/adapter_config.json: init_lora_weights "olora" changes the weights of the model before the training, so '
        f"the adapter belongs to other weights; convert it to plain LoRA, or {WITH_PEFT}",
        'lora/adapter_config.json: lora_alpha must be a number, not "x"',
    ]


def test_what_is_no_adapter() -> None:
    save_model(Path("base"), 0)
    save_model(Path("whole"), 1)
    assert problems("base+whole") == [
        "whole: no LoRA adapter: there is no adapter_config.json; name the folder of a PEFT adapter behind the +"
    ]
    save_model(Path("mixed"), 1, adapter_config__json={"peft_type": "LORA"})
    assert problems("base+mixed") == [
        "mixed: holds no factors of a LoRA; name the folder of a LoRA adapter behind the +"
    ]
    Path("empty").mkdir()
    [line] = problems("base+empty")
    assert line.startswith("empty: no weights in it")
    save_adapter("run/checkpoint-500")
    assert problems("base+run") == [
        "run: no weights in it, but in its subfolder checkpoint-500; name the one that is meant"
    ]


def test_a_quantised_model() -> None:
    state = state_dict(0) | {
        "model.layers.1.mlp.up_proj.weight": torch.ones(32 * 16 // 2, 1, dtype=torch.uint8)
    }
    save_model(Path("base"), 0, tensors=state)
    save_adapter("lora")
    assert problems() == [
        "base: tensors that are quantised, or no floats of 16 to 64 bits: model.layers.1.mlp.up_proj.weight; a LoRA "
        "can only be put into floats: dequantise the model first"
    ]


def test_a_tied_head_has_no_tensor_of_its_own() -> None:
    state = {name: tensor for name, tensor in state_dict(0).items() if name != "lm_head.weight"}
    save_model(Path("base"), 0, LLAMA | {"tie_word_embeddings": True}, tensors=state)
    save_adapter("lora", factors(MODULES | {"lm_head": (64, 16)}))
    assert problems() == [f"lora: 1 tensor of the adapter without a place in base: lm_head.weight; {BEFORE}"]


def test_more_tokens_than_the_model() -> None:
    save_model(Path("base"), 0)
    embedding = {f"{PREFIX}model.embed_tokens.weight": torch.ones(70, 16)}
    save_adapter("lora", factors() | embedding)
    assert problems() == [
        f"lora: tensors that do not fit base: model.embed_tokens.weight ([64, 16], the adapter has [70, 16]); {BEFORE}"
    ]


def test_settings_that_cannot_be_read_are_an_error() -> None:
    save_model(Path("base"), 0)
    save_adapter("lora")
    settings = Path("lora/adapter_config.json")
    settings.unlink()
    settings.symlink_to("nowhere")
    [line] = problems()
    assert line.startswith("lora/adapter_config.json: cannot be read: a broken link to nowhere")
    settings.unlink()
    settings.write_text(json.dumps({"peft_type": "LORA"}) + " " * 10_000_001)
    [line] = problems()
    assert line.startswith("lora/adapter_config.json: cannot be read: larger than the 10 MB")
