"""Threads of a run: in order, cancelled, refused by the system, interrupted while they start, after the main thread."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import SaveCheckpoint

import merge_engine as me
from merge_engine.workers import Workers

OURS = ("feed", "read", "write", "digest", "fsync")


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(OURS)]


def assert_all_end() -> None:
    until = time.monotonic() + 5
    while ours() and time.monotonic() < until:
        time.sleep(0.001)
    assert not ours()


def run_script(script: str) -> str:
    """What a Python process prints that ends well."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, Any]:
    for name in "ab":
        save_checkpoint(name, {f"w{i}": torch.randn(300, 100) for i in range(9)})
    folder = save_checkpoint("c", {})
    return {
        "merge_method": "linear",
        "models": [{"model": str(folder.with_name(name)), "parameters": {"weight": 1}} for name in "ab"],
    }


def test_tasks_are_begun_in_order_and_their_results_come_back() -> None:
    workers, begun = Workers(1, "test"), []
    futures = [workers.submit(lambda n: begun.append(n) or n * n, n) for n in range(50)]
    workers.start()
    workers.finish()
    assert begun == list(range(50)) and [future.result() for future in futures] == [n * n for n in range(50)]
    workers.close()


def test_what_has_begun_is_done_and_the_rest_is_cancelled() -> None:
    workers, begun, go = Workers(2, "test"), threading.Semaphore(0), threading.Event()

    def wait() -> str:
        begun.release()
        go.wait()
        return "done"

    workers.start()
    futures = [workers.submit(wait) for _ in range(10)]
    for _ in range(2):
        begun.acquire()
    threading.Timer(0.05, go.set).start()
    workers.close()
    assert [future.result() for future in futures[:2]] == ["done"] * 2
    assert all(future.cancelled() for future in futures[2:])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test")]


def test_errors_go_to_who_waits() -> None:
    workers = Workers(3, "test")
    workers.start()
    future = workers.submit(int, "x")
    with pytest.raises(ValueError, match="'x'"):
        future.result()
    workers.finish()


@pytest.fixture
def few_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets the system refuse every thread after the first so many."""
    original = threading.Thread.start

    def refuse_after(allowed: int) -> None:
        left = iter(range(allowed))

        def begin(thread: threading.Thread) -> None:
            if next(left, None) is None:
                raise RuntimeError("can't start new thread")
            original(thread)

        monkeypatch.setattr(threading.Thread, "start", begin)

    yield refuse_after
    monkeypatch.undo()


@pytest.mark.parametrize("allowed", range(7))
def test_a_system_that_refuses_threads(
    recipe: dict[str, Any], few_threads: Any, allowed: int, tmp_path: Path
) -> None:
    few_threads(allowed)
    with pytest.raises(me.BackendError, match=r"refuses another thread.*\(ulimit -u\)"):
        me.run(recipe, tmp_path / "out", backend="cpu", threads=1)
    assert not (tmp_path / "out").exists() and not ours()


@pytest.mark.parametrize("memory", ("1MB", "400MB"))
def test_interrupted_at_any_call_in_the_pipeline(recipe: dict[str, Any], memory: str, tmp_path: Path) -> None:
    """Python looks for signals where a function begins."""
    files = ("pipeline.py", "workers.py", "mover.py", "ring.py")
    for nth in itertools.count(1):
        calls = itertools.count(1)

        def trace(frame: FrameType, *_: object, nth: int = nth, calls: Any = calls) -> None:
            if frame.f_code.co_filename.endswith(files) and next(calls) == nth:
                sys.settrace(None)
                raise KeyboardInterrupt

        sys.settrace(trace)
        try:
            me.run(recipe, tmp_path / "out", backend="cpu", memory=memory, overwrite=True)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "model.safetensors").exists()
        finally:
            sys.settrace(None)
        assert_all_end()
    assert nth > 20


def test_interrupted_while_a_thread_starts(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The interrupt comes before the thread runs: for the main thread it is neither alive nor ended."""
    starts: list[threading.Thread] = []

    def begin(thread: threading.Thread) -> None:
        starts.append(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", begin)
        me.run(recipe, tmp_path / "out", backend="cpu")
    for thread in starts:
        thread.start()
    assert_all_end()
    assert not (tmp_path / "out").exists()


def test_interrupts_by_the_system(recipe: dict[str, Any], tmp_path: Path) -> None:
    """At random moments of the first 20 ms: every merge ends, and its threads and open files go.

    Python leaves a few places where nothing can be done: an interrupt may come when ``os.open`` has returned and its
    result is not yet kept, and the locks in ``Thread.start`` are not safe from interrupts.
    """
    script = f"""
import os, random, signal, threading, time
import merge_engine as me

def signal_here(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, signal_here)
me.run({recipe!r}, {str(tmp_path / "first")!r}, backend="cpu")
files = len(os.listdir("/proc/self/fd"))
interrupted = 0
for _ in range(150):
    before = set(threading.enumerate())
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 0.02))
        me.run({recipe!r}, {str(tmp_path / "out")!r}, backend="cpu", memory="1MB", overwrite=True)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    for thread in set(threading.enumerate()) - before:
        if thread.is_alive():
            thread.join(2)
left = sum(thread.is_alive() for thread in threading.enumerate()) - 1
print(interrupted, left, len(os.listdir("/proc/self/fd")) - files, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    interrupted, left, files = map(int, done.stdout.split())
    assert interrupted > 50 and left <= 2 and files <= 10 + 5 * left, (done.stdout, done.stderr)


def test_a_merge_in_a_thread_that_outlives_the_main_thread(recipe: dict[str, Any], tmp_path: Path) -> None:
    script = f"""
import threading, time
import merge_engine as me
from concurrent.futures import ThreadPoolExecutor  # it refuses tasks once the main thread has ended

def merge():
    threading.main_thread().join()
    time.sleep(0.1)
    me.run({recipe!r}, {str(tmp_path / "out")!r}, memory="1MB", shard_size="300KB", backend="cpu")

threading.Thread(target=merge).start()
"""
    run_script(script)
    me.run(recipe, tmp_path / "expected", shard_size="300KB")
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("megabytes", (150, 200, 300, 400, 600, 1000))
def test_little_address_space(recipe: dict[str, Any], megabytes: int, tmp_path: Path) -> None:
    """The merge is done, or ends with one error and no output."""
    script = f"""
import merge_engine.running, merge_engine.engine.publishing, merge_engine.backends.cpu, resource
import merge_engine as me
recipe = me.load_recipe({recipe!r})  # without memory, pydantic's own code fails in its own ways
space = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (space + {megabytes - 150} * 10**6, -1))
try:
    me.run(recipe, {str(tmp_path / "out")!r}, backend="cpu", shard_size="300KB")
except me.MergeError as error:
    print(error)
"""
    said = run_script(script)
    assert (tmp_path / "out").exists() == (not said) and said.count("\n") <= 1
    assert megabytes < 1000 or not said
