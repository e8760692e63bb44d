"""How people name inputs, and what they find there: spellings of one path, the hub's cache, and other formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

import merge_engine
from merge_engine.checkpoint import locate, open_checkpoint
from merge_engine.errors import CheckpointError, MergeError
from merge_engine.recipe import ModelReference, load_recipe
from merge_engine.text import printable

SaveCheckpoint = Callable[..., Path]
A = torch.arange(24, dtype=torch.float32).reshape(4, 6)


def refused(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(locate(str(path), None))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


# --- one model, several paths


@pytest.fixture
def family(save_checkpoint: SaveCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_checkpoint("base", {"w": A}, shards=1)
    save_checkpoint("a", {"w": A + 1})
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "to.safetensors").symlink_to("base/model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


SPELLINGS = [
    "base",
    "./base",
    "base/",
    "a/../base",
    "link",
    "~/base",
    "base/model.safetensors",
    "to.safetensors",
]


@pytest.mark.parametrize("listed", [*SPELLINGS, "{}/base"])
@pytest.mark.parametrize("base", ["base", "link", "base/model.safetensors"])
def test_a_listed_base_is_the_base_however_its_path_is_written(listed: str, base: str, family: Path) -> None:
    models = [{"model": listed.format(family)}, {"model": "a"}]
    parameters = {"weight": 0.5, "density": 1.0, "normalize": True}
    recipe = {"merge_method": "dare_linear", "base_model": base, "models": models, "parameters": parameters}
    planned = merge_engine.plan(load_recipe(recipe))
    assert list(planned.models) == [1]
    assert torch.equal(merge_engine.run(load_recipe(recipe)).tensors["w"], A + 1)  # type: ignore[index]


def test_the_hubs_name_and_its_cached_folder_are_one_model(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(family / "base"))
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
        "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "link"}],
    }
    assert list(merge_engine.plan(load_recipe(recipe)).models) == [0]


def test_a_copy_of_the_base_is_a_model(family: Path) -> None:
    (family / "copy").mkdir()
    for name in ("config.json", "model.safetensors"):
        (family / "copy" / name).write_bytes((family / "base" / name).read_bytes())
    models = [{"model": "copy"}, {"model": "a"}]
    recipe = {"merge_method": "ties", "base_model": "base", "models": models, "parameters": {"weight": 1}}
    assert list(merge_engine.plan(load_recipe(recipe)).models) == [0, 1]


def test_a_model_under_two_names_is_noted(family: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in ("a", "base", "link", "./a")],
    }
    notes = merge_engine.plan(load_recipe(recipe)).notes
    assert notes == (
        "a is merged more than once, as models[0], models[3]",
        "base is merged more than once, as models[1], models[2]",
    )


@pytest.mark.parametrize(
    "name", ["model+ema.safetensors", "step@1000.safetensors", "a@b@c.bin", "x+y", "x@y"]
)
@pytest.mark.parametrize("below", ["{}/", "~/", ""])
def test_what_exists_is_taken_as_it_is(name: str, below: str, family: Path) -> None:
    (family / name).touch() if "." in name else (family / name).mkdir()
    path = below.format(family) + name
    for raw in (path, {"model": path}, {"model": {"path": path}}):
        assert load_recipe({"merge_method": "linear", "models": [{"model": raw}]}).models[
            0
        ].model == ModelReference(path=path)


# --- names that are no paths


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        ("https://huggingface.co/org/name", "write org/name"),
        ("https://huggingface.co/org/name-7B.v2/tree/main", "write org/name-7B.v2"),
        ("http://hf.co/org/name?x=1", "write org/name"),
        ("https://example.com/model.safetensors", "download the model and name its folder"),
        ("file:///models/base", "write /models/base"),
        ("s3://bucket/model", "download the model and name its folder"),
    ],
)
def test_web_addresses(address: str, instead: str) -> None:
    assert refused(address) == f"{address}: an address, not a folder or a name on the hub; {instead}"


@pytest.mark.parametrize(
    "path", ["/a\0b", "a\0b", "/\ud800", "/" + "x" * 5000, "x" * 5000, "/" + "x/" * 5000]
)
def test_names_that_no_file_can_have(path: str) -> None:
    message = refused(path)
    if len(path) < 10:
        assert message == f"{printable(path)}: no folder or file has such a name"
    else:
        assert message.startswith(f"{path[:300]}...: ")


# --- folders that are no checkpoint


@pytest.mark.parametrize("stem", ["model", "pytorch_model", "x"])
def test_a_single_shard_is_whole(stem: str, tmp_path: Path) -> None:
    if stem == "pytorch_model":
        torch.save({"w": A}, tmp_path / "pytorch_model-00001-of-00001.bin")
    else:
        save_file({"w": A}, tmp_path / f"{stem}-00001-of-00001.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["w"]


@pytest.mark.parametrize("name", ["model-00001-of-00002", "model-00002-of-00002", "model-00001-of-10001"])
def test_one_shard_of_several_is_not(name: str, tmp_path: Path) -> None:
    save_file({"w": A}, tmp_path / f"{name}.safetensors")
    assert "but no index: an unfinished merge or download" in refused(tmp_path)


LINKED = {
    "model.safetensors": "model.safetensors: cannot be read: a broken link to ../../blobs/12",
    "model.safetensors.index.json": "model.safetensors.index.json: cannot be read: a broken link to ../../blobs/12",
    "other.safetensors": "other.safetensors: cannot be read: a broken link to ../../blobs/12",
    "pytorch_model.bin": "pytorch_model.bin: cannot be read: a broken link to ../../blobs/12",
    "model-00001-of-00001.safetensors": "safetensors: cannot be read: a broken link to ../../blobs/12",
}


@pytest.mark.parametrize("name", LINKED)
def test_broken_links_to_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("../../blobs/12")
    assert refused(tmp_path).endswith(LINKED[name])
    if not name.endswith(".json"):
        assert refused(tmp_path / name).endswith(LINKED[name])


def test_other_broken_links(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> None:
    model = save_checkpoint("model", {"v": A, "w": A}, shards=2)
    (model / "model-00002-of-00002.safetensors").unlink()
    (model / "model-00002-of-00002.safetensors").symlink_to("../../blobs/12")
    assert refused(model) == (
        f"{model}: 1 of 2 files named by model.safetensors.index.json are broken links: "
        "model-00002-of-00002.safetensors; download them again"
    )
    (tmp_path / "gone").symlink_to("nowhere")
    assert refused(tmp_path / "gone").endswith("gone: cannot be read: a broken link to nowhere")


def test_a_config_that_is_a_broken_link(save_checkpoint: SaveCheckpoint) -> None:
    model = save_checkpoint("model", {"w": A})
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("../../blobs/34")
    assert refused(model) == f"{model / 'config.json'}: cannot be read: a broken link to ../../blobs/34"


def test_a_side_file_that_is_a_broken_link_is_found_by_the_plan(family: Path) -> None:
    (family / "a" / "tokenizer.json").symlink_to("../blobs/1")
    recipe = load_recipe({"merge_method": "passthrough", "models": [{"model": "a"}]})
    with pytest.raises(MergeError, match=r"tokenizer\.json: cannot be read: a broken link to \.\./blobs/1"):
        merge_engine.plan(recipe, family / "out")
    (family / "a" / "tokenizer.json").unlink()
    (family / "a" / "tokenizer.json").symlink_to("/etc/hostname")
    [warning] = merge_engine.plan(recipe, family / "out").warnings
    assert warning.startswith("a: links to outside of the folder are not carried over: tokenizer.json; ")
    merge_engine.run(recipe, family / "out")
    assert not (family / "out" / "tokenizer.json").exists()


def test_folders_of_the_hubs_cache(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--some--name"
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    assert refused(cache) == (
        f"{cache}: a folder of the hub's cache, not a model; name one of its snapshots, snapshots/{'a' * 40}, or write "
        "org/some--name"
    )
    (snapshot / "config.json").write_text("{}")
    assert refused(snapshot).endswith("but its weights were not downloaded; download the whole model")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["model.Q4_K_M.gguf"],
            "it holds model.Q4_K_M.gguf: GGUF is not supported; convert it to safetensors",
        ),
        (["tf_model.h5", "config.json"], "it holds tf_model.h5: TensorFlow is not supported"),
        (["flax_model.msgpack"], "it holds flax_model.msgpack: Flax is not supported"),
        (["model.onnx"], "it holds model.onnx: ONNX is not supported"),
        (
            ["consolidated.00.pth", "consolidated.01.pth"],
            "it holds consolidated.00.pth, consolidated.01.pth: Meta's format of several parts is not supported",
        ),
        (
            ["checkpoint-500/model.safetensors"],
            "no weights in it, but in its subfolder checkpoint-500; name the one",
        ),
        (
            ["checkpoint-1/pytorch_model.bin", "checkpoint-2/model.safetensors.index.json", "logs/x.txt"],
            "no weights in it, but in its subfolder checkpoint-1, checkpoint-2; name the one",
        ),
        (["config.json", "tokenizer.json"], "it holds a config.json, but its weights were not downloaded"),
        (
            ["x.safetensors", "y.safetensors"],
            "it holds x.safetensors, y.safetensors and no index; name the file",
        ),
        (["training_args.bin"], "no weights in it: looked for model.safetensors"),
    ],
)
def test_folders_without_weights(names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert refused(tmp_path).startswith(f"{tmp_path}: {words}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.gguf", "GGUF is not supported; convert it to safetensors"),
        ("MODEL.GGUF", "GGUF is not supported"),
        ("model.safetensors.index.json", "an index, not a weight file; name its folder"),
        ("config.json", "not a weight file; name a folder, or a .safetensors, .bin, .pt or .pth file"),
    ],
)
def test_files_that_are_no_weights(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    assert refused(tmp_path / name).startswith(f"{tmp_path / name}: {words}")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    assert "a pipe, socket or device" in refused(tmp_path / "model.safetensors")
    assert "no weights in it" in refused(tmp_path)
    assert "a pipe, socket or device" in refused("/dev/zero")
