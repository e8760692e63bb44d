"""Merging again and again from memory: what does a second merge cost?

    python -m benchmarks.session [--size 1.1b] [--models 2] [--dtypes bfloat16] [--rounds 5]

All cases take turns; the table has medians. ``first`` and ``again`` are merges into tensors that are there, at two
densities (slerp: at two values of t): for ``first`` the session has nothing kept. ``copy`` is torch's ``copy_`` of as
many bytes as a merge reads and writes in memory. ``plan`` is ``Session.merge`` alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

import merge_engine as me
from merge_engine.bench.checkpoints import Family, cache_folder

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ties": ({"density": 0.3}, {"density": 0.4}),
    "ties, slack": ({"density": 0.3, "sign_slack": 1}, {"density": 0.4, "trim_slack": 0.1, "sign_slack": 2}),
    "ties, whole model": ({"density": 0.3, "trim_scope": "model"}, {"density": 0.4, "trim_scope": "model"}),
    "dare_ties": ({"density": 0.3}, {"density": 0.4}),
    "della": ({"density": 0.3}, {"density": 0.4}),
    "model_stock": ({}, {}),
    "slerp": ({"t": 0.3}, {"t": 0.4}),
    "linear": ({}, {"weight": 0.5}),
}
T = TypeVar("T")

COLUMNS = ("method", "models", "dtype", "plan", "first", "again", "again / first", "copy", "again / copy")


def main() -> None:
    """Print a row for each method, number of models and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--models", default="2", help="such as 2,5")
    parser.add_argument("--dtypes", default="bfloat16", help="such as bfloat16,float16,float32")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(" | ".join(COLUMNS))
    for models in map(int, options.models.split(",")):
        base, tuned = Family(cache_folder(), options.size).make(models)
        for dtype in options.dtypes.split(","):
            with session_of([base, *tuned], dtype, options.device) as session:
                measure(session, models, dtype, options.methods.split(";"), options.rounds)


def session_of(paths: list[Any], dtype: str, device: str) -> me.Session:
    """The models in memory. They are stored in bfloat16; in another dtype they are state dicts."""
    start = time.perf_counter()
    session = me.load(paths[0], paths[1:], device=device)
    print(f"# loaded in {time.perf_counter() - start:.2f} s: {dict(session.memory)}", flush=True)
    if dtype == "bfloat16":
        return session
    with session:
        states = []
        for path in paths:
            recipe = {"merge_method": "passthrough", "models": [{"model": str(path)}], "out_dtype": dtype}
            states.append(session.merge(recipe).tensors())
    return me.load(states[0], states[1:])


def measure(session: me.Session, models: int, dtype: str, methods: list[str], rounds: int) -> None:
    """Print the rows of one session."""
    target = session.merge("linear").tensors()
    size = sum(tensor.nbytes for tensor in target.values())
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name in methods:
            session.forget()
            plan, first = timed(partial(merge_of, session, name, 0))
            once, _ = timed(partial(first.into, target))
            again = merge_of(session, name, 1)
            twice, _ = timed(partial(again.into, target))
            read = len(again.plan.models) + len(again.plan.bases)
            taken[name].append((plan, once, twice, copying(target, (read + 1) * size)))
    for name, rows in taken.items():
        plan, once, twice, copy = (statistics.median(column) for column in zip(*rows, strict=True))
        print(
            f"{name} | {models} | {dtype} | {1e3 * plan:.1f} ms | {once:.3f} s | {twice:.3f} s | "
            f"{twice / once:.2f} | {copy:.3f} s | {twice / copy:.2f}",
            flush=True,
        )


def merge_of(session: me.Session, name: str, which: int) -> me.Merge:
    """One of the two merges of a method. SLERP takes the base and one model."""
    method, changes = name.partition(",")[0], METHODS[name][which]
    if method != "slerp":
        return session.merge(method, **changes)
    known = session.merge("linear").recipe
    assert known.models is not None
    recipe = {
        "merge_method": method,
        "base_model": known.base_model,
        "models": [{"model": known.models[0].model}],
    }
    return session.merge(recipe, **changes)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that it takes, the work of a GPU included, and what comes out."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def copying(target: dict[str, torch.Tensor], moved: int) -> float:
    """Seconds of copies in memory that read and write so many bytes together."""
    tensors = list(target.values())
    largest = max(tensors, key=torch.Tensor.numel)
    room = torch.empty_like(largest).view(-1)
    room.fill_(0)

    def copy() -> None:
        done = 0
        while 2 * done < moved:
            for tensor in tensors:
                room[: tensor.numel()].copy_(tensor.view(-1))
                done += tensor.nbytes
                if 2 * done >= moved:
                    return

    return timed(copy)[0]


if __name__ == "__main__":
    main()
