"""Damaged and hostile files at random: the engine merges them or raises one clear ``MergeError``, and nothing else.

Half of the files are valid ones with changed bytes, half are made of the right words in the wrong places. CI tries a
few hundred; ``MERGE_ENGINE_FUZZ=100000 pytest tests/test_fuzz.py`` tries as many for each kind of file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attacks import within

import merge_engine as me

EXAMPLES = int(os.environ.get("MERGE_ENGINE_FUZZ", 150))
SECONDS = 10
fuzzed = settings(
    max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

NUMBERS = st.sampled_from([-1, 0, 1, 2, 4, 8, 2**31, 2**53, 2**63, 2**64, 0.0, 0.5, 1e308]) | st.integers()
WORDS = st.sampled_from(
    ["w", "v", "", "\0", "\x1b[2J", "\u202e", "\ud800", "../w", "BF16", "F32", "I64", "llama"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=8)


def documents(keys: list[str]) -> st.SearchStrategy[Any]:
    """JSON values with these keys in them, mostly."""
    names = st.sampled_from(keys) | WORDS
    return st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
        max_leaves=12,
    )


def encoded(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode()


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid bytes with a few of them changed, doubled or missing."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 9))
        new = draw(
            st.binary(max_size=9)
            | st.sampled_from(
                [b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"!!int ", b"&a ", b"*a", b"\n"]
            )
        )
        data[at : at + length] = new
    return bytes(data)


def header(document: Any, data: bytes = bytes(8)) -> bytes:
    raw = encoded(document)
    return len(raw).to_bytes(8, "little") + raw + data


ENTRY = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "text_config": {"rope_theta": 1e4},
    "quantization_config": {"quant_method": "gptq"},
    "eos_token_id": [1, 2],
    "vocab_size": 8,
    "auto_map": {"AutoModel": "a.B"},
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
    "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
}
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"w": "part.safetensors"}}
RECIPE = """\
merge_method: ties
base_model: good
models:
  - model: other
    parameters: {weight: [0.5, 1], density: [{filter: w, value: 0.5}, {value: 1.0}]}
parameters: {normalize: true, lambda: 1.0}
dtype: bfloat16
seed: 3
tensors: {exclude: [b], rename: {"x.": ""}}
allow: [layers]
"""
MANY = {
    "header": (
        "other/model.safetensors",
        header({"w": ENTRY}),
        lambda d: header(d),
        ["w", "v", "__metadata__", "dtype", "shape", "data_offsets"],
    ),
    "entry": (
        "other/model.safetensors",
        header({"w": ENTRY}),
        lambda d: header({"w": d if not isinstance(d, dict) else {**ENTRY, **d}}),
        ["dtype", "shape", "data_offsets"],
    ),
    "index": ("other/model.safetensors.index.json", encoded(INDEX), encoded, ["metadata", "weight_map", "w"]),
    "weight map": (
        "other/model.safetensors.index.json",
        encoded(INDEX),
        lambda d: encoded({"weight_map": d}),
        ["w", "v"],
    ),
    "config": (
        "other/config.json",
        encoded(CONFIG),
        lambda d: encoded({**CONFIG, **d} if isinstance(d, dict) else d),
        list(CONFIG),
    ),
    "tokenizer": (
        "other/tokenizer.json",
        encoded(TOKENIZER),
        lambda d: encoded({**TOKENIZER, **d} if isinstance(d, dict) else d),
        ["model", "vocab", "merges", "added_tokens", "id", "content"],
    ),
    "recipe": (
        "recipe.yaml",
        RECIPE.encode(),
        encoded,
        [
            "merge_method",
            "models",
            "model",
            "parameters",
            "weight",
            "base_model",
            "tensors",
            "exclude",
            "rename",
            "allow",
            "dtype",
        ],
    ),
}


@pytest.fixture
def folder(save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("good", "other"):
        save_checkpoint(name, {"w": torch.arange(4.0).bfloat16()}, CONFIG)
        Path(name, "tokenizer.json").write_bytes(encoded(TOKENIZER))
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize("kind", MANY)
def test_random_files(kind: str, folder: Path) -> None:
    place, valid, write, keys = MANY[kind]
    if "index" in place:
        Path("other/model.safetensors").rename("other/part.safetensors")

    @fuzzed
    @given(documents(keys).map(write) | damaged(valid))
    def merge(data: bytes) -> None:
        Path(place).write_bytes(data)
        with within(SECONDS):
            try:
                me.run(Path("recipe.yaml"), device="cpu")
            except me.MergeError as error:
                assert all(line.isprintable() and line for line in str(error).split("\n")), ascii(str(error))

    merge()
