"""Written checkpoints are what other libraries read, and are complete or not there."""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_engine.checkpoint import CheckpointWriter, OutputTensor, ShardLayout, open_checkpoint, plan_shards
from merge_engine.checkpoint.header import PAGE
from merge_engine.dtypes import BY_CODE, BY_NAME
from merge_engine.errors import CheckpointError, OutputError

State = dict[str, torch.Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
# Big enough for early write-back, for whole pages and for two shards.
STATE: State = {
    "big": torch.arange(1_200_000, dtype=torch.float32),
    "page": torch.arange(PAGE, dtype=torch.int64),
    "odd": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(0.5, dtype=torch.bfloat16),
    "none": torch.zeros(0, 3),
}
LIMIT = 4_000_000


def plan(state: State, limit: int = LIMIT) -> list[ShardLayout]:
    described = [
        OutputTensor(name, BY_NAME[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in state.items()
    ]
    return plan_shards(described, limit)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def write_all(writer: CheckpointWriter, state: State) -> None:
    for name, tensor in state.items():
        writer.write(name, 0, memoryview(raw(tensor)))


def write_checkpoint(folder: Path, state: State, limit: int = LIMIT) -> None:
    with CheckpointWriter(folder, plan(state, limit)) as writer:
        write_all(writer, state)
        writer.finish()


def load_folder(folder: Path) -> State:
    """Load as the hub's clients do: by the index, with the safetensors library."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state: State = {}
    for name, file_name in index["weight_map"].items():
        with safe_open(folder / file_name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            state[name] = file.get_tensor(name)
    assert index["metadata"] == {"total_size": sum(len(raw(tensor)) for tensor in state.values())}
    return state


def assert_same(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert raw(found[name]) == raw(tensor)


def names_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


@st.composite
def states(draw: st.DrawFn) -> State:
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=6, unique=True))
    random = Random(draw(st.integers(0, 2**32)))
    state: State = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.sampled_from([(), (0,), (3,), (2, 0, 5), (64, 64), (7, 11, 13), (4096,)]))
        count = torch.Size(shape).numel() * dtype.itemsize
        data = bytes(2) * count if dtype is torch.bool else random.randbytes(count)
        flat = torch.frombuffer(bytearray(data[:count]), dtype=torch.uint8) if count else torch.empty(0)
        state[name] = flat.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    return state


@settings(max_examples=60, deadline=None)
@given(states(), st.sampled_from([3000, 20_000, 10**9]), st.integers(0, 2**32))
def test_any_order_any_pieces_any_thread(state: State, limit: int, seed: int) -> None:
    random = Random(seed)
    pieces = []
    for name, tensor in state.items():
        data = raw(tensor)
        cuts = sorted({0, len(data), *(random.randint(0, len(data)) for _ in range(4))})
        pieces += [(name, a, memoryview(data)[a:b]) for a, b in itertools.pairwise(cuts)]
    random.shuffle(pieces)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "out"
        with CheckpointWriter(folder, plan(state, limit)) as writer, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda piece: writer.write(*piece), pieces))
            writer.finish()
        assert_same(load_folder(folder), state)
        with open_checkpoint(folder) as checkpoint:
            for name, tensor in state.items():
                data = bytearray(checkpoint.tensors[name].nbytes)
                checkpoint.read_into(name, 0, memoryview(data))
                assert bytes(data) == raw(tensor)
                assert len(data) % PAGE or checkpoint.tensors[name].start % PAGE == 0


@settings(max_examples=40, deadline=None)
@given(states())
def test_files_of_the_library_are_read(state: State) -> None:
    with tempfile.TemporaryDirectory() as top:
        path = Path(top) / "model.safetensors"
        save_file(state, path)
        with open_checkpoint(path) as checkpoint:
            assert set(checkpoint.tensors) == set(state)
            for name, tensor in state.items():
                assert checkpoint.tensors[name].shape == tuple(tensor.shape)
                data = bytearray(checkpoint.tensors[name].nbytes)
                checkpoint.read_into(name, 0, memoryview(data))
                assert bytes(data) == raw(tensor)


def test_shards_index_and_side_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with CheckpointWriter(folder, plan(STATE)) as writer:
        writer.add_file("config.json", b"{}")
        writer.add_file("1_Pooling/config.json", b"[]")
        write_all(writer, STATE)
        assert all(name.endswith(".part") or name == "1_Pooling" for name in names_in(folder))
        writer.finish()
    assert names_in(folder) == [
        "1_Pooling",
        "1_Pooling/config.json",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert_same(load_folder(folder), STATE)
    assert (folder / "1_Pooling/config.json").read_bytes() == b"[]"
    assert b" " not in (folder / "model.safetensors.index.json").read_bytes()


def test_single_file_has_no_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, STATE, 10**9)
    assert names_in(tmp_path) == ["model.safetensors"]
    assert_same(load_folder(tmp_path), STATE)


def test_nothing_to_write(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    assert load_folder(tmp_path) == {}


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..", "", "link/x", "a/.."])
def test_side_files_stay_inside(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with CheckpointWriter(folder, plan(STATE)) as writer:
        (folder / "link").symlink_to(tmp_path)
        with pytest.raises(OutputError, match="not the name of a file inside"):
            writer.add_file(name, b"")
    assert names_in(tmp_path) == ["out", "out/link"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1_000_003], at))
    write_checkpoint(tmp_path, STATE)
    assert_same(load_folder(tmp_path), STATE)


def test_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write_checkpoint(tmp_path, STATE)
    assert_same(load_folder(tmp_path), STATE)


def test_a_shard_is_synced_while_others_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: synced.set())
    with CheckpointWriter(tmp_path, plan(STATE)) as writer:
        writer.write("big", 0, memoryview(raw(STATE["big"])))
        assert synced.wait(10)


def test_bytes_that_are_missing_too_many_or_late(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with CheckpointWriter(folder, plan(STATE)) as writer:
        writer.write("odd", 0, memoryview(bytes(7)))
        for offset, data in ((0, bytes(8)), (-1, bytes(1)), (7, bytes(1))):
            with pytest.raises(OutputError, match="'odd' has 7 bytes"):
                writer.write("odd", offset, memoryview(data))
        with pytest.raises(OutputError, match="'odd' was written twice"):
            writer.write("odd", 3, memoryview(bytes(1)))
    with CheckpointWriter(folder, plan(STATE)) as writer:
        writer.write("odd", 0, memoryview(bytes(6)))
        with pytest.raises(OutputError, match="not completely written: big, page, scalar, odd"):
            writer.finish()
    with pytest.raises(OutputError, match="after it was closed"):
        writer.write("odd", 6, memoryview(bytes(1)))
    assert not folder.exists()


def test_abort_leaves_nothing_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(folder, plan(STATE)) as writer:
        writer.add_file("sub/config.json", b"{}")
        write_all(writer, STATE)
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").touch()
    CheckpointWriter(folder, plan(STATE)).abort()
    assert names_in(tmp_path) == ["mine", "mine/notes.txt"]


def test_abort_waits_for_writes_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed descriptor's number may be another file's by the time a late write arrives."""
    started, go_on = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow_pwrite(descriptor: int, data: memoryview, position: int) -> int:
        started.set()
        assert go_on.wait(10)
        return pwrite(descriptor, data, position)

    writer = CheckpointWriter(tmp_path, plan(STATE))
    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    with ThreadPoolExecutor(2) as pool:
        write = pool.submit(writer.write, "odd", 0, memoryview(bytes(7)))
        assert started.wait(10)
        abort = pool.submit(writer.abort)
        assert not abort.done()
        go_on.set()
        write.result(10)
        abort.result(10)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_full_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def attempt() -> None:
        with CheckpointWriter(tmp_path / "out", plan(STATE)) as writer:
            write_all(writer, STATE)
            writer.finish()

    monkeypatch.setattr(os, call, full)
    message = r"model-00001-of-00002.safetensors.part: .*No space left on device \(free space: [\d.]+ GB\)"
    with pytest.raises(OutputError, match=message):
        attempt()
    assert names_in(tmp_path) == []


def test_truly_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(OutputError, match="No space left on device"):
            CheckpointWriter(tmp_path / "out", plan(STATE))
        assert names_in(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_two_merges_into_one_folder(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, plan(STATE)) as first:
        with pytest.raises(OutputError, match="another merge"):
            CheckpointWriter(tmp_path, plan(STATE))
        write_all(first, STATE)
        first.finish()
    assert_same(load_folder(tmp_path), STATE)
    CheckpointWriter(tmp_path, plan(STATE)).abort()


OLD: State = {name: torch.full((300,), float(i)) for i, name in enumerate(("a", "b", "c"))}
NEW: State = {name: tensor + 10 for name, tensor in OLD.items()}
ONE_FILE, THREE_SHARDS, TWO_SHARDS = 10**9, 1200, 2400


@pytest.mark.parametrize("before", [ONE_FILE, TWO_SHARDS, THREE_SHARDS])
@pytest.mark.parametrize("after", [ONE_FILE, TWO_SHARDS, THREE_SHARDS])
def test_overwrite(before: int, after: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, before)
    kept = tmp_path / "notes.txt", tmp_path / "adapter.safetensors"
    for file in kept:
        file.touch()
    with CheckpointWriter(tmp_path, plan(NEW, after)) as writer:
        write_all(writer, NEW)
        assert_same(load_folder(tmp_path), OLD)
        writer.finish()
    assert_same(load_folder(tmp_path), NEW)
    assert len(names_in(tmp_path)) == {ONE_FILE: 1, TWO_SHARDS: 3, THREE_SHARDS: 4}[after] + len(kept)


def test_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, TWO_SHARDS)
    before = names_in(tmp_path)
    CheckpointWriter(tmp_path, plan(NEW)).abort()
    assert names_in(tmp_path) == before
    assert_same(load_folder(tmp_path), OLD)


def test_leftovers_of_a_killed_merge_go(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model-00009-of-00009.safetensors.part").touch()
    (folder / "model.safetensors.part").symlink_to(outside)
    write_checkpoint(folder, STATE, 10**9)
    assert names_in(folder) == ["model.safetensors"]
    assert outside.read_text() == "precious"


# Replaces OLD by NEW; dies by SIGKILL at the n-th call that changes the folder, counted from the first write.
CHILD = """
import array, os, pathlib, signal, sys
from merge_engine.checkpoint import CheckpointWriter, OutputTensor, plan_shards
from merge_engine.dtypes import F32
folder, limit, last = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
shards = plan_shards([OutputTensor(name, F32, (300,)) for name in "abc"], limit)
writer = CheckpointWriter(folder, shards)
calls = 0
def dying(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.pwrite = dying(os.pwrite)
os.fsync = dying(os.fsync)
pathlib.Path.replace = dying(pathlib.Path.replace)
pathlib.Path.unlink = dying(pathlib.Path.unlink)
writer.add_file("config.json", b"{}")
for i, name in enumerate("abc"):
    writer.write(name, 0, memoryview(array.array("f", [10.0 + i] * 300)))
writer.finish()
"""


@pytest.mark.parametrize("after", [ONE_FILE, TWO_SHARDS])
@pytest.mark.parametrize("before", [None, ONE_FILE, THREE_SHARDS])
def test_killed_at_any_moment(before: int | None, after: int, tmp_path: Path) -> None:
    """After a kill at any step the folder holds the old checkpoint, the new one, or visibly none."""
    outcomes = []
    for last in range(1, 100):
        folder = tmp_path / str(last)
        if before is not None:
            write_checkpoint(folder, OLD, before)
        code = subprocess.run([sys.executable, "-c", CHILD, str(folder), str(after), str(last)]).returncode
        try:
            open_checkpoint(folder).close()
        except CheckpointError as error:
            assert "unfinished" in str(error)
            outcomes.append("none")
        else:
            state = load_folder(folder)
            outcomes.append("new" if state["a"][0] == 10 else "old")
            assert_same(state, NEW if outcomes[-1] == "new" else OLD)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        write_checkpoint(folder, NEW, after)  # the next run gets through
        assert_same(load_folder(folder), NEW)
        assert not any(name.startswith("model") and name.endswith(".part") for name in names_in(folder))
    assert code == 0
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)
    assert outcomes.count("none") >= 2
    assert ("old" in outcomes) == (before is not None)


@pytest.mark.parametrize("refuses", ("open", "write", "nothing"))
def test_file_systems_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str
) -> None:
    """Whole pages from aligned memory go past the page cache where that works, and through it elsewhere."""
    real_open, real_pwrite = os.open, os.pwrite
    direct: set[int] = set()
    written: list[int] = []

    def open_(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT and refuses == "open":
            raise OSError(errno.EINVAL, "no direct IO")
        descriptor = real_open(path, flags, *mode)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def pwrite(descriptor: int, data: memoryview, position: int) -> int:
        if descriptor in direct:
            if refuses == "write":
                raise OSError(errno.EINVAL, "no direct IO")
            written.append(len(data))
        return real_pwrite(descriptor, data, position)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    memory = memoryview(mmap.mmap(-1, 5 * 4096))
    memory[:] = os.urandom(len(memory))
    sizes = {"pages": 4 * 4096, "rest": 4096 + 100}
    tensors = [OutputTensor(name, BY_CODE["U8"], (size,)) for name, size in sizes.items()]
    with CheckpointWriter(tmp_path / "out", plan_shards(tensors, 10**9)) as writer:
        for name, size in sizes.items():
            writer.write(name, 0, memory[:size])
        writer.finish()
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, size in sizes.items():
        assert bytes(state[name].tolist()) == bytes(memory[:size])
    assert written == ([4 * 4096, 4096] if refuses == "nothing" else [])


@pytest.mark.parametrize(
    ("name", "early"),
    [
        ("README.md", False),
        ("README.md", True),
        ("model.safetensors", True),
        ("model.safetensors.index.json", False),
        ("model.safetensors.index.json", True),
    ],
)
def test_folder_with_the_name_of_a_file(name: str, early: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OLD, TWO_SHARDS if name == "model.safetensors" else ONE_FILE)

    def attempt() -> None:
        with CheckpointWriter(tmp_path, plan(NEW, TWO_SHARDS)) as writer:
            (tmp_path / name).mkdir(exist_ok=True)
            writer.add_file("README.md", b"new")
            write_all(writer, NEW)
            writer.finish()

    if early:
        (tmp_path / name).mkdir()
    before = {*names_in(tmp_path), name}
    with pytest.raises(OutputError, match=f"{name}: is a folder, but a file needs this name"):
        attempt()
    assert set(names_in(tmp_path)) == before
    (tmp_path / name).rmdir()
    assert_same(load_folder(tmp_path), OLD)


@pytest.mark.parametrize("call", ["unlink", "replace"])
def test_failure_after_the_old_weights_gave_way(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the new weights are the only ones: they stay, complete, and the error says how to get them."""
    write_checkpoint(tmp_path, OLD, THREE_SHARDS)
    real = getattr(Path, call)

    def failing(path: Path, *arguments: object, **options: object) -> object:
        if path.name.startswith("model-00002-of-0000"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    def attempt() -> None:
        with CheckpointWriter(tmp_path, plan(NEW, TWO_SHARDS)) as writer:
            write_all(writer, NEW)
            monkeypatch.setattr(Path, call, failing)
            writer.finish()

    with pytest.raises(
        OutputError, match=r"Input/output error .*the new weights are complete: remove \.part"
    ):
        attempt()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(tmp_path)
    for part in tmp_path.glob("*.part"):
        part.replace(part.with_suffix(""))
    assert_same(load_folder(tmp_path), NEW)


def open_paths() -> list[Path]:
    """What this process has open; the descriptor that lists the folder is gone by the time it is looked at."""
    return [link.readlink() for link in list(Path("/proc/self/fd").iterdir()) if link.is_symlink()]


def test_failing_start_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(open_paths())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left"):
        CheckpointWriter(tmp_path / "out", plan(STATE))
    assert len(open_paths()) == before
    assert names_in(tmp_path) == []


def test_a_complete_shard_is_closed(tmp_path: Path) -> None:
    """And a direct descriptor is opened only for a shard that has whole pages to write."""

    def parts() -> list[str]:
        return sorted(
            path.name for path in open_paths() if path.parent == tmp_path and path.suffix == ".part"
        )

    names = [f"model-0000{i}-of-00002.safetensors.part" for i in (1, 2)]
    with CheckpointWriter(tmp_path, plan(STATE)) as writer:
        assert parts() == names
        writer.write("odd", 0, memoryview(raw(STATE["odd"])))
        assert parts() == names
        big = memoryview(raw(STATE["big"]))
        writer.write("big", 0, big[:PAGE])
        assert parts() == [names[0], *names]
        writer.write("big", PAGE, big[PAGE:])
        for name in ("page", "scalar"):
            writer.write(name, 0, memoryview(raw(STATE[name])))
        writer.flush()
        assert parts() == []
        writer.finish()
    assert_same(load_folder(tmp_path), STATE)


def test_no_descriptor_left_for_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def open_(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT == os.O_DIRECT:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", open_)
    write_checkpoint(tmp_path, STATE)
    assert_same(load_folder(tmp_path), STATE)


def write_with_files(folder: Path, names: list[str], manifest: object) -> None:
    with CheckpointWriter(folder, plan(STATE, ONE_FILE)) as writer:
        for name in names:
            writer.add_file(name, b"x")
        writer.add_file("merge_manifest.json", json.dumps(manifest).encode())
        write_all(writer, STATE)
        writer.finish()


def test_side_files_of_the_earlier_output_go(tmp_path: Path) -> None:
    first = ["config.json", "tokenizer.model", "sub/a.json", "shared/b.json"]
    write_with_files(tmp_path, first, {"files": [*first, "model.safetensors.part", "gone.txt"]})
    (tmp_path / "notes.txt").touch()
    (tmp_path / "shared" / "mine.txt").touch()
    write_with_files(tmp_path, ["config.json"], {"files": ["config.json"]})
    assert names_in(tmp_path) == [
        "config.json",
        "merge_manifest.json",
        "model.safetensors",
        "notes.txt",
        "shared",
        "shared/mine.txt",
    ]
    assert_same(load_folder(tmp_path), STATE)


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {},
        {"files": "a.txt"},
        {"files": ["a.txt", 1]},
        {"files": ["a.txt", "../outside.txt"]},
        {"files": ["a.txt", "link/outside.txt"]},
        {"files": ["a.txt", "circle/x"]},
        {"files": ["a.txt", "\0"]},
        {"files": ["a.txt", "\ud800/x"]},
        {"files": ["a.txt", "."]},
    ],
)
def test_manifests_that_are_not_ours_decide_nothing(manifest: object, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "outside.txt").touch()
    (folder / "link").symlink_to(tmp_path)
    (folder / "circle").symlink_to("circle")
    (folder / "a.txt").touch()
    (folder / "merge_manifest.json").write_text(json.dumps(manifest))
    write_with_files(folder, [], {})
    assert (folder / "a.txt").exists()
    assert (tmp_path / "outside.txt").exists()
