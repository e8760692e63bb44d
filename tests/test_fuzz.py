"""Damaged and hostile files at random: the commands merge them or end with clear lines, and nothing else.

Half of the files are valid ones with changed bytes, half are made of the right words in the wrong places. CI tries a
few hundred; ``MERGE_ENGINE_FUZZ=100000 pytest tests/test_fuzz.py`` tries as many for each kind of file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora import factors, save_adapter
from safetensors.torch import load_file
from test_attacks import COMMANDS, within
from test_terminal import assert_harmless, call

EXAMPLES = int(os.environ.get("MERGE_ENGINE_FUZZ", 50))
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
LORA = {
    "peft_type": "LORA",
    "base_model_name_or_path": "x",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["m"],
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {"m": 3},
    "init_lora_weights": True,
    "fan_in_fan_out": False,
}
FACTOR = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
ADAPTED = "merge_method: passthrough\nmodels: [{model: matrix+lora}]\n"
INDEX_FILE = "other/model.safetensors.index.json"
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
Make = Callable[[Any], bytes]


class Kind(NamedTuple):
    """A kind of file: its place, the bytes of a valid one, and how to make one of JSON values with some ``keys``.

    Without ``valid``, the one that is there is valid. Without ``make``, none are made.
    """

    place: str
    valid: bytes | None
    make: Make | None = None
    keys: Sequence[str] = ()


def settings_file(place: str, content: dict[str, Any]) -> Kind:
    def make(document: Any) -> bytes:
        return encoded({**content, **document} if isinstance(document, dict) else document)

    return Kind(place, encoded(content), make, list(content))


KINDS = {
    "header": Kind(
        "other/model.safetensors",
        header({"w": ENTRY}),
        header,
        ["w", "v", "__metadata__", "dtype", "shape", "data_offsets"],
    ),
    "entry": Kind(
        "other/model.safetensors",
        header({"w": ENTRY}),
        lambda d: header({"w": {**ENTRY, **d} if isinstance(d, dict) else d}),
        ["dtype", "shape", "data_offsets"],
    ),
    "index": Kind(INDEX_FILE, encoded(INDEX), encoded, ["metadata", "weight_map", "w"]),
    "weight map": Kind(INDEX_FILE, encoded(INDEX), lambda d: encoded({"weight_map": d}), ["w", "v"]),
    "pickle": Kind("other/pytorch_model.bin", None),
    "config": settings_file("other/config.json", CONFIG),
    "tokenizer": settings_file("other/tokenizer.json", TOKENIZER),
    "generation": settings_file(
        "other/generation_config.json", {"eos_token_id": [1, 2], "temperature": 0.5, "_from": "x"}
    ),
    "tokens": settings_file(
        "other/tokenizer_config.json",
        {"bos_token": {"content": "<s>"}, "chat_template": "x", "auto_map": {"AutoTokenizer": ["a.B", None]}},
    ),
    "adapter": settings_file(
        "other/adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 8}
    ),
    "donor's config": settings_file("good/config.json", CONFIG),
    "modules": Kind(
        "good/modules.json",
        encoded([{"idx": 0, "path": "1_Pooling", "type": "a.B"}]),
        lambda d: encoded(d if isinstance(d, list) else [d]),
        ["idx", "name", "path", "type"],
    ),
    "lora": Kind(
        "lora/adapter_config.json",
        encoded(LORA),
        lambda d: encoded({**LORA, **d} if isinstance(d, dict) else d),
        [*LORA, "use_dora", "m", "w"],
    ),
    "lora header": Kind("lora/adapter_model.safetensors", None),
    "lora entry": Kind(
        "lora/adapter_model.safetensors",
        None,
        lambda d: header(
            {"m.lora_A.weight": {**FACTOR, **d} if isinstance(d, dict) else d, "m.lora_B.weight": FACTOR}
        ),
        ["dtype", "shape", "data_offsets"],
    ),
    "recipe": Kind(
        "recipe.yaml",
        RECIPE.encode(),
        encoded,
        [
            *("merge_method", "models", "model", "parameters", "weight", "base_model"),
            *("tensors", "exclude", "rename", "allow", "dtype"),
        ],
    ),
    "manifest": Kind(
        "earlier/merge_manifest.json",
        None,
        encoded,
        ["format", "recipe", "digest", "inputs", "tensors", "shards", "files", "counts", "notes"],
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
    save_checkpoint("matrix", {"m.weight": torch.ones(2, 2)})
    save_adapter("lora", factors({"m": (2, 2)}, rank=2), **LORA)
    Path("adapted.yaml").write_text(ADAPTED)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_random_files(kind: str, folder: Path) -> None:
    place, valid, make, keys = KINDS[kind]
    weights = Path("other/model.safetensors")
    if place == INDEX_FILE:
        weights.rename("other/part.safetensors")
    elif place.endswith(".bin"):
        torch.save(load_file(weights), place)
        weights.unlink()
    elif kind == "manifest":
        assert call("run", "recipe.yaml", "earlier").code == 0
    valid = Path(place).read_bytes() if valid is None else valid
    files = damaged(valid) if make is None else damaged(valid) | documents(keys).map(make)

    @fuzzed
    @given(files)
    def merge(data: bytes) -> None:
        used = "adapted.yaml" if place.startswith("lora/") else "recipe.yaml"
        for command in COMMANDS.get(f"{kind}s", (("run", used, "out"),)):
            Path(place).write_bytes(data)
            with within(SECONDS):
                said = call(*command, *(("--device", "cpu") if command[0] == "run" else ()))
            if command[0] == "verify" and not said.err:  # it prints what it finds
                said = said._replace(code=0)
            assert_harmless(said)
            assert Path("out").exists() is (said.code == 0 and "out" in command)
            shutil.rmtree("out", ignore_errors=True)

    merge()
