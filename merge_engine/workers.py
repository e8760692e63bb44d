"""Threads that do tasks in the order in which they come.

The executors of ``concurrent.futures`` refuse tasks as soon as the main thread has ended, although a merge in another
thread goes on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeAlias, TypeVar

from merge_engine.errors import BackendError

P = ParamSpec("P")
T = TypeVar("T")

_Task: TypeAlias = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Workers:
    """``count`` threads with this ``name``. ``submit`` may be called before ``start``, from any thread."""

    def __init__(self, count: int, name: str):
        self._names = [f"{name}_{number}" for number in range(count)]
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads. Raises ``BackendError`` if the system refuses one."""
        for name in self._names:
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            start(thread)
            self._threads.append(thread)

    def submit(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> Future[T]:
        """Let a thread call ``function``, once those submitted before have begun."""
        future: Future[T] = Future()
        self._tasks.put((future, function, arguments, keywords))
        return future

    def finish(self) -> None:
        """Wait until all that was submitted is done, and end the threads."""
        for _ in self._threads:
            self._tasks.put(None)
        while self._threads:
            self._threads[-1].join()
            self._threads.pop()

    def close(self) -> None:
        """Wait for what has begun, and end the threads. What has not begun is cancelled."""
        while not self._tasks.empty():
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:  # a thread was faster
                break
            if task is not None:
                task[0].cancel()
        self.finish()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            _do(*task)
            del task  # while the thread waits, it keeps no memory of a task alive


def start(thread: threading.Thread) -> None:
    """Start a thread. Raises ``BackendError`` if the system refuses it."""
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        raise BackendError(
            f"the system refuses another thread, number {threading.active_count() + 1} of this process; raise its "
            "limit of threads (ulimit -u) or of memory (ulimit -v)"
        ) from error


def _do(
    future: Future[Any],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*arguments, **keywords)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
