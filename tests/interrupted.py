"""Calls of the system that are counted, that fail, or that kill the process: the accidents of a merge's files."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_BY_PATH = ("rename", "replace", "unlink", "mkdir", "rmdir", "open")
_BY_DESCRIPTOR = ("pwrite", "ftruncate", "posix_fallocate", "fsync")


@contextlib.contextmanager
def accident(folder: Path, act: Callable[[int], None]) -> Iterator[None]:
    """Call ``act`` with a number, from 1 on, before each call of the system that may change ``folder``.

    No sync waits for a disk: kills lose nothing that was written.
    """
    numbers, lock = itertools.count(1), threading.Lock()

    def counted(call: Callable[..., Any], concerns: Callable[..., bool]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            if concerns(*arguments):
                with lock:
                    number = next(numbers)
                act(number)
            return call(*arguments, **options)

        return counting

    def in_folder(*arguments: Any) -> bool:
        return isinstance(arguments[0], (str, os.PathLike)) and Path(arguments[0]).is_relative_to(folder)

    real = {(os, name): getattr(os, name) for name in (*_BY_PATH, *_BY_DESCRIPTOR)} | {(io, "open"): io.open}
    try:
        for (module, name), call in real.items():
            concerns = (lambda *_: True) if name in _BY_DESCRIPTOR else in_folder
            setattr(module, name, counted((lambda _: None) if name == "fsync" else call, concerns))
        yield
    finally:
        for (module, name), call in real.items():
            setattr(module, name, call)


def killed(folder: Path, last: int, work: Callable[[], None]) -> bool:
    """Do the work in another process, which dies by SIGKILL before its call with the number ``last``.

    Returns whether it died; it ended well otherwise.
    """

    def die(number: int) -> None:
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            with accident(folder, die):
                work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def failing(first: int, last: int, number: int = errno.EIO) -> Callable[[int], None]:
    """For ``accident``: the calls from ``first`` to ``last`` fail."""

    def fail(call: int) -> None:
        if first <= call <= last:
            raise OSError(number, os.strerror(number))

    return fail
