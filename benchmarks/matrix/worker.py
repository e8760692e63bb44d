"""Makes inputs and times merges, in a process of its own.

It imports the installed package only, not its neighbours here, so another version can run it. Each line of
the input is a request in JSON, and is answered by a line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch

import merge_engine
from merge_engine.backends import Backend
from merge_engine.backends.cpu import CpuBackend

BASE_DEVIATION = 0.02
DELTA_DEVIATION = 0.0002
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPARE = 64
"""Elements of memory beyond a tensor's, for those that begin later."""
TINY = 64
"""Elements of a merge whose time is all planning."""
LONG = 1.0
"""Seconds of a merge that is not repeated."""


class Inputs:
    """A base and models of one kind of data. Models are drawn when they are asked for, and kept."""

    def __init__(self, data: str, zeros: int, elements: int):
        self._data, self._zeros = data, zeros
        count = elements + SPARE
        drawn = torch.empty(count).normal_(0, BASE_DEVIATION, generator=_generator(0))
        self.base = self._rounded(drawn, 0)
        self._models: list[torch.Tensor] = []

    def models(self, count: int) -> list[torch.Tensor]:
        """So many models."""
        while len(self._models) < count:
            self._models.append(self._model(len(self._models) + 1))
        return self._models[:count]

    def _model(self, number: int) -> torch.Tensor:
        generator = _generator(number)
        delta = torch.empty(len(self.base)).normal_(0, DELTA_DEVIATION, generator=generator)
        model = self._rounded(self.base.float() + delta, number)
        asked, found = self._zeros / 100, float((model == self.base).float().mean())
        if found < asked:
            unchanged = torch.rand(len(model), generator=generator) < (asked - found) / (1 - found)
            model[unchanged] = self.base[unchanged].to(model.dtype)
        return model

    def _rounded(self, values: torch.Tensor, number: int) -> torch.Tensor:
        """In the dtype of the base (number 0) or of a model."""
        if self._data == "fp32 of bf16":
            return values.bfloat16().float()
        if self._data == "bf16 and fp16":
            return values.half() if number % 2 else values.bfloat16()
        return values.to(DTYPES[self._data])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


inputs = lru_cache(maxsize=2)(Inputs)  # those of a cell, and those of the unit


def tensors(cell: Mapping[str, Any], elements: int) -> list[torch.Tensor]:
    """The base and the models of a cell as views of its inputs, with at most so many elements."""
    made = inputs(cell["data"], cell["zeros"], elements)
    count = elements - cell["cut"]
    length = min(cell["row"] or count, count)
    count -= count % length
    return [
        flat[cell["start"] : cell["start"] + count].view(-1, length)
        for flat in (made.base, *made.models(cell["models"]))
    ]


def merge(cell: Mapping[str, Any], given: list[torch.Tensor], backend: Backend) -> torch.Tensor:
    """Merge a cell's tensors."""
    base, *models = given
    options = dict(cell["options"])
    return merge_engine.merge_tensors(base, models, cell["method"], backend=backend, **options)


def seconds(cell: Mapping[str, Any], elements: int, backend: CpuBackend, repeats: int) -> float:
    """The best time of a merge, without the time of a tiny one with the same options."""
    given = tensors(cell, elements)
    tiny = [tensor.view(-1)[:TINY] for tensor in given]
    clock = time.process_time if backend.threads == 1 else time.perf_counter
    whole = _best(partial(merge, cell, given, backend), repeats, clock)
    return (whole - _best(partial(merge, cell, tiny, backend), repeats, clock)) * elements / given[0].numel()


def _best(work: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        work()
        best = min(best, clock() - start)
        if best > LONG:
            break
    return best


def main() -> None:
    """Answer requests. The argument is the number of threads."""
    threads = int(sys.argv[1])
    sys.stderr.write(f"# measures {merge_engine.__file__}\n")
    torch.set_num_threads(threads)
    backends: dict[str, CpuBackend] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["set"]
        answer: dict[str, Any]
        try:
            if name not in backends:
                backends[name] = CpuBackend(threads, name)
            taken = seconds(request["cell"], request["elements"], backends[name], request["repeats"])
            answer = {"seconds": taken}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
