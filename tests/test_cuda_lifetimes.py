"""Streams, events and memory of a CUDA device exist as long as something needs them, in any order of deletion.

A fault there ends the process, so each case has a process of its own. The emulated device refuses the use of
destroyed objects (tests/emulated_cuda). ``MERGE_ENGINE_TEST_BACKENDS=cuda`` runs the cases that can be run on a
real device there.
"""

from __future__ import annotations

import gc
import itertools
import json
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import quantised_models
from emulated_cuda.backend import EmulatedCudaBackend, held, load

import merge_engine as me
from merge_engine.backends import Backend, create_backend
from merge_engine.backends.operations import Chunk, Combine
from merge_engine.dtypes import F32
from merge_engine.engine.carrying import carry_out
from merge_engine.engine.runs import Run
from merge_engine.engine.scheduling import open_access, schedule_for
from merge_engine.engine.sinks import MemorySink, Target

NAMES = [
    name
    for name in os.environ.get("MERGE_ENGINE_TEST_BACKENDS", "emulated_cuda").split(",")
    if name.endswith("cuda")
]
SHAPES = {"embed.weight": (120, 64), "layers.0.norm": (64,), "layers.1.w": (65, 33)}
CASES: dict[str, Callable[..., None]] = {}
KEPT: list[Any] = []  # until the interpreter exits


def case(function: Callable[..., None]) -> Callable[..., None]:
    CASES[function.__name__] = function
    return function


def in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    """Call a case in a new process, which must end well and say nothing."""
    command = [sys.executable, __file__, function.__name__, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def make(name: str) -> Backend:
    return EmulatedCudaBackend() if name == "emulated_cuda" else create_backend(name)


@pytest.fixture(
    params=({"density": 0.3, "trim_slack": 0.1}, {"density": 0.2, "trim_scope": "model"}), ids=str
)
def recipe(request: pytest.FixtureRequest, save_checkpoint) -> dict[str, Any]:
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for name, shape in SHAPES.items():
        base, tuned = quantised_models(torch.Size(shape).numel(), 2, torch.bfloat16, seed=len(name))
        for state, values in zip(states, (base, *tuned), strict=True):
            state[name] = values.view(shape)
    base, a, b = (str(save_checkpoint(name, state)) for name, state in zip("bxy", states, strict=True))
    parameters = {"weight": 0.5, **request.param}
    return {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": a}, {"model": b}],
        "parameters": parameters,
    }


def digest(output: str | Path) -> str:
    return json.loads((Path(output) / "merge_manifest.json").read_text())["digest"]


def done(recipe: dict[str, Any], backend: Backend) -> Run:
    """A run that was carried out, with what it measured on the device."""
    plan = me.plan(recipe)
    with open_access(plan, backend) as access:
        return carry_out(
            schedule_for(plan, access, backend, 200_000), backend, access, [Target(MemorySink(plan))]
        )


@case
def backend_before_plan(name: str, recipe: dict[str, Any], output: str, expected: str) -> None:
    kept: list[Any] = []
    for i in range(2):
        me.run(recipe, f"{output}/{i}", backend=make(name), memory="200KB", on_schedule=kept.append)
        assert digest(f"{output}/{i}") == expected
        kept.append(done(recipe, make(name)))
    gc.collect()
    kept.clear()


@case
def all_at_exit(name: str, recipe: dict[str, Any], output: str, expected: str) -> None:
    backend = make(name)
    result = me.run(recipe, output, backend=backend, on_schedule=KEPT.append)
    assert digest(output) == expected
    KEPT.extend([backend, result, done(recipe, backend)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", (backend_before_plan, all_at_exit))
def test_a_run(case: Callable[..., None], name: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """What it measured, which is memory of the device, lives longer than its streams are needed, or to the end."""
    me.run(recipe, tmp_path / "cpu", device="cpu")
    in_a_process(case, name, recipe, str(tmp_path / "out"), digest(tmp_path / "cpu"))


@case
def any_order() -> None:
    native = load()
    for order in itertools.permutations(range(6)):
        memory = native.DeviceMemory(own := native.Queue(0), 64, True)
        own.wait()
        host = native.HostMemory(region := memoryview(mmap.mmap(-1, 64)))
        other = native.Queue(0)
        native.upload(other, memory, 0, host, 0, 64)
        copied = native.download(other, host, 0, memory, 0, 64)
        things = [own, other, memory, host, region, copied]
        del own, other, memory, host, region, copied
        for i in order:
            things[i] = None
    assert held() == 0


def test_any_order() -> None:
    in_a_process(any_order)


@case
def never_waited_for(detached: bool) -> None:
    for order in itertools.permutations(range(3)):
        backend, staging = EmulatedCudaBackend(), memoryview(mmap.mmap(-1, 4096))
        memory = backend.attach(8192, 0, staging)
        backend.upload(staging[:4000], memory[:4000])
        chunk = Chunk([backend.array(memory[:4000], F32)], False, F32, 0, 1000)
        outcome = backend.combine(chunk, Combine((2.0,)), backend.output(memory[4096:8096], F32))
        if detached:
            backend.detach()
        things = [backend, staging, outcome]
        del backend, staging, memory, chunk, outcome
        for i in order:
            things[i] = None
        gc.collect()
    assert held() == 0


@pytest.mark.parametrize("detached", (True, False))
def test_an_outcome_that_nobody_waits_for(detached: bool) -> None:
    in_a_process(never_waited_for, detached)


class Failing:
    """The native module, one of whose calls fails: the one with number ``fails``, from 0."""

    def __init__(self) -> None:
        self.calls, self.fails = 0, -1
        self._lock = threading.Lock()  # readers and writers copy

    def __getattr__(self, name: str) -> Any:
        value = getattr(load(), name)
        makes_work = name[0].islower() and callable(value)
        if not (makes_work or name in ("Queue", "Event", "DeviceMemory", "HostMemory")):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.calls += 1
                fails = self.calls == self.fails + 1
            if fails:
                raise RuntimeError(f"call {self.fails} fails")
            return value(*arguments, **named)

        return call


@case
def a_call_that_fails(recipe: dict[str, Any], output: str, expected: str) -> None:
    native = Failing()
    backend = EmulatedCudaBackend(native)
    at_rest = held()

    def run(fails: int, folder: str) -> None:
        native.calls, native.fails = 0, fails
        me.run(recipe, folder, backend=backend, memory="200KB", overwrite=True)

    run(-1, output)
    calls = native.calls
    assert calls > 30 and digest(output) == expected, calls
    for fails in range(calls):
        try:
            run(fails, f"{output}-failed")
        except RuntimeError as error:
            assert str(error) == f"call {fails} fails"
        else:
            raise AssertionError(f"call {fails} did not fail")
        gc.collect()
        assert held() == at_rest, fails
    run(-1, output)
    assert digest(output) == expected


def test_a_call_that_fails(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Whichever of a run does, what is under way is waited for, nothing is left, and the backend works on."""
    me.run(recipe, tmp_path / "cpu", device="cpu")
    in_a_process(a_call_that_fails, recipe, str(tmp_path / "out"), digest(tmp_path / "cpu"))


if __name__ == "__main__":
    CASES[sys.argv[1]](*json.loads(sys.argv[2]))
