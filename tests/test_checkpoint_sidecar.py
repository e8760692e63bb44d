"""The files that an output inherits besides weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_engine.checkpoint import MANIFEST_NAME, carried_files, find_side_files
from merge_engine.checkpoint.sidecar import MODEL_FILES
from merge_engine.errors import CheckpointError

SETTINGS = {
    "config.json": {
        "auto_map": {"AutoModel": "modeling_own.Model", "AutoConfig": "org/name--configuration_other.X"}
    },
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_own.Tokenizer", None]}},
    "modules.json": [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "custom_st.Dense"},
        {"path": "../elsewhere", "type": 3},
    ],
    "modeling_own.py": "import torch\nfrom .layers_own import Layer\nfrom . import tables, more\n",
}
CARRIED = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "LICENSE",
    "License.md",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "config.json",
    "config_sentence_transformers.json",
    "custom_st.py",
    "generation_config.json",
    "layers_own.py",
    "merges.txt",
    "modeling_own.py",
    "modules.json",
    "more.py",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentence_bert_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tables.py",
    "tekken.json",
    "tokenization_own.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
]
LEFT = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "README.md",
    MANIFEST_NAME,
    ".cache/config.json",
    "checkpoint-500/config.json",
    "onnx/config.json",
    "a/b/config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "all_results.json",
    "configuration_other.py",
    "eval_results.json",
    "notes.txt",
    "optimizer.pt",
    "passwords.txt",
    "quantize_config.json",
    "requirements.txt",
    "scheduler.pt",
    "tokenizer.tar",
    "train.py",
    "train_results.json",
    "trainer_state.json",
    "training_args.bin",
    "training_args.json",
]


def make(folder: Path, names: Iterable[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = SETTINGS.get(name, {} if name.endswith(".json") else "")
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_what_belongs_to_a_model_is_carried_and_nothing_else(tmp_path: Path) -> None:
    found = find_side_files(make(tmp_path, CARRIED + LEFT))
    assert list(found.carried) == CARRIED
    assert found.warnings == []
    assert all(tmp_path / name == file for name, file in found.carried.items())


def test_a_single_weight_file_has_the_files_beside_it(tmp_path: Path) -> None:
    assert list(carried_files(make(tmp_path, CARRIED + LEFT) / "model.safetensors")) == CARRIED


@given(st.lists(st.sampled_from(CARRIED + LEFT), unique=True))
def test_any_part_of_them(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = make(tmp_path_factory.mktemp("model"), names)
    found = carried_files(folder)
    assert set(found) <= set(CARRIED) & set(names)
    assert set(found) >= {name for name in CARRIED if name in names and "/" not in name and ".py" not in name}
    shutil.rmtree(folder)


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    model = make(tmp_path / "model", ["config.json"])
    (model / "blob").write_text("{}")
    (model / "generation_config.json").symlink_to("blob")
    assert list(carried_files(model)) == ["config.json", "generation_config.json"]
    (tmp_path / "link").symlink_to("model")
    assert list(carried_files(tmp_path / "link")) == ["config.json", "generation_config.json"]


def test_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (blobs / name[:3]).write_text("{}")
        (snapshot / name).symlink_to(f"../../blobs/{name[:3]}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "vocab.json").symlink_to("../../../secret")
    found = find_side_files(snapshot)
    assert list(found.carried) == ["config.json", "tokenizer.json"]
    [line] = found.warnings
    assert "links to outside of the folder are not carried over: vocab.json;" in line


def test_an_old_download_links_to_blobs_of_the_cache(tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for name, blob in {"config.json": "a1" * 20, "tokenizer.json": "b2" * 32, "vocab.json": "secret"}.items():
        (blobs / blob).write_text("{}")
        (make(tmp_path / "model", []) / name).symlink_to(blobs / blob)
    found = find_side_files(tmp_path / "model")
    assert list(found.carried) == ["config.json", "tokenizer.json"]
    assert "vocab.json" in found.warnings[0]


def test_the_list_is_documented() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in MODEL_FILES if f"`{name}`" not in page] == []


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    secret = make(tmp_path / "secret", ["key", "config.json"])
    model = make(tmp_path / "model", ["config.json", "modules.json"])
    for name in ("LICENSE", "tokenizer.json", "custom_st.py"):
        (model / name).symlink_to(secret / "key")
    (model / "vocab.json").symlink_to("../secret/key")
    (model / "1_Pooling").symlink_to(secret)
    found = find_side_files(model)
    assert list(found.carried) == ["config.json", "modules.json"]
    [line] = found.warnings
    assert line == (
        f"{model}: links to outside of the folder are not carried over: 1_Pooling/config.json, LICENSE, custom_st.py, "
        "tokenizer.json, vocab.json; copy the files into it if the output needs them"
    )


def test_an_output_never_lacks_a_config_that_its_donor_has(tmp_path: Path) -> None:
    (make(tmp_path / "secret", ["key"]) / "key").write_text("{}")
    (make(tmp_path / "model", []) / "config.json").symlink_to("../secret/key")
    with pytest.raises(CheckpointError, match=r"config\.json: a link to outside of the model's folder; copy"):
        find_side_files(tmp_path / "model")


def test_broken_links_are_named(tmp_path: Path) -> None:
    (make(tmp_path / "model", ["config.json"]) / "tokenizer.json").symlink_to("../blobs/12")
    (tmp_path / "model" / "other.json").symlink_to("nowhere")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: cannot be read: a broken link to \.\./blobs/12"
    ):
        find_side_files(tmp_path / "model")


def test_a_broken_link_to_code_is_named(tmp_path: Path) -> None:
    (make(tmp_path, ["config.json"]) / "modeling_own.py").symlink_to("../blobs/12")
    with pytest.raises(
        CheckpointError, match=r"modeling_own\.py: cannot be read: a broken link to \.\./blobs/12"
    ):
        find_side_files(tmp_path)


def test_data_and_pipes_are_not_carried(tmp_path: Path) -> None:
    for name, size in {"config.json": 2, "tokenizer.json": 100_000_000, "vocab.json": 100_000_001}.items():
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "merges.txt")
    found = find_side_files(tmp_path)
    assert list(found.carried) == ["config.json", "tokenizer.json"]
    assert found.warnings == [
        f"{tmp_path}: files above 100 MB are not carried over: vocab.json",
        f"{tmp_path}: only regular files are carried over, not merges.txt",
    ]


def test_settings_that_name_nonsense(tmp_path: Path) -> None:
    make(tmp_path, ["config.json"])
    for text in (
        '{"auto_map": 3}',
        '{"auto_map": {"A": [1, {"b": 2}], "B": "../../x.Y", "C": "x"}}',
        "[]",
        "7",
    ):
        (tmp_path / "tokenizer_config.json").write_text(text)
        (tmp_path / "modules.json").write_text(text)
        assert list(carried_files(tmp_path)) == ["config.json", "modules.json", "tokenizer_config.json"]
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"modules\.json: no valid JSON"):
        carried_files(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for missing permissions, which root never meets."""
    make(tmp_path, ["config.json", "additional_chat_templates/tools.jinja"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: permission denied"):
            carried_files(tmp_path)
    iterdir = Path.iterdir

    def denied(folder: Path) -> Iterator[Path]:
        if folder.name == "additional_chat_templates":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(
        CheckpointError, match=r"additional_chat_templates: cannot be read: Permission denied; check"
    ):
        carried_files(tmp_path)
