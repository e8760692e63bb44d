"""Tensors that loaders compute anew never keep models apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import SaveCheckpoint

import merge_engine as me

BUFFERS: dict[str, Callable[[], torch.Tensor]] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": lambda: torch.rand(4),
    "model.rotary_emb.inv_freq": lambda: torch.rand(4),
    "model.layers.0.self_attn.rotary_emb.cos_cached": lambda: torch.rand(1, 1, 8, 4),
    "embeddings.position_ids": lambda: torch.arange(8).expand(1, -1),
    "vision_model.embeddings.position_ids": lambda: torch.arange(8),
    "bert.embeddings.token_type_ids": lambda: torch.zeros(1, 8, dtype=torch.int64),
    "transformer.h.0.attn.bias": lambda: torch.ones(1, 1, 4, 4).tril().bool(),
    "h.0.attn.bias": lambda: torch.ones(1, 1, 4, 4).tril(),
    "gpt_neox.layers.0.attention.bias": lambda: torch.ones(1, 1, 4, 4).tril().to(torch.uint8),
    "gpt_neox.layers.0.attention.masked_bias": lambda: torch.tensor(-1e9),
    "transformer.h.0.attn.causal_mask": lambda: torch.ones(1, 1, 4, 4).bool(),
    "layers.0.blocks.0.attn.relative_position_index": lambda: torch.zeros(4, 4, dtype=torch.int64),
    "model.encoder.embed_positions.weights": lambda: torch.rand(8, 4),
    "model.decoder.embed_positions._float_tensor": lambda: torch.rand(1),
    "rope.freqs": lambda: torch.rand(4),
    "freqs_cis": lambda: torch.rand(8, 4),
    "model.rotary_emb.cos": lambda: torch.rand(8, 4),
    "encoder.layers.0.attn.rotary_emb.sin": lambda: torch.rand(8, 4),
    "transformer.h.0.attn.embed_positions": lambda: torch.rand(8, 4),
    "model.causal_mask": lambda: torch.ones(4, 4).triu().bool(),
    "conformer.0.conv.batch_norm.num_batches_tracked": lambda: torch.tensor(7),
}
WEIGHTS: dict[str, tuple[int, ...]] = {
    "transformer.h.0.attn.c_attn.bias": (12,),
    "blocks.0.attn.bias": (12,),
    "layers.0.attention.bias": (3, 3),
    "model.encoder.embed_positions.weight": (8, 4),
    "position_ids": (2, 3),
    "attention.cos": (3,),
    "codebook.freqs": (3,),
    "model.causal_mask": (4, 4),
}


def states() -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.full((4,), float(i)), "x": torch.zeros(4)} for i in range(3)]


def merged(
    method: str, inputs: list[dict[str, torch.Tensor]], save: SaveCheckpoint
) -> tuple[dict[str, torch.Tensor], list[str]]:
    paths = [str(save(f"m{i}", held)) for i, held in enumerate(inputs)]
    if method == "linear":
        recipe = {"merge_method": method, "models": [{"model": path} for path in paths]}
    else:
        models = [{"model": path} for path in paths[1:]]
        recipe = {"merge_method": method, "base_model": paths[0], "models": models}
    result = me.run(recipe | {"parameters": {"weight": 1}, "out_dtype": "bfloat16"})
    assert result.tensors is not None
    return result.tensors, result.notes


@pytest.mark.parametrize("method", ("linear", "dare_ties"))
@pytest.mark.parametrize("name", BUFFERS)
def test_only_some_have_it(save_checkpoint: SaveCheckpoint, name: str, method: str) -> None:
    inputs = states()
    inputs[1][name] = BUFFERS[name]().contiguous()
    found, notes = merged(method, inputs, save_checkpoint)
    assert found.keys() == {"w", "x"}
    (note,) = notes
    assert name in note and "buffers that loaders compute anew" in note


@pytest.mark.parametrize("method", ("linear", "dare_ties"))
@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("how", ("lacking", "values", "dtype", "shape"))
def test_that_of_the_donor_is_taken(
    save_checkpoint: SaveCheckpoint, name: str, method: str, how: str
) -> None:
    inputs = states()
    for held in inputs:
        held[name] = BUFFERS[name]().contiguous()
    other = inputs[2][name]
    if how == "lacking":
        del inputs[2][name]
    elif how == "values":
        inputs[2][name] = torch.ones_like(other) if other.dtype == torch.bool else other + 1
    elif how == "dtype":
        inputs[2][name] = other.to(torch.float16 if other.dtype.is_floating_point else torch.int32)
    elif other.ndim == 4:
        inputs[2][name] = torch.ones(1, 1, 5, 5, dtype=other.dtype)
    elif len(set(other.shape)) == 1 < other.ndim:
        inputs[2][name] = torch.ones(5, 5, dtype=other.dtype)
    elif other.ndim and other.numel() > 1:
        inputs[2][name] = torch.cat([other, other], -1)
    found, notes = merged(method, inputs, save_checkpoint)
    assert found[name].dtype == inputs[0][name].dtype
    assert torch.equal(found[name], inputs[0][name])
    assert len(notes) <= 1


def test_all_of_them_are_one_note(save_checkpoint: SaveCheckpoint) -> None:
    inputs = states()
    inputs[1] |= {f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(100)}
    _, (note,) = merged("linear", inputs, save_checkpoint)
    assert note.endswith("and 97 more")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_with_such_names_are_merged(name: str) -> None:
    inputs = [{name: torch.full(WEIGHTS[name], float(i))} for i in range(3)]
    found = me.merge_state_dicts(None, inputs, "linear")
    assert torch.equal(found[name], inputs[1][name])


def test_a_weight_and_a_mask_of_one_name_do_not_fit() -> None:
    inputs = [{"h.0.attn.bias": torch.ones(4)}, {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}]
    with pytest.raises(me.PlanError, match="the shapes differ"):
        me.merge_state_dicts(None, inputs, "linear")
