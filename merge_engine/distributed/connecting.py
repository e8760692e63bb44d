"""A connection to a Ray cluster: a wrong address is found in seconds, and Ray says nothing of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from types import FrameType
from typing import Any

from merge_engine.distributed.greeting import demand_answer
from merge_engine.distributed.options import AUTO, LOCAL, RayOptions
from merge_engine.errors import ClusterError, OptionError
from merge_engine.storage import cores

_STORE = 100 << 20
"""Bytes of Ray's object store in a cluster of our own: jobs, counts and results are small."""

_SAID = 300
"""Characters of an error of Ray that are shown: some are pages long, and no single line of others says it all."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Messages of Ray about nodes and workers that end, with pages of its logs: the notes of the result name them.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Raylet is terminated|has been marked dead|A worker died or was killed|killed due to",
}
"""Read when Ray is first imported."""


def demand_ray() -> None:
    """Raise ``ClusterError`` if Ray is not installed."""
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # a folder of this name is no package
        raise ClusterError("ray is not installed: pip install 'merge_engine[ray]', on every node too")


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect this process to a cluster, or to one of its own (``local``), until the context is left.

    A program that is connected already stays so. Raises ``ClusterError`` if there is no cluster, or if it cannot be
    used.
    """
    demand_ray()
    own = False
    try:
        with _quiet():
            import ray

            own = not ray.is_initialized()
            if own:
                _connect(ray, address)
        yield
    finally:
        if own:
            with _quiet():
                ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    own: dict[str, Any] = {}
    address = _running() if address == AUTO else address
    if address == LOCAL:
        own = {"num_cpus": cores(), "object_store_memory": _STORE, "include_dashboard": False}
    elif address != AUTO:
        demand_answer(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **own)
    except ConnectionError:
        if address == AUTO:
            raise ClusterError(
                "no Ray cluster runs on this machine; start one with `ray start --head`, or choose local or HOST:PORT"
            ) from None
        raise ClusterError(
            f"the Ray cluster at {address} cannot be used from here: this machine is no part of it; run "
            f"`ray start --address {address}` first"
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        said = shorten(str(error), _SAID) or type(error).__name__
        raise ClusterError(f"the Ray cluster at {address} cannot be used: {said}") from error


def _running() -> str:
    """The cluster that ``auto`` means: what Ray's variable says, or else what Ray noted when it started one here.

    Raises ``OptionError`` if the variable holds no address.
    """
    if given := os.environ.get("RAY_ADDRESS"):
        try:
            return RayOptions(given).address
        except OptionError as error:
            raise OptionError(
                [f"RAY_ADDRESS: {line.removeprefix('ray: ')}" for line in error.problems]
            ) from None
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        return noted.read_text().strip() or AUTO
    except OSError:
        return AUTO


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from printing, and from taking over signals."""
    missing = {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        with warnings.catch_warnings(), heard():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of what is done inside, or for a second one.

    Ray that is interrupted while it starts crashes at the end of the process, and imports may swallow the error.
    Handlers that are installed inside go again. In other threads than the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers: dict[int, Any] = {number: each for number, each in found.items() if callable(each)}
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            handlers[number](number, frame)

    try:
        for number in handlers:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in found.items():
            if handler is not None:  # it is Python's
                signal.signal(number, handler)
        for number in waiting[:1]:
            handlers[number](number, None)
