"""The limits of a machine: measured and kept; a damaged file is ignored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_engine.bench import probe
from merge_engine.bench.limits import DiskLimits, Limits, limits_file, load_limits, save_limits
from merge_engine.storage import cached_share, mount_of

LIMITS = Limits(memory=2e10, disks={"ext4 /dev/x at /": DiskLimits(1e9, 2e9, 1e10, 2e9)}, link=3e8)


def test_what_is_saved_is_loaded() -> None:
    assert load_limits() == Limits()
    save_limits(LIMITS)
    assert load_limits() == LIMITS
    assert [file.name for file in limits_file().parent.iterdir()] == [limits_file().name]


@pytest.mark.parametrize(
    "content",
    (
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"m": 3}',
        b'{"m": {"memory": "fast"}}',
        b'{"m": {"memory": -1}}',
        b'{"m": {"memory": NaN}}',
        b'{"m": {"disks": {"d": {"read": 1}}}}',
    ),
)
def test_a_file_that_is_damaged_counts_as_none(content: bytes) -> None:
    limits_file().parent.mkdir(parents=True)
    limits_file().write_bytes(content)
    assert load_limits() == Limits()
    save_limits(LIMITS)
    assert load_limits() == LIMITS


def test_machines_that_share_a_home_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    save_limits(LIMITS)
    with monkeypatch.context() as other:
        other.setattr("platform.node", lambda: "another")
        assert load_limits() == Limits()
        save_limits(Limits(memory=1e9))
    assert load_limits() == LIMITS


def test_a_cache_that_cannot_be_written() -> None:
    limits_file().parent.parent.mkdir(parents=True, exist_ok=True)
    limits_file().parent.write_text("in the way")
    assert load_limits() == Limits()
    with pytest.raises(OSError):
        save_limits(LIMITS)


def test_disks_work_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = DiskLimits(4e9, 5e9, 8e9, 1e9), DiskLimits(1e9, 2e9, 8e9, 1e9)
    monkeypatch.setattr(Limits, "disk", lambda _, path: {"fast": fast, "slow": slow}.get(path.name))
    limits, a, b, c = Limits(), *(tmp_path / name for name in ("fast", "slow", "unknown"))
    assert limits.reading({a: 10**9}, "read") == 4e9
    assert limits.reading({a: 10**9, b: 10**9}, "read") == 2e9  # the slow one takes a second
    assert limits.reading({a: 10**9, b: 10**9}, "cached") == 16e9
    assert limits.reading({a: 10**9, c: 10**9}, "read") is None
    assert limits.reading({}, "read") is None


def test_measuring_leaves_only_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "READ_PIECE", 1 << 20)
    monkeypatch.setattr(probe, "_FIRST", 1 << 20)
    monkeypatch.setattr(probe, "_MOST", 16 << 20)
    monkeypatch.setattr(probe, "_COPIED", 1 << 20)
    monkeypatch.setattr(probe, "_REPORTING_SECONDS", 0)
    limits = probe.measure_limits(tmp_path)
    assert limits.disk(tmp_path / "not" / "there") == limits.disks[str(mount_of(tmp_path))]
    assert load_limits() == limits
    assert not list(tmp_path.iterdir())


def test_the_share_that_is_in_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3_000_000))
    assert cached_share(file) == 1
    if mount_of(file).kind not in ("tmpfs", "overlay"):  # where the page cache is all there is
        probe.drop_from_cache(file)
        assert cached_share(file) == 0
        file.read_bytes()
        assert cached_share(file) == 1
    empty = tmp_path / "empty"
    empty.touch()
    assert cached_share(empty) == 1
