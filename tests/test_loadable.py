"""What a loader would miss in an output is said before the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint

import merge_engine as me

LAYERS = 3
Config = dict[str, Any]


def tensors(prefix: str = "") -> dict[str, torch.Tensor]:
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(LAYERS))]
    return {prefix + name: torch.ones(2, 2) for name in names}


def warnings(save: SaveCheckpoint, config: Config, prefix: str = "", **keys: Any) -> tuple[str, ...]:
    models = [
        save(name, {k: v * i for k, v in tensors(prefix).items()}, config) for i, name in enumerate("ab")
    ]
    recipe = {"merge_method": "linear", "models": [{"model": str(model)} for model in models], **keys}
    return me.plan({**recipe, "parameters": {"weight": 1}}).warnings


@pytest.mark.parametrize("config", [{"num_hidden_layers": 3}, {"text_config": {"n_layer": 3}}])
def test_layers_that_are_left_out(config: Config, save_checkpoint: SaveCheckpoint) -> None:
    key = next(iter(config.get("text_config", config)))
    assert warnings(save_checkpoint, config, tensors={"exclude": ["model.layers.1.*"]}) == (
        f"model.layers: the output has 2 layers, its config.json says {key} 3; loaders make up the others, unless you "
        f"change {key} there",
    )


def test_layers_that_another_model_adds(save_checkpoint: SaveCheckpoint) -> None:
    config = {"num_hidden_layers": 3}
    a = save_checkpoint("a", tensors(), config)
    b = save_checkpoint("b", {**tensors(), "model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)}, config)
    models = [{"model": str(model), "parameters": {"weight": 1}} for model in (a, b)]
    found = me.plan({"merge_method": "linear", "models": models, "allow": ["layers"]}).warnings
    assert "says num_hidden_layers 3; loaders leave out the others" in found[-1]


@pytest.mark.parametrize(
    "config", [{}, {"num_hidden_layers": 3}, {"num_hidden_layers": 7}, {"text_config": []}]
)
def test_nothing_to_say(config: Config, save_checkpoint: SaveCheckpoint) -> None:
    """A config of which no key has the number of layers says nothing about them."""
    assert warnings(save_checkpoint, config) == ()


def test_wrapped_names(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    [warning] = warnings(save_checkpoint, {}, "_orig_mod.")
    assert 'begin with "_orig_mod." (_orig_mod.model.embed_tokens.weight' in warning
    assert warning.endswith('to remove it, add tensors: {rename: {"_orig_mod.": ""}} to the recipe')


def test_the_proposed_key_helps(save_checkpoint: SaveCheckpoint) -> None:
    assert warnings(save_checkpoint, {}, "module.", tensors={"rename": {"module.": ""}}) == ()
