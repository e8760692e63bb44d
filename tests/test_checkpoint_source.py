"""Finding the weights of a folder, checking its index, and reading ranges of tensors."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_engine.checkpoint import Checkpoint, open_checkpoint
from merge_engine.errors import CheckpointError
from merge_engine.storage import File, OpenFiles

A = torch.arange(24, dtype=torch.float32).reshape(4, 6)
B = torch.arange(10, dtype=torch.int64)


def read(checkpoint: Checkpoint, name: str, files: OpenFiles | None = None) -> bytes:
    operand = checkpoint.tensors[name]
    data = bytearray(operand.stored_bytes)
    if files is not None:
        operand.read_into(memoryview(data), 0, files)
    else:
        with OpenFiles() as files:
            operand.read_into(memoryview(data), 0, files)
    return bytes(data)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": A}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": B}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return tmp_path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_single_file_with_config(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.tensors["a"].files == (File.of(tmp_path / "model.safetensors"),)
    assert read(checkpoint, "a") == raw(A)
    assert read(checkpoint, "b") == raw(B)


def test_shards(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.config == {}
    assert read(checkpoint, "a") == raw(A)
    assert read(checkpoint, "b") == raw(B)
    assert [file.path.name for file in checkpoint.tensors["b"].files] == ["model-00002-of-00002.safetensors"]
    assert "c" not in checkpoint.tensors


def test_tensors_are_in_the_order_of_the_files(tmp_path: Path) -> None:
    """And in the order of their places in them, not of the index, so that files are read from front to back."""
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    # The library sorts by size of the elements and then by name.
    save_file({"z": A, "a": A + 1, "b": B}, tmp_path / files[0])
    save_file({"c": A}, tmp_path / files[1])
    write_index(tmp_path, {"a": files[0], "c": files[1], "z": files[0], "b": files[0]})
    assert list(open_checkpoint(tmp_path).tensors) == ["b", "a", "z", "c"]


def test_nothing_is_open_and_everything_travels(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"model_type": "llama"}')
    before = open_descriptors()
    checkpoint = open_checkpoint(sharded)
    assert open_descriptors() == before
    sent = pickle.loads(pickle.dumps(checkpoint))
    assert sent == checkpoint and sent.fingerprint == checkpoint.fingerprint
    assert {hash(operand) for operand in sent.tensors.values()} == set(map(hash, checkpoint.tensors.values()))
    assert read(sent, "a") == raw(A)
    assert open_descriptors() == before


def test_single_file_goes_before_an_index(sharded: Path) -> None:
    save_file({"only": A}, sharded / "model.safetensors")
    assert list(open_checkpoint(sharded).tensors) == ["only"]


def test_file_of_another_name(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "weights.safetensors")
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        assert read(open_checkpoint(path), "a") == raw(A)


def test_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    save_file({"a": A}, blobs / "0a1b2c")
    (snapshot / "x.safetensors").symlink_to("../blobs/0a1b2c")
    write_index(snapshot, {"a": "x.safetensors"})
    assert read(open_checkpoint(snapshot), "a") == raw(A)


def test_nothing_to_open(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "none")
    assert "looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin" in refused(
        tmp_path
    )
    (tmp_path / "notes.txt").write_text("")
    assert "not a weight file" in refused(tmp_path / "notes.txt")


def test_several_files_without_an_index(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "x.safetensors")
    save_file({"a": A}, tmp_path / "y.safetensors")
    assert "holds x.safetensors, y.safetensors and no index" in refused(tmp_path)


@pytest.mark.parametrize("leftover", ["model.safetensors.part", "model-00002-of-00002.safetensors.part"])
def test_unfinished_merge_is_no_checkpoint(leftover: str, tmp_path: Path) -> None:
    (tmp_path / leftover).touch()
    (tmp_path / "pytorch_model.bin").touch()
    save_file({"a": A}, tmp_path / "model-00001-of-00002.safetensors")
    assert "unfinished merge" in refused(tmp_path)


def test_a_lone_shard_is_no_checkpoint(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "no index" in refused(sharded)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x\0.safetensors"],
)
def test_index_that_points_outside(name: str, sharded: Path) -> None:
    write_index(sharded, {"a": name})
    assert "points outside its folder" in refused(sharded)


@pytest.mark.parametrize("name", ["..", "", "x.bin", "config.json", "x.SAFETENSORS"])
def test_index_that_names_no_safetensors_file(name: str, sharded: Path) -> None:
    write_index(sharded, {"a": name})
    assert "is not a .safetensors file" in refused(sharded)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no valid JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map has 1 for 'a'"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
    ],
)
def test_malformed_index(text: str, reason: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert reason in refused(sharded)


def test_all_missing_shards_are_listed(sharded: Path) -> None:
    write_index(sharded, {str(i): f"shard{i}.safetensors" for i in range(8)})
    message = refused(sharded)
    assert "8 of 8 files" in message
    assert "shard0.safetensors" in message
    assert "and 3 more" in message


def test_index_that_places_a_tensor_wrongly(sharded: Path) -> None:
    write_index(sharded, {"a": "model-00002-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert "'a' in model-00002-of-00002.safetensors" in refused(sharded)


def test_tensors_that_the_index_forgets(sharded: Path) -> None:
    both = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    save_file({"a": A, "x": A + 1}, sharded / both["a"])
    assert read(open_checkpoint(sharded), "x") == raw(A + 1)
    save_file({"b": B, "x": B + 1}, sharded / both["b"])
    assert "'x' is in both" in refused(sharded)
    write_index(sharded, {**both, "x": both["b"]})
    assert read(open_checkpoint(sharded), "x") == raw(B + 1)


@pytest.mark.parametrize(("text", "reason"), [("{", "no valid JSON"), ("[1]", "not a JSON object")])
def test_broken_config(text: str, reason: str, sharded: Path) -> None:
    (sharded / "config.json").write_text(text)
    assert reason in refused(sharded)


def test_ranges_from_many_threads(tmp_path: Path) -> None:
    tensors = {str(i): torch.randint(0, 256, (10_007,), dtype=torch.uint8) for i in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")

    def one_range(seed: int) -> None:
        name, offset = str(seed % 16), seed * 37 % 10_007
        data = bytearray(min(seed * 91 % 3000, 10_007 - offset))
        checkpoint.tensors[name].read_into(memoryview(data), offset, files)
        assert bytes(data) == raw(tensors[name])[offset : offset + len(data)]

    checkpoint = open_checkpoint(tmp_path)
    with OpenFiles() as files, ThreadPoolExecutor(8) as pool:
        list(pool.map(one_range, range(500)))


def test_read_into_a_typed_buffer(sharded: Path) -> None:
    a = open_checkpoint(sharded).tensors["a"]
    with OpenFiles() as files:
        target = torch.empty(2, 6)
        a.read_into(memoryview(target.numpy()), 2 * 6, files)
        assert torch.equal(target, A[2:])
        a.read_into(memoryview(torch.empty(0, 6).numpy()), 24, files)
        for start in (-1, 23):
            with pytest.raises(ValueError, match="24 elements"):
                a.read_into(memoryview(bytearray(8)), start, files)
        with pytest.raises(ValueError, match="6 bytes"):  # no whole elements
            a.read_into(memoryview(bytearray(6)), 0, files)


def test_short_reads_are_continued(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:5]], at))
    assert read(open_checkpoint(sharded), "a") == raw(A)


def test_failing_disk_is_named(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    checkpoint = open_checkpoint(sharded)
    with pytest.raises(
        CheckpointError, match=r"00001-of-00002.safetensors: tensor 'a': .*Input/output error"
    ):
        read(checkpoint, "a")


def test_file_that_shrinks(sharded: Path) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    checkpoint = open_checkpoint(sharded)
    with OpenFiles() as files:
        read(checkpoint, "a", files)
        os.truncate(shard, shard.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="became shorter"):
            read(checkpoint, "a", files)


def test_file_that_changes_before_the_first_read(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    os.truncate(sharded / "model-00001-of-00002.safetensors", 0)
    with OpenFiles() as files:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="size has changed"):
                read(checkpoint, "a", files)


def test_fingerprint_changes_when_a_file_is_rewritten(sharded: Path) -> None:
    file = sharded / "model-00001-of-00002.safetensors"
    before, stat = open_checkpoint(sharded).fingerprint, file.stat()
    assert open_checkpoint(sharded).fingerprint == before
    save_file({"a": A + 1}, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_checkpoint(sharded).fingerprint != before
    save_file({"a": A.T.contiguous()}, file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_checkpoint(sharded).fingerprint != before


def test_safetensors_need_no_torch(sharded: Path) -> None:
    code = (
        "import sys, pathlib; from merge_engine.checkpoint import open_checkpoint\n"
        "from merge_engine.storage import OpenFiles\n"
        f"a = open_checkpoint(pathlib.Path({str(sharded)!r})).tensors['a']\n"
        "a.read_into(memoryview(bytearray(96)), 0, OpenFiles())\n"
        "assert not {'torch', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_more_shards_than_the_soft_limit_of_open_files(tmp_path: Path) -> None:
    """Everything is open at once while it is read, and while it is written."""
    code = (
        "import pathlib, resource, sys\n"
        "from merge_engine.checkpoint import CheckpointWriter, OutputTensor, open_checkpoint, plan_shards\n"
        "from merge_engine.dtypes import F32\n"
        "from merge_engine.storage import OpenFiles\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "folder, data = pathlib.Path(sys.argv[1]), memoryview(bytearray(4096))\n"
        "names = [str(number) for number in range(100)]\n"
        "shards = plan_shards([OutputTensor(name, F32, (1024,)) for name in names], 4096)\n"
        "with CheckpointWriter(folder, shards) as writer:\n"
        "    for name in names: writer.write(name, 0, data)\n"
        "    writer.finish()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "tensors = open_checkpoint(folder).tensors\n"
        "with OpenFiles() as files:\n"
        "    for name in names: tensors[name].read_into(data, 0, files)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)


@pytest.mark.parametrize("depth", [200, 100_000])
def test_deeply_nested_config(depth: int, tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
    message = refused(tmp_path)
    assert "config.json: " in message and "nested" in message
    (tmp_path / "config.json").write_text('{"a":' * 99 + "[]" + "}" * 99)
    open_checkpoint(tmp_path)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    assert "File name too long" in refused(tmp_path / ("x" * 300))
    write_index(tmp_path, {"a": "x" * 300 + ".safetensors"})
    assert "is too long for a file name" in refused(tmp_path)


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny(monkeypatch)
    assert (
        refused(tmp_path / "model")
        == f"{tmp_path / 'model'}: cannot be read: Permission denied; check its permissions"
    )


def deny(monkeypatch: pytest.MonkeyPatch) -> None:
    """As below a folder without x permission, which root never meets."""

    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", denied)
