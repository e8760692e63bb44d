"""Processors and memory within the limits of control groups, in real folders with the files of Linux."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_engine.storage.machine import available_memory, cores, processor

GIB = 1 << 30
UNLIMITED = str((1 << 63) - 4096)  # what version 1 says


class System:
    """A machine of 64 processors and 100 GiB of available memory, in a folder."""

    def __init__(self, folder: Path):
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        self.write(self.proc / "meminfo", f"MemTotal: {200 << 20} kB\nMemAvailable:   {100 << 20} kB\n")

    def write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def in_groups(self, lines: str) -> None:
        self.write(self.proc / "self" / "cgroup", lines)

    def group(self, path: str, files: Mapping[str, str]) -> None:
        for name, text in files.items():
            self.write(self.cgroups / path / name, text)

    @property
    def cores(self) -> int:
        return cores(self.proc, self.cgroups)

    @property
    def memory(self) -> int:
        return available_memory(self.proc, self.cgroups)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return System(tmp_path)


def test_without_groups_the_machine_counts(system: System) -> None:
    assert (system.cores, system.memory) == (64, 100 * GIB)
    system.in_groups("0::/user.slice\n")
    assert (system.cores, system.memory) == (64, 100 * GIB)
    system.group("user.slice", {"cpu.max": "max 100000\n", "memory.max": "max\n", "memory.current": "5\n"})
    assert (system.cores, system.memory) == (64, 100 * GIB)


def test_a_container_with_2_of_64_processors(system: System) -> None:
    """Version 2, with a namespace of its own: the container's group is the root."""
    system.in_groups("0::/\n")
    system.group(
        "", {"cpu.max": "200000 100000\n", "memory.max": f"{8 * GIB}\n", "memory.current": f"{3 * GIB}\n"}
    )
    assert (system.cores, system.memory) == (2, 5 * GIB)


@pytest.mark.parametrize(
    ("quota", "count"),
    (("50000 100000", 1), ("100001 100000", 2), ("1000 100000", 1), ("9900000 100000", 64)),
)
def test_a_part_of_a_processor_counts_as_one(system: System, quota: str, count: int) -> None:
    system.in_groups("0::/a\n")
    system.group("a", {"cpu.max": quota})
    assert system.cores == count


def test_the_smallest_of_nested_groups_counts(system: System) -> None:
    system.in_groups("0::/pods/pod/container\n")
    system.group(
        "pods", {"cpu.max": "400000 100000", "memory.max": f"{50 * GIB}", "memory.current": f"{10 * GIB}"}
    )
    system.group(
        "pods/pod", {"cpu.max": "300000 100000", "memory.max": f"{20 * GIB}", "memory.current": f"{9 * GIB}"}
    )
    system.group(
        "pods/pod/container", {"cpu.max": "max 100000", "memory.max": "max", "memory.current": f"{GIB}"}
    )
    system.group("other", {"cpu.max": "100000 100000", "memory.max": f"{GIB}", "memory.current": "0"})
    assert (system.cores, system.memory) == (3, 11 * GIB)
    system.group("pods/pod/container", {"cpu.max": "150000 100000", "memory.max": f"{2 * GIB}"})
    assert (system.cores, system.memory) == (2, GIB)


def test_where_a_group_is_throttled(system: System) -> None:
    system.in_groups("0::/a\n")
    system.group("a", {"memory.max": f"{8 * GIB}", "memory.high": f"{6 * GIB}", "memory.current": f"{GIB}"})
    assert system.memory == 5 * GIB


def test_version_1(system: System) -> None:
    """Trees of their own, each with names of its own for the group."""
    system.in_groups("5:memory:/docker/abc\n3:cpu,cpuacct:/docker/xyz\n1:name=systemd:/elsewhere\n0::/\n")
    system.group("cpu", {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"})
    system.group("cpu/docker/xyz", {"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"})
    system.group("memory", {"memory.limit_in_bytes": UNLIMITED, "memory.usage_in_bytes": f"{90 * GIB}"})
    system.group(
        "memory/docker/abc",
        {
            "memory.limit_in_bytes": f"{16 * GIB}\n",
            "memory.usage_in_bytes": f"{12 * GIB}\n",
            "memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GIB}\ntotal_active_file {3 * GIB}\n",
        },
    )
    assert (system.cores, system.memory) == (3, 9 * GIB)


def test_version_1_in_a_container_that_sees_only_its_own_group(system: System) -> None:
    system.in_groups("5:memory:/docker/abc\n3:cpuacct,cpu:/docker/abc\n")
    system.group("cpu", {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "25000"})
    system.group("memory", {"memory.limit_in_bytes": f"{4 * GIB}", "memory.usage_in_bytes": f"{GIB}"})
    assert (system.cores, system.memory) == (2, 3 * GIB)


def test_the_page_cache_counts_as_available(system: System) -> None:
    """Files that were read twice are active; the second merge of the same models must not find less room for them."""
    system.in_groups("0::/a\n")
    used = {"memory.max": f"{16 * GIB}", "memory.current": f"{15 * GIB}"}
    stat = f"anon {2 * GIB}\nfile {13 * GIB}\ninactive_file {4 * GIB}\nactive_file {9 * GIB}\nshmem 0\n"
    system.group("a", {**used, "memory.stat": stat})
    assert system.memory == 14 * GIB


def test_more_in_use_than_is_allowed(system: System) -> None:
    system.in_groups("0::/a\n")
    system.group("a", {"memory.max": "1000", "memory.current": "2000"})
    assert system.memory == 0


def test_a_machine_that_does_not_say(system: System) -> None:
    for text in ("", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: lots kB\n"):
        system.write(system.proc / "meminfo", text)
        with pytest.raises(OSError, match="does not say how much memory"):
            _ = system.memory
    (system.proc / "meminfo").unlink()
    with pytest.raises(OSError, match="does not say how much memory"):
        _ = system.memory


GARBAGE = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        (b"", b"max", b"-1", b"\xff\n", b"1 2 3", b"0 0", b"100000 0", b"9" * 5000, b"1.5 2", b"\0")
    ),
)
FILES = (
    *("cpu.max", "memory.max", "memory.high", "memory.current", "memory.stat"),
    *("cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(GARBAGE, st.sampled_from((b"0::/a", b"3:cpu,memory:/a", b"0::/../../a", b":::", b"0::a\0b"))),
    st.dictionaries(st.sampled_from(FILES), GARBAGE),
)
def test_whatever_the_files_hold(system: System, lines: bytes, files: dict[str, bytes]) -> None:
    for folder in ("", "a", "cpu/a", "memory/a"):
        (system.cgroups / folder).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (system.cgroups / folder / name).write_bytes(files.get(name, b""))
    system.in_groups("")
    (system.proc / "self" / "cgroup").write_bytes(lines)
    assert 1 <= system.cores <= 64
    assert 0 <= system.memory <= 100 * GIB


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**8), st.integers(1000, 10**6), st.integers(0, 1 << 40), st.integers(0, 1 << 40)
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_group_on_the_way_up_limits(system: System, groups: list[tuple[int, int, int, int]]) -> None:
    path = ""
    for quota, period, limit, used in groups:
        path += "/g"
        system.group(
            path.lstrip("/"),
            {"cpu.max": f"{quota} {period}", "memory.max": f"{limit}", "memory.current": f"{used}"},
        )
    system.in_groups(f"0::{path}")
    assert system.cores == max(1, min(64, *(-(-quota // period) for quota, period, _, _ in groups)))
    assert system.memory == max(0, min(100 * GIB, *(limit - used for _, _, limit, used in groups)))


def test_this_machine() -> None:
    assert 1 <= cores() <= len(os.sched_getaffinity(0))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= total
    assert processor()
