"""Mixtures of experts whose inputs have two layouts: a tensor for each expert, or one for all of a layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import merge_engine as me

State = dict[str, torch.Tensor]
HIDDEN, INNER = 8, 12
NAMES = {"block_sparse_moe": ("w1", "w3", "w2"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def single(seed: int, block: str, layers: int = 2, experts: int = 3) -> State:
    """A tensor for each projection of each expert."""
    generator = torch.Generator().manual_seed(seed)
    state = {"model.embed_tokens.weight": torch.randn(5, HIDDEN, generator=generator)}
    for layer in range(layers):
        there = f"model.layers.{layer}.{block}"
        state[f"{there}.gate.weight"] = torch.randn(experts, HIDDEN, generator=generator)
        for expert in range(experts):
            gate, up, down = (f"{there}.experts.{expert}.{name}.weight" for name in NAMES[block])
            state[gate] = torch.randn(INNER, HIDDEN, generator=generator)
            state[up] = torch.randn(INNER, HIDDEN, generator=generator)
            state[down] = torch.randn(HIDDEN, INNER, generator=generator)
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def fused(state: State, block: str) -> State:
    """The same model with one tensor for all experts of a layer."""
    gate, up, down = NAMES[block]
    result = {name: tensor for name, tensor in state.items() if block not in name}
    for name in state:
        if name.endswith(f"{block}.gate.weight"):
            there = name.removesuffix(f"{block}.gate.weight")
            of_layer = [
                {key: state[f"{there}{block}.experts.{i}.{key}.weight"] for key in NAMES[block]}
                for i in range(len(state[name]))
            ]
            result[f"{there}mlp.gate.weight"] = state[name]
            result[f"{there}mlp.experts.gate_up_proj"] = torch.stack(
                [torch.cat([expert[gate], expert[up]]) for expert in of_layer]
            )
            result[f"{there}mlp.experts.down_proj"] = torch.stack([expert[down] for expert in of_layer])
    return result


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@settings(max_examples=20, deadline=None)
@given(
    block=st.sampled_from(sorted(NAMES)),
    layers=st.integers(1, 3),
    experts=st.integers(1, 4),
    into_fused=st.booleans(),
    method=st.sampled_from(["linear", "ties"]),
)
def test_the_layout_of_the_reference_in_memory(
    block: str, layers: int, experts: int, into_fused: bool, method: str
) -> None:
    states = [single(i, block, layers, experts) for i in range(3)]
    layouts = [states, [fused(state, block) for state in states]]
    own, other = layouts[into_fused], layouts[not into_fused]
    base = own[0] if method == "ties" else None
    expected = me.merge_state_dicts(base, [own[0], own[1], own[2]], method)
    assert same(me.merge_state_dicts(base, [own[0], other[1], own[2]], method), expected)


@pytest.mark.parametrize("into_fused", [False, True])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_layout_of_the_reference_on_disk(
    into_fused: bool, suffix: str, save_checkpoint: SaveCheckpoint, tmp_path: Path
) -> None:
    block = "block_sparse_moe"
    states = [single(i, block) for i in range(2)]
    layouts = [states, [fused(state, block) for state in states]]
    own, other = layouts[into_fused], layouts[not into_fused]
    first = save_checkpoint("first", own[0])
    if suffix == "bin":
        second = tmp_path / "second"
        second.mkdir()
        torch.save(other[1], second / "pytorch_model.bin")
    else:
        second = save_checkpoint("second", other[1])
    recipe = {
        "merge_method": "ties",
        "base_model": str(first),
        "models": [{"model": str(second)}],
        "parameters": {"weight": 1.0, "density": 0.5},
    }
    result = me.run(recipe, tmp_path / "merged", memory=2_000_000)
    assert any("in the layout of" in note for note in result.notes)
    expected = me.merge_state_dicts(own[0], [own[1]], "ties", density=0.5)
    assert same(load_file(tmp_path / "merged" / "model.safetensors"), expected)


def test_what_is_not_complete_is_refused() -> None:
    block = "mlp"
    whole, other = fused(single(0, block), block), single(1, block)
    del other["model.layers.1.mlp.experts.2.up_proj.weight"]
    for states in ([whole, other], [other, whole]):
        with pytest.raises(me.PlanError, match="merge models of one architecture"):
            me.merge_state_dicts(None, states, "linear")
