"""The files that an output inherits besides weights, and its configuration."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_engine.checkpoint import MANIFEST_NAME, carried_files, merged_config
from merge_engine.dtypes import BF16, F32
from merge_engine.errors import CheckpointError

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


def test_beside_a_single_file_only_known_names_are_carried(tmp_path: Path) -> None:
    known = ["LICENSE", "chat_template.jinja", "config.json", "merges.txt", "tokenizer.model", "vocab.json"]
    private = ["passwords.txt", "notes.json", "deploy.py", "tokenizer.tar", "letters/config.json"]
    (tmp_path / "letters").mkdir()
    for name in (*known, *private, "model.safetensors"):
        (tmp_path / name).touch()
    assert list(carried_files(tmp_path / "model.safetensors")) == known


def test_data_is_not_carried(tmp_path: Path) -> None:
    for name, size in {"config.json": 2, "tokenizer.json": 100_000_000, "dump.json": 100_000_001}.items():
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    assert list(carried_files(tmp_path)) == ["config.json", "tokenizer.json"]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for missing permissions, which root never meets."""
    (tmp_path / "private").mkdir()
    (tmp_path / "config.json").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: permission denied"):
            carried_files(tmp_path)
    iterdir = Path.iterdir

    def denied(folder: Path) -> Iterator[Path]:
        if folder.name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match=r"private: cannot be read: Permission denied$"):
        carried_files(tmp_path)
