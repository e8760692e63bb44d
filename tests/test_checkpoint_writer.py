"""Other libraries read our checkpoints, and each is complete or not there."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from written import STATE, State, assert_same, load_folder, names_in, plan, raw, write_all, write_checkpoint

from merge_engine.checkpoint import (
    CheckpointWriter,
    OutputTensor,
    ShardWriter,
    open_checkpoint,
    plan_shards,
)
from merge_engine.checkpoint import shard_writer as writing
from merge_engine.dtypes import BY_CODE
from merge_engine.errors import OutputError
from merge_engine.operands import Stored
from merge_engine.storage import PAGE, Mount, OpenFiles

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


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


def cut(state: State, random: Random) -> list[tuple[str, int, memoryview]]:
    """Up to five pieces of each tensor: its name, the offset, the bytes."""
    pieces = []
    for name, tensor in state.items():
        data = raw(tensor)
        cuts = sorted({0, len(data), *(random.randint(0, len(data)) for _ in range(4))})
        pieces += [(name, a, memoryview(data)[a:b]) for a, b in itertools.pairwise(cuts)]
    return pieces


@settings(max_examples=60, deadline=None)
@given(states(), st.sampled_from([3000, 20_000, 10**9]), st.integers(0, 2**32))
def test_any_order_any_pieces_any_thread(state: State, limit: int, seed: int) -> None:
    random = Random(seed)
    pieces = cut(state, random)
    random.shuffle(pieces)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "out"
        with CheckpointWriter(folder, plan(state, limit)) as writer, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda piece: writer.write(*piece), pieces))
            writer.finish()
        assert_same(load_folder(folder), state)
        checkpoint = open_checkpoint(folder)
        with OpenFiles() as files:
            for name, tensor in state.items():
                operand = checkpoint.tensors[name]
                assert isinstance(operand, Stored)
                data = bytearray(operand.stored_bytes)
                operand.read_into(memoryview(data), 0, files)
                assert bytes(data) == raw(tensor)
                assert len(data) % PAGE or operand.position % PAGE == 0


@settings(max_examples=40, deadline=None)
@given(states(), st.sampled_from([3000, 20_000, 10**9]), st.integers(0, 2**32))
def test_batches_of_any_pieces(state: State, limit: int, seed: int) -> None:
    random = Random(seed)
    pieces = cut(state, random)
    if random.random() < 0.5:
        random.shuffle(pieces)
    edges = sorted({0, len(pieces), *(random.randint(0, len(pieces)) for _ in range(3))})
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "out"
        with CheckpointWriter(folder, plan(state, limit)) as writer, ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda span: writer.write_batch(pieces[slice(*span)]), itertools.pairwise(edges)))
            writer.finish()
        assert_same(load_folder(folder), state)


def test_a_batch_of_small_neighbours_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {f"t{i:03}": 100 for i in range(300)} | {"large": PAGE + 1, "last": 5}
    tensors = [OutputTensor(name, BY_CODE["U8"], (size,)) for name, size in sizes.items()]
    data = {name: os.urandom(size) for name, size in sizes.items()}
    written: list[int] = []
    pwrite = os.pwrite

    def noting(descriptor: int, piece: memoryview, position: int) -> int:
        written.append(len(piece))
        return pwrite(descriptor, piece, position)

    with CheckpointWriter(tmp_path, plan_shards(tensors, 10**9)) as writer:
        monkeypatch.setattr(os, "pwrite", noting)
        names = [name for name in sizes if name != "t100"]
        writer.write_batch((name, 0, memoryview(data[name])) for name in reversed(names))
        assert written == [100 * 100, 199 * 100, PAGE + 1, 5]
        writer.write("t100", 0, memoryview(data["t100"]))
        writer.finish()
    assert {name: bytes(t.tolist()) for name, t in load_file(tmp_path / "model.safetensors").items()} == data


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 40)), max_size=40),
)
def test_no_byte_is_written_twice_and_what_is_missing_is_named(
    sizes: list[int], ranges: list[tuple[int, int, int]]
) -> None:
    """As a table of all bytes says, which is the oracle."""
    names = [f"t{i}" for i in range(len(sizes))]
    tensors = [OutputTensor(name, BY_CODE["U8"], (size,)) for name, size in zip(names, sizes, strict=True)]
    (layout,) = plan_shards(tensors, 10**9)
    table = {name: bytearray(size) for name, size in zip(names, sizes, strict=True)}
    with tempfile.TemporaryDirectory() as top:
        shard = ShardWriter(Path(top) / "part", layout)
        for number, (tensor, one, other) in enumerate(ranges):
            name = names[tensor % len(names)]
            size = len(table[name])
            start, end = sorted((one % (size + 1), other % (size + 1)))
            data = memoryview(bytes([number + 1]) * (end - start))
            if any(table[name][start:end]):
                with pytest.raises(OutputError, match=f"tensor '{name}' was written twice"):
                    shard.write(name, start, data)
            else:
                shard.write(name, start, data)
                table[name][start:end] = data
            assert set(shard.unwritten()) == {name for name, seen in table.items() if 0 in seen}
        if shard.unwritten():
            with pytest.raises(OutputError, match="not completely written: t"):
                shard.finish()
        else:
            shard.finish()
        for name in (name for name, seen in table.items() if seen):
            with pytest.raises(OutputError, match=r"written to after it was closed|was written twice"):
                shard.write(name, 0, memoryview(bytes(len(table[name]))))
        expected = layout.header + b"".join(bytes(table[name]) for name in layout.tensors)
        assert (Path(top) / "part").read_bytes() == expected


@settings(max_examples=40, deadline=None)
@given(states())
def test_files_of_the_library_are_read(state: State) -> None:
    with tempfile.TemporaryDirectory() as top:
        path = Path(top) / "model.safetensors"
        save_file(state, path)
        checkpoint = open_checkpoint(path)
        assert set(checkpoint.tensors) == set(state)
        with OpenFiles() as files:
            for name, tensor in state.items():
                operand = checkpoint.tensors[name]
                assert operand.shape == tuple(tensor.shape)
                data = bytearray(operand.stored_bytes)
                operand.read_into(memoryview(data), 0, files)
                assert bytes(data) == raw(tensor)


def test_shards_index_and_side_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with CheckpointWriter(folder, plan(STATE)) as writer:
        writer.add_file("config.json", b"{}")
        writer.add_file("1_Pooling/config.json", b"[]")
        write_all(writer, STATE)
        assert all(".part" in name for name in names_in(folder))
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
    with CheckpointWriter(tmp_path, plan({})) as writer:
        writer.flush()
        writer.finish()
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


def test_no_write_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one into the same shard nor one into another."""
    go_on, stuck = threading.Event(), threading.Barrier(3)
    to_stick, pwrite = {PAGE, 6}, os.pwrite

    def pwrite_or_stick(descriptor: int, data: memoryview, position: int) -> int:
        if len(data) in to_stick:
            to_stick.remove(len(data))  # a direct write of memory that is not aligned is tried again
            stuck.wait(10)
            assert go_on.wait(10)
        return pwrite(descriptor, data, position)

    big, odd = (memoryview(raw(STATE[name])) for name in ("big", "odd"))
    with CheckpointWriter(tmp_path, plan(STATE)) as writer, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(os, "pwrite", pwrite_or_stick)
        waiting = [
            pool.submit(writer.write, "big", 0, big[:PAGE]),
            pool.submit(writer.write, "odd", 0, odd[:6]),
        ]
        stuck.wait(10)
        writer.write("big", PAGE, big[PAGE:])
        writer.write("odd", 6, odd[6:])
        for name in ("page", "scalar"):
            writer.write(name, 0, memoryview(raw(STATE[name])))
        go_on.set()
        for write in waiting:
            write.result(10)
        writer.finish()
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
    CheckpointWriter(folder, plan(STATE), overwrite=True).abort()
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


def test_abort_waits_for_a_sync_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        started.set()
        assert go_on.wait(10)
        fsync(descriptor)  # a closed descriptor is an error

    writer = CheckpointWriter(tmp_path, plan(STATE))
    monkeypatch.setattr(os, "fsync", slow_fsync)
    writer.write("big", 0, memoryview(raw(STATE["big"])))
    assert started.wait(10)
    with ThreadPoolExecutor(1) as pool:
        abort = pool.submit(writer.abort)
        assert not wait([abort], 0.1).done
        go_on.set()
        abort.result(10)
    assert names_in(tmp_path) == []
    assert not [path for path in open_paths() if path.parent == tmp_path]


def test_a_write_that_failed_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointWriter(tmp_path, plan(STATE)) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OutputError, match="No space left"):
                writer.write("odd", 2, memoryview(raw(STATE["odd"]))[2:])
        write_all(writer, STATE)
        writer.finish()
    assert_same(load_folder(tmp_path), STATE)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_full_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "mount_of", lambda _: Mount("", "/", "ext4"))
    monkeypatch.setattr(os, call, full)
    message = r"model-00001-of-00002.safetensors.part: .*No space left on device \(free space: [\d.]+ GB\)"
    with pytest.raises(OutputError, match=message):
        write_checkpoint(tmp_path / "out", STATE)
    assert names_in(tmp_path) == []


def test_truly_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(OutputError, match="No space left on device"):
            write_checkpoint(tmp_path / "out", STATE)
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
    with pytest.raises(OutputError, match="is not empty; choose another folder or pass --overwrite"):
        CheckpointWriter(tmp_path, plan(STATE))
    CheckpointWriter(tmp_path, plan(STATE), overwrite=True).abort()
    assert_same(load_folder(tmp_path), STATE)


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


def open_paths() -> list[Path]:
    """The open descriptors of this process, without the one that lists the folder, which is closed by then."""
    return [link.readlink() for link in list(Path("/proc/self/fd").iterdir()) if link.is_symlink()]


def test_failing_start_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(open_paths())
    monkeypatch.setattr(writing, "mount_of", lambda _: Mount("", "/", "ext4"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left"):
        CheckpointWriter(tmp_path / "out", plan(STATE))
    assert len(open_paths()) == before
    assert names_in(tmp_path) == []


def test_a_shard_is_open_from_its_first_write_until_it_is_complete(tmp_path: Path) -> None:
    def parts() -> list[str]:
        return sorted(
            path.name for path in open_paths() if path.parent == tmp_path and path.suffix == ".part"
        )

    names = [f"model-0000{i}-of-00002.safetensors.part" for i in (1, 2)]
    with CheckpointWriter(tmp_path, plan(STATE)) as writer:
        assert parts() == []
        writer.write("odd", 0, memoryview(raw(STATE["odd"])))
        assert len(parts()) == 1
        big = memoryview(raw(STATE["big"]))
        writer.write("big", 0, big[:PAGE])
        assert {*parts()} == {*names}
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
