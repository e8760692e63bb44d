"""Files that are read whole: only regular ones, and never more bytes than a limit."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge_engine.checkpoint import encode_config, open_checkpoint
from merge_engine.errors import CheckpointError, ManifestError, MergeError, RecipeError
from merge_engine.recipe import load_recipe
from merge_engine.report import write_report
from merge_engine.storage import read_bounded


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # a path of a socket has at most 107 bytes
    finally:
        os.close(here)


def folder(path: Path) -> None:
    path.mkdir()


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 20_000_000_000)


NO_FILES: dict[Callable[[Path], None], str] = {
    fifo: "a pipe, socket or device, not a regular file; copy what it holds into one",
    link_to_fifo: "a pipe, socket or device, not a regular file; copy what it holds into one",
    endless: "a pipe, socket or device, not a regular file; copy what it holds into one",
    listening: "a pipe, socket or device, not a regular file; copy what it holds into one",
    folder: "a folder, not a file",
    broken_link: "a broken link to nowhere",
    link_in_a_circle: "Too many levels of symbolic links",
    sparse: "larger than the",
}


@pytest.mark.parametrize(("make", "reason"), NO_FILES.items(), ids=lambda it: getattr(it, "__name__", ""))
def test_what_is_no_file(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "file")
    with pytest.raises(OSError, match=reason):
        read_bounded(tmp_path / "file", 1000)


def test_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    assert read_bounded(tmp_path / "file", 1000) == bytes(1000)
    with pytest.raises(OSError, match="larger than"):
        read_bounded(tmp_path / "file", 999)
    with pytest.raises(OSError, match="larger than"):  # it says that it has no bytes
        read_bounded(Path("/proc/self/status"), 10)
    with pytest.raises(FileNotFoundError):
        read_bounded(tmp_path / "none", 1000)


@pytest.mark.parametrize(("make", "reason"), NO_FILES.items(), ids=lambda it: getattr(it, "__name__", ""))
def test_every_reader_refuses_it_in_one_line(
    make: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    def refused(kind: type[MergeError], read: Callable[[], object], path: Path) -> None:
        with pytest.raises(kind) as caught:
            read()
        message = str(caught.value)
        assert str(path) in message and reason in message and "\n" not in message

    for number, name in enumerate(("config.json", "model.safetensors.index.json")):
        model = tmp_path / str(number)
        model.mkdir()
        save_file({"a": torch.ones(1)}, model / "x.safetensors")
        if name == "config.json" or make in (sparse,):
            make(model / name)
            refused(CheckpointError, lambda model=model: open_checkpoint(model), model / name)  # type: ignore[misc]
    recipe = tmp_path / "recipe.yaml"
    make(recipe)
    refused(RecipeError, lambda: load_recipe(recipe), recipe)
    output = tmp_path / "output"
    output.mkdir()
    manifest = output / "merge_manifest.json"
    make(manifest)
    if make is sparse:
        os.truncate(manifest, 2_000_000_000)
    refused(ManifestError, lambda: write_report(output), manifest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
file_names = st.sampled_from(
    ["x.safetensors", "../x.safetensors", ".safetensors", "\x1b[2J.safetensors", "y" * 300]
)


@given(
    json_values | st.dictionaries(st.just("weight_map"), json_values | st.dictionaries(st.text(), file_names))
)
def test_an_index_of_anything(tmp_path_factory: pytest.TempPathFactory, index: object) -> None:
    folder = tmp_path_factory.getbasetemp() / "indexed"
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(1)}, folder / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        assert "a" in open_checkpoint(folder).tensors
    except CheckpointError as error:
        assert len(str(error)) < 1000


@given(json_values | st.dictionaries(st.text(), json_values))
def test_a_config_of_anything(tmp_path_factory: pytest.TempPathFactory, config: object) -> None:
    folder = tmp_path_factory.getbasetemp() / "configured"
    folder.mkdir(exist_ok=True)
    try:
        found = open_checkpoint(with_config(folder, json.dumps(config))).config
    except CheckpointError as error:
        assert len(str(error)) < 1000
    else:
        assert found == config
        assert json.loads(encode_config(found), parse_constant=None) == config


def with_config(folder: Path, text: str) -> Path:
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r'{"a\ud800": 1}', r"a text in it holds '\ud800', half a character"),
        (r'{"a": ["x", {"b": "\udc00\ud800"}]}', r"a text in it holds '\udc00', half a character"),
        ('{"a": [NaN]}', "it holds NaN"),
        ('{"a": 1' + "0" * 5000 + "}", "no valid JSON"),
    ],
)
def test_settings_that_cannot_be_written_again(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(with_config(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors"])
def test_more_values_than_memory_should_hold(name: str, tmp_path: Path) -> None:
    text = b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"
    if name == "model.safetensors":
        text = len(text).to_bytes(8, "little") + text
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match="it holds more than 5,000,000 values; download it again"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", [r'{"a": "\ud83d\ude00"}', r'{"a": "\\ud800"}', '{"a": 1, "a": 2}'])
def test_settings_as_other_readers_take_them(text: str, tmp_path: Path) -> None:
    assert open_checkpoint(with_config(tmp_path, text)).config == json.loads(text)
