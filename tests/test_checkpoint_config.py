"""The config.json of an output: dtypes at every level, heads, and JSON that every reader takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.checkpoint import encode_config, merged_config
from merge_engine.dtypes import BF16, F32


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": None, "dtype": "auto"}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"torch_dtype": "float32"}},
            {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}},
        ),
        (
            {"vision_config": {"dtype": "float32"}, "text_config": {"n": 1}},
            {"vision_config": {"dtype": "bfloat16"}, "text_config": {"n": 1}, "dtype": "bfloat16"},
        ),
        (
            {"dtype": "float32", "thinker_config": {"audio": [{"dtype": "float16"}, 3]}},
            {"dtype": "bfloat16", "thinker_config": {"audio": [{"dtype": "bfloat16"}, 3]}},
        ),
        (
            {"dtype": "float32", "quantization_config": {"dtype": "int8"}, "x": {"dtype": {"of": "what"}}},
            {"dtype": "bfloat16", "quantization_config": {"dtype": "int8"}, "x": {"dtype": {"of": "what"}}},
        ),
    ],
)
def test_dtype(config: dict[str, object], expected: dict[str, object]) -> None:
    assert merged_config(config, BF16, untied=False) == expected


def test_untied() -> None:
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    assert merged_config(config, None, untied=True) == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False},
    }
    assert config["tie_word_embeddings"] is True
    assert merged_config(config, None, untied=False) == config


def test_the_input_is_not_changed() -> None:
    config = {"text_config": {"dtype": "bfloat16"}}
    merged_config(config, F32, untied=True)
    assert config == {"text_config": {"dtype": "bfloat16"}}


texts = st.text() | st.sampled_from(["Infinity", '"Infinity', "\\", '\\"Infinity\\"', "-Infinity"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(texts, values, max_size=4))
def test_what_is_written_is_json_and_means_the_same(config: dict[str, Any]) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert json.loads(encode_config(config), parse_constant=refuse) == config
