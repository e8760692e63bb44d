"""``verify``: every damage to an output is found, and the finding names the place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.observe.digests import BLOCK, model_digest
from merge_engine.storage import reading

SHAPES = {"large": (4100, 2100), "small": (70, 30), "bias": (30,), "scalar": (), "none": (0, 2)}
INDEX = "model.safetensors.index.json"
MANIFEST = "merge_manifest.json"


@pytest.fixture
def inputs(save_checkpoint: SaveCheckpoint) -> list[Path]:
    torch.manual_seed(0)
    return [
        save_checkpoint(
            name,
            {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items()},
            shards=shards,
        )
        for name, shards in (("a", 1), ("b", 2))
    ]


def merge(inputs: list[Path], out: Path, shard_size: str = "5GB") -> Path:
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in inputs]
    me.run({"merge_method": "linear", "models": models}, out, shard_size=shard_size)
    return out


@pytest.fixture
def output(inputs: list[Path], tmp_path: Path) -> Path:
    """An output of several shards."""
    return merge(inputs, tmp_path / "out", "1MB")


def test_files_that_were_there_before(inputs: list[Path], output: Path) -> None:
    """A loader would read the tokens that another program added to another model. The merge and verify both say it."""
    for name in ("added_tokens.json", "notes.txt"):
        (output / name).touch()
    models = [{"model": str(folder), "parameters": {"weight": 0.25}} for folder in inputs]
    (said,) = me.run({"merge_method": "linear", "models": models}, output, overwrite=True).warnings
    assert said.startswith(f"{output}: holds added_tokens.json, which this merge did not write")
    assert str(only(me.verify(output))) == "added_tokens.json: not a part of this merge; a loader may read it"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def only(found: me.Verification) -> me.Finding:
    assert not found.complete and len(found.findings) == len(found.lines) == 1, found.lines
    return found.findings[0]


@pytest.mark.parametrize("shard_size", ["5GB", "1MB"])
@pytest.mark.parametrize("available", [0, 1 << 40])  # past the page cache, and through it
def test_an_output_is_as_it_was_merged(
    inputs: list[Path], tmp_path: Path, shard_size: str, available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = merge(inputs, tmp_path / "out", shard_size)
    monkeypatch.setattr(reading, "available_memory", lambda: available)
    total, parts = [], []
    found = me.verify(out, inputs=True, on_start=total.append, progress=parts.append)
    assert found.complete and found.lines == [] and found.summary.startswith("complete: ")
    assert [sum(parts)] == total == [sum(2 * torch.Size(shape).numel() for shape in SHAPES.values())]
    assert (found.tensors, found.shards, found.files) == (5, len(shards(out)), 3)
    side_files = [out / name for name in ("config.json", "README.md", "mergekit_config.yml")]
    assert found.nbytes == sum(file.stat().st_size for file in [*shards(out), *side_files])


def test_any_changed_byte_is_found(inputs: list[Path], tmp_path: Path) -> None:
    out = merge(inputs, tmp_path / "out", "1MB")
    files = [*shards(out), out / "config.json", out / "README.md"]

    @settings(max_examples=60)
    @given(st.data())
    def changed(data: st.DataObject) -> None:
        file = data.draw(st.sampled_from(files))
        position = data.draw(st.integers(0, file.stat().st_size - 1))
        with file.open("r+b") as stream:
            stream.seek(position)
            old = stream.read(1)
            try:
                stream.seek(position)
                stream.write(bytes([old[0] ^ data.draw(st.integers(1, 255))]))
                stream.flush()
                finding = only(me.verify(out))
            finally:
                stream.seek(position)
                stream.write(old)
        assert finding.file == file.name
        if file.suffix == ".safetensors" and finding.first is not None:
            assert finding.last is not None and finding.first <= position <= finding.last
            assert finding.last - finding.first < BLOCK and len(finding.tensors) == 1
        elif file.suffix == ".safetensors":
            assert (
                position < 8 + int.from_bytes(file.read_bytes()[:8], "little") and "header" in finding.problem
            )

    changed()
    assert me.verify(out).complete


def test_the_finding_names_tensor_and_block(inputs: list[Path], tmp_path: Path) -> None:
    out = merge(inputs, tmp_path / "out")
    (file,) = shards(out)
    places = first_bytes(file)
    with file.open("r+b") as stream:
        stream.seek(places["large"] + BLOCK)
        stream.write(b"\xff\xff\xff\xff")
    finding = only(me.verify(out))
    assert (finding.tensors, finding.first) == (("large",), places["large"] + BLOCK)
    assert "block 2 of 2 of tensor 'large'" in str(finding)


def first_bytes(file: Path) -> dict[str, int]:
    """The first byte of each tensor in a file."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {name: start + one["data_offsets"][0] for name, one in header.items() if name != "__metadata__"}


def test_damage_that_follows_is_one_line(inputs: list[Path], tmp_path: Path) -> None:
    out = merge(inputs, tmp_path / "out")
    (file,) = shards(out)
    first = min(first_bytes(file).values())
    with file.open("r+b") as stream:
        stream.seek(first)
        stream.write(bytes(file.stat().st_size - first))
    finding = only(me.verify(out))
    assert set(finding.tensors) == set(SHAPES) - {"none"}
    assert (finding.first, finding.last) == (first, file.stat().st_size - 1)


def cut(out: Path) -> None:
    os.truncate(shards(out)[0], 5000)


def lengthen(out: Path) -> None:
    with shards(out)[0].open("ab") as file:
        file.write(b"more")


def drop_shard(out: Path) -> None:
    shards(out)[0].unlink()


def swap_shards(out: Path) -> None:
    one, two = shards(out)
    one.rename(out / "x")
    two.rename(one)
    (out / "x").rename(two)


def claim_a_long_header(out: Path) -> None:
    with shards(out)[0].open("r+b") as file:
        file.write((1 << 60).to_bytes(8, "little"))


def change_index(out: Path) -> None:
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["small"] = index["weight_map"]["large"]
    (out / INDEX).write_text(json.dumps(index))


def write_index(text: str) -> Callable[[Path], None]:
    return lambda out: (out / INDEX).write_text(text) and None


def pipe_for(name: str) -> Callable[[Path], None]:
    def replace(out: Path) -> None:
        (out / name).unlink()
        os.mkfifo(out / name)

    return replace


def link_for(name: str) -> Callable[[Path], None]:
    def replace(out: Path) -> None:
        (out / name).rename(out.parent / "elsewhere")
        (out / name).symlink_to(out.parent / "elsewhere")

    return replace


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "truncated: has 5000 bytes, not"),
        (lengthen, "longer than it was: has"),
        (drop_shard, "model-00001-of-00002.safetensors: missing"),
        (claim_a_long_header, "the header is not as it was merged"),
        (change_index, f"{INDEX}: tensors are in other files than it says: 'small'"),
        (write_index("{"), f"{INDEX}: no valid JSON"),
        (write_index("[]"), f"{INDEX}: has no weight_map"),
        (
            write_index('{"weight_map": {"large": ["x"]}}'),
            f"{INDEX}: tensors are in other files than it says",
        ),
        (lambda out: (out / INDEX).unlink(), f"{INDEX}: missing"),
        (pipe_for("model-00001-of-00002.safetensors"), "a folder, pipe or device"),
        (link_for("model-00001-of-00002.safetensors"), "a link that leaves the folder"),
    ],
)
def test_damaged_weights(output: Path, damage: Callable[[Path], Any], expected: str) -> None:
    damage(output)
    found = me.verify(output)
    assert expected in str(only(found)) and found.weight_findings
    assert found.summary.startswith("damaged: ")


def test_missing_files_are_one_line_however_many_they_are(output: Path) -> None:
    missing = [*shards(output), output / "config.json"]
    for file in missing:
        file.unlink()
    found = me.verify(output)
    assert [finding.file for finding in found.findings] == [file.name for file in missing]
    assert found.lines == [f"{missing[0].name}, {missing[1].name}, config.json: missing"]


def test_shards_that_changed_places(output: Path) -> None:
    swap_shards(output)
    found = me.verify(output)
    assert {finding.file for finding in found.weight_findings} == {file.name for file in shards(output)}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda out: (out / "config.json").write_text("{}"),
            "config.json: changed after the merge: has 2 bytes",
        ),
        (lambda out: (out / "README.md").unlink(), "README.md: missing"),
        (pipe_for("README.md"), "README.md: a folder, pipe or device"),
        (
            lambda out: shutil.copy(shards(out)[0], out / "other.safetensors"),
            "other.safetensors: not a part of",
        ),
        (lambda out: (out / "pytorch_model.bin").touch(), "pytorch_model.bin: not a part of"),
        (
            lambda out: (out / "model.safetensors.part").touch(),
            "model.safetensors.part: left by another merge",
        ),
        (lambda out: (out / "adapter_config.json").touch(), "adapter_config.json: not a part of"),
        (lambda out: (out / "added_tokens.json").touch(), "added_tokens.json: not a part of"),
        (lambda out: (out / "chat_template.jinja").touch(), "chat_template.jinja: not a part of"),
        (link_for("config.json"), "config.json: a link that leaves the folder"),
    ],
)
def test_other_files_that_changed_leave_the_weights_as_they_were(
    output: Path, damage: Callable[[Path], Any], expected: str
) -> None:
    damage(output)
    found = me.verify(output)
    assert expected in str(only(found)) and found.file_findings and not found.weight_findings
    assert "the weights are as they were merged, other files are not" in found.summary


def test_a_snapshot_of_the_hub_is_links_to_blobs(output: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "0", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(output.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert me.verify(snapshot).complete


def test_inputs(output: Path, inputs: list[Path]) -> None:
    a, b = inputs
    assert me.verify(output, inputs=True).complete
    os.utime(a / "model.safetensors", ns=(0, 10**18))
    (finding,) = me.verify(output, inputs=True).findings
    assert finding.file == str(a)
    assert finding.problem.startswith(
        "model.safetensors: was written 2001-09-09 01:46:40 UTC; the file that was"
    )
    second = shards(b)[1]
    second.write_bytes(shards(b)[0].read_bytes())
    assert any(line.startswith(str(b)) for line in me.verify(output, inputs=True).lines)
    second.unlink()
    found = me.verify(output, inputs=True)
    assert any(str(b) in line and second.name in line and "missing" in line for line in found.lines)
    shutil.rmtree(a)
    found = me.verify(output, inputs=True)
    assert f"{a}: is no longer there" in found.lines[0]
    assert found.summary.startswith("inputs changed: ") and me.verify(output).complete


def change_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        manifest = json.loads((out / MANIFEST).read_text())
        change(manifest)
        (out / MANIFEST).write_text(json.dumps(manifest))

    return write


def named(place: str, name: str) -> Callable[[Path], None]:
    return change_manifest(
        lambda m: m[place].update({name: {"bytes": 1, "digest": "0" * 32, "header": "0" * 32}})
    )


def drop_tensor(out: Path) -> None:
    """Also from the digest of the model."""
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["tensors"]["small"]
    manifest["digest"] = model_digest({name: one["digest"] for name, one in manifest["tensors"].items()})
    (out / MANIFEST).write_text(json.dumps(manifest))


def large(out: Path) -> None:
    with (out / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda out: (out / MANIFEST).unlink(), "holds no merge_manifest.json"),
        (lambda out: shutil.rmtree(out), "there is no such folder"),
        (lambda out: (shutil.rmtree(out), out.write_text("")), "there is no such folder"),
        (lambda out: (out / MANIFEST).rename(out / "model.safetensors.part"), "an unfinished merge"),
        (lambda out: (out / MANIFEST).write_text("[" * 10**6), "nested too deeply|no valid JSON"),
        (lambda out: (out / MANIFEST).write_bytes(b"\xff"), "no valid JSON"),
        (pipe_for(MANIFEST), "not a regular file"),
        (large, "cannot be read: larger than"),
        (
            change_manifest(lambda m: m.update(format=2)),
            "has format 2, and this version",
        ),
        (
            change_manifest(lambda m: m.update(tensors=[])),
            "not the manifest of a merge: tensors: must be a map",
        ),
        (change_manifest(lambda m: m["tensors"]["small"].update(digest="0" * 32)), "the manifest is damaged"),
        (
            change_manifest(lambda m: m["tensors"]["large"]["blocks"].reverse()),
            "not those of their tensor: large; the",
        ),
        (
            change_manifest(lambda m: m["tensors"]["large"].pop("blocks")),
            "it has digests of 0 blocks, and not of 2",
        ),
        (drop_tensor, "tensor 'small' is in a file but not in it"),
        (named("files", "../x"), "'../x' is not the name of a file inside the folder"),
        (named("files", "/etc/passwd"), "is not the name of a file inside"),
        (named("files", "a/../../x"), "is not the name of a file inside"),
        (named("files", "a\0b"), "is not the name of a file inside"),
        (named("files", "x" * 5000), "is too long for the name of a file"),
        (named("shards", "a/b.safetensors"), "is not the name of a file in the folder"),
        (named("shards", ".."), "is not the name of a file inside"),
        (
            change_manifest(lambda m: m["files"]["config.json"].update(bytes=-1)),
            "not the manifest of a merge",
        ),
        (
            change_manifest(lambda m: m["files"]["config.json"].update(bytes=True)),
            "not the manifest of a merge",
        ),
    ],
)
def test_a_manifest_that_is_missing_or_damaged(
    output: Path, damage: Callable[[Path], Any], expected: str
) -> None:
    damage(output)
    with pytest.raises(me.ManifestError, match=expected) as caught:
        me.verify(output)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places_in(one, (*path, key)))]


ODD = [None, True, -1, 0, 2**63, 2**70, 1.5, "", "x", "../x", "0" * 32, "\x1b", [], [[]], {}, {"": {}}]


def test_no_manifest_makes_it_fail_in_another_way(output: Path) -> None:
    text = (output / MANIFEST).read_text()
    places = places_in(json.loads(text))[1:]

    @settings(max_examples=150)
    @given(st.sampled_from(places), st.sampled_from(ODD), st.booleans())
    def odd(place: tuple[Any, ...], value: Any, as_key: bool) -> None:
        manifest = json.loads(text)
        inner = manifest
        for key in place[:-1]:
            inner = inner[key]
        if as_key and isinstance(inner, dict) and isinstance(value, str):
            inner[value] = inner.pop(place[-1])
        else:
            inner[place[-1]] = value
        (output / MANIFEST).write_text(json.dumps(manifest))
        try:
            found = me.verify(output, inputs=True)
        except me.ManifestError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert all(len(line.splitlines()) == 1 or "\x1b" in line for line in found.lines)

    odd()


def test_the_command_line(output: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "merge_engine", "verify", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    right = call(output, "--inputs")
    assert right.returncode == 0 and right.stdout.startswith("complete: ") and right.stdout.count("\n") == 1
    (output / "x\x1b[2J\u202e.bin").touch()
    wrong = call(output)
    assert wrong.returncode == 1 and wrong.stdout.startswith(r"x\x1b[2J\u202e.bin: not a part")
    (output / MANIFEST).unlink()
    missing = call(output)
    assert (
        missing.returncode == 1 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
    )
