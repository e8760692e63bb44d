"""What config.json says of single layers goes with the layers."""

from __future__ import annotations

from typing import Any

import pytest

from merge_engine.checkpoint import LayerOrigin, stacked_config

PRUNED, STACKED, SHIFTED = (0, 1, 4, 5), (0, 1, 2, 3, 2, 3, 4, 5), (1, 2, 3, 4, 5)
FULL, SLIDING = "full_attention", "sliding_attention"


def stack(
    config: dict[str, Any], layers: tuple[int, ...], kind: str = "text", alone: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """The config of an output with these layers of a model of six."""
    return stacked_config(config, kind, alone, 6, [LayerOrigin("model", config, 6, i) for i in layers])


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_layers_are_counted(key: str) -> None:
    config = {key: 6, "vocab_size": 6, "num_attention_heads": 6}
    assert stack(config, STACKED) == ({**config, key: 8}, [])
    nested = {"text_config": config, "vision_config": {"num_hidden_layers": 6}}
    assert stack(nested, PRUNED) == ({**nested, "text_config": {**config, key: 4}}, [])


def test_lists_with_an_entry_for_each_layer_are_cut() -> None:
    config = {
        "num_hidden_layers": 6,
        "no_rope_layers": [1, 1, 0, 1, 1, 0],
        "hybrid_override_pattern": "M-M*M-",
        "architectures": ["A"] * 6,
        "eos_token_id": [1, 2, 3, 4, 5, 6],
        "rope_scaling": {"long_factor": [1, 2, 3, 4, 5, 6]},
        "attention_types": [[["global", "local"], 3]],
    }
    made, warnings = stack(config, PRUNED)
    assert made == {
        **config,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "hybrid_override_pattern": "M-M-",
        "attention_types": [[["global", "local", "global", "local"], 1]],
    }
    assert not warnings


def test_lists_come_from_the_model_that_the_layer_is_of() -> None:
    one = {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING], "sizes": [1, 2]}
    two = {"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL], "sizes": [3, 4, 5]}
    origins = [LayerOrigin("one", one, 2, 0), LayerOrigin("two", two, 3, 2), LayerOrigin("two", two, 3, 0)]
    assert stacked_config(one, "text", True, 2, origins) == (
        {"num_hidden_layers": 3, "layer_types": [FULL, FULL, SLIDING], "sizes": [1, 5, 3]},
        [],
    )
    bare = {"num_hidden_layers": 3}
    made, warnings = stacked_config(one, "text", True, 2, [LayerOrigin("bare", bare, 3, 2)])
    assert made == {"num_hidden_layers": 1}
    assert warnings == [
        "config.json: sizes has an entry for each layer, but not for layer 2 of bare; it is left out of the output's",
        "config.json: layer_types has an entry for each layer, but that of bare does not say what its layers are; "
        "it is left out of the output's",
    ]


@pytest.mark.parametrize(
    ("layers", "numbers"), [(PRUNED, [1, 3]), (STACKED, [1, 2, 4, 7]), (SHIFTED, [0, 1, 4])]
)
def test_lists_of_numbers_of_layers_are_renumbered(layers: tuple[int, ...], numbers: list[int]) -> None:
    config = {"num_hidden_layers": 6, "mlp_only_layers": [1, 2, 5]}
    assert stack(config, layers) == (
        {"num_hidden_layers": len(layers), "mlp_only_layers": numbers},
        [],
    )


def test_the_first_layers_that_are_unlike_the_others() -> None:
    config = {"num_hidden_layers": 6, "first_k_dense_replace": 3}
    assert stack(config, SHIFTED) == ({"num_hidden_layers": 5, "first_k_dense_replace": 2}, [])
    assert stack(config, (4, 5)) == ({"num_hidden_layers": 2, "first_k_dense_replace": 0}, [])
    made, [warning] = stack(config, (0, 1, 2, 3, 1))
    assert made["first_k_dense_replace"] == 3
    assert warning.startswith(
        "config.json: first_k_dense_replace 3 does not fit the output: its layer 4 is layer 1 of model, which is of"
    )


def test_periods_get_the_offset_that_fits() -> None:
    config = {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1}
    assert stack(config, SHIFTED) == (
        {"num_hidden_layers": 5, "attn_layer_period": 3, "attn_layer_offset": 0},
        [],
    )
    made, [warning] = stack(config, PRUNED)
    assert made == {**config, "num_hidden_layers": 4}
    assert "attn_layer_period 3 does not fit the output: its layer 2 is layer 4 of model" in warning
    assert len(stack({"num_hidden_layers": 6, "decoder_sparse_step": 2}, SHIFTED)[1]) == 1
    assert stack({"num_hidden_layers": 6, "decoder_sparse_step": 1}, SHIFTED)[1] == []


@pytest.mark.parametrize(
    "said",
    [
        {"model_type": "gemma2"},
        {"sliding_window_pattern": 2},
        {"use_sliding_window": True, "max_window_layers": 3},
        {"full_attention_interval": 2},
    ],
    ids=str,
)
def test_layers_that_attend_to_a_window(said: dict[str, Any]) -> None:
    """Where the key cannot say it any more, a list does."""
    config = {"num_hidden_layers": 6, **said}
    local = "linear_attention" if "full_attention_interval" in said else SLIDING
    types = [FULL, FULL, FULL, local, local, local] if "max_window_layers" in said else [local, FULL] * 3
    for layers in (PRUNED, STACKED, SHIFTED):
        made, warnings = stack(config, layers)
        expected = [types[i] for i in layers]
        start = made.get("max_window_layers", 0)
        told = [local if i >= start else FULL for i in range(len(layers))] if start else []
        alternating = [local, FULL] * 4
        if made.get("layer_types") is None:
            assert expected == (told or alternating[: len(layers)])
            assert not warnings
        else:
            assert made["layer_types"] == expected
            assert ["layer_types says which of its layers" in each for each in warnings] == [True]


def test_encoder_and_decoder_are_counted_apart() -> None:
    t5 = {"num_layers": 6, "is_encoder_decoder": True}
    assert stack(t5, PRUNED, "encoder", False)[0] == {**t5, "num_layers": 4, "num_decoder_layers": 6}
    assert stack(t5, PRUNED, "decoder", False)[0] == {**t5, "num_decoder_layers": 4}
    bart = {"encoder_layers": 6, "decoder_layers": 6, "num_hidden_layers": 6}
    assert stack(bart, PRUNED, "decoder", False)[0] == {**bart, "decoder_layers": 4}
    assert stack(bart, PRUNED, "encoder", False)[0] == {**bart, "encoder_layers": 4, "num_hidden_layers": 4}
    assert stack({"num_hidden_layers": 6}, PRUNED, "decoder", True)[0] == {"num_hidden_layers": 4}


def test_configs_that_count_no_layers() -> None:
    assert stack({}, PRUNED) == ({}, [])
    made, warnings = stack({"model_type": "own"}, PRUNED)
    assert made == {"model_type": "own"}
    assert warnings == ["config.json: no key counts the layers; the output has 4, which loaders must be told"]
