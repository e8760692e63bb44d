"""The files that go along with the weights, and the configuration of the output."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_engine.checkpoint import MANIFEST_NAME, carried_files, merged_config
from merge_engine.dtypes import BF16, F32

CARRIED = [
    "1_Pooling/config.json",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "modeling_custom.py",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.bpe",
]
LEFT = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "README.md",
    MANIFEST_NAME,
    ".cache/state.json",
    "checkpoint-500/config.json",
    "a/b/deep.json",
    "training_args.bin",
]


def test_carried_files(tmp_path: Path) -> None:
    for name in CARRIED + LEFT:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "generation_config.json").symlink_to("blob")
    (tmp_path / "broken.json").symlink_to("nowhere")
    found = carried_files(tmp_path)
    assert list(found) == sorted([*CARRIED, "generation_config.json"])
    assert found["generation_config.json"].read_text() == "{}"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"torch_dtype": "float32"}},
            {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}},
        ),
        ({"text_config": {"n": 1}}, {"dtype": "bfloat16", "text_config": {"n": 1}}),
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
