"""An interrupted merge goes on where it stopped, and its output is that of a merge that was not interrupted."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adversarial import quantised_models
from conftest import SaveCheckpoint

import merge_engine as me
from merge_engine.engine.records import ShardResult
from merge_engine.engine.shards import merge_in_shards, merge_shard

SHARD_SIZE = "300KB"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.3, "trim_slack": 0.05, "sign_slack": 0.5},
    "ties over the model": {"weight": 0.5, "density": 0.3, "trim_scope": "model", "trim_slack": 0.1},
    "breadcrumbs by index over the model": {
        "weight": 0.5,
        "density": 0.4,
        "gamma": 0.1,
        "ties": "index",
        "trim_scope": "model",
    },
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.2},
}


@pytest.fixture
def recipes(save_checkpoint: SaveCheckpoint) -> dict[str, dict[str, Any]]:
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number in range(8):
        base, tuned = quantised_models(300 * 400, 2, torch.bfloat16, seed=number)
        for state, tensor in zip(states, (base, *tuned), strict=True):
            state[f"layers.{number}.w"] = tensor.view(300, 400)
            state[f"layers.{number}.steps"] = torch.arange(500 if number == 3 else 3)
            state[f"layers.{number}.none"] = torch.zeros(0, 4, dtype=torch.bfloat16)
    base_folder, *models = (
        str(save_checkpoint(name, state, {"dtype": "float32"}, shards=2))
        for name, state in zip(("base", "a", "b"), states, strict=True)
    )
    Path(base_folder, "tokenizer.json").write_text('{"version": "1.0"}')
    return {
        title: {
            "merge_method": title.partition(" ")[0],
            **({} if title == "linear" else {"base_model": base_folder}),
            "models": [{"model": model} for model in models],
            "parameters": parameters,
            "seed": 5,
        }
        for title, parameters in METHODS.items()
    }


@pytest.fixture
def recipe(recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return recipes["ties"]


def contents(folder: Path) -> dict[str, Any]:
    """The files of an output. What a manifest says of time and bytes moved depends on the run."""
    files: dict[str, Any] = {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }
    files["merge_manifest.json"] = json.loads(files["merge_manifest.json"])
    files["merge_manifest.json"].pop("ledger")
    return files


def run(recipe: dict[str, Any] | Path, output: Path, **options: Any) -> me.MergeResult:
    return me.run(
        recipe,
        output,
        **{"shard_size": SHARD_SIZE, "backend": "cpu", "threads": 1} | options,
    )


class Stop:
    """Stops a run with an error, after so many batches, and once a shard is complete in the folder, if one is named."""

    def __init__(self, batches: int, error: BaseException, folder: Path | None = None):
        self._left = batches
        self._error = error
        self._folder = folder

    def __call__(self, _: int) -> None:
        self._left -= 1
        if self._left == 0:
            if self._folder is not None:
                wait_for_record(self._folder)
            raise self._error


def wait_for_record(output: Path) -> None:
    """Wait for the threads that write: all bytes of some shard have been handed to them."""
    until = time.monotonic() + 60
    while not recorded(output):
        assert time.monotonic() < until, "no shard is complete"
        time.sleep(0.01)


def stopped(
    recipe: dict[str, Any],
    output: Path,
    batches: int,
    error: BaseException,
    folder: Path | None = None,
    **options: Any,
) -> bool:
    """Whether a run was stopped; otherwise it is complete."""
    try:
        run(recipe, output, progress=Stop(batches, error, folder), memory="2MB", **options)
    except type(error) as caught:
        assert caught is error
        return True
    return False


def interrupted(recipe: dict[str, Any], output: Path, **options: Any) -> int:
    """Stop a run where some shards are complete and others are not. Returns the number of the former.

    After six batches every method has handed over all of some shard, and not of all shards.
    """
    assert stopped(recipe, output, 6, KeyboardInterrupt(), output, **options)
    return len(recorded(output))


def recorded(output: Path) -> list[Path]:
    return sorted(output.glob("*.record.part"))


def earlier(result: me.MergeResult) -> int:
    """The number of shards that were complete, from the note of a result."""
    said = [note for note in result.notes if note.endswith("shards were complete from an earlier run")]
    return int(said[0].split(" of ")[0]) if said else 0


@pytest.mark.parametrize("title", METHODS)
def test_stopped_after_any_batch(title: str, recipes: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    recipe = recipes[title]
    whole = run(recipe, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for batches in range(1, 1000, 4):
        output = tmp_path / str(batches)
        if not stopped(recipe, output, batches, KeyboardInterrupt()):
            break
        complete = len(recorded(output))
        assert not (output / "model.safetensors.index.json").exists()
        result = run(recipe, output)
        assert contents(output) == expected
        assert earlier(result) == complete
        assert (result.counts, result.per_tensor) == (whole.counts, whole.per_tensor)
        if complete:
            assert result.ledger.write.bytes < whole.ledger.write.bytes
    complete = interrupted(recipe, tmp_path / "out")
    assert earlier(run(recipe, tmp_path / "out")) == complete
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("error", (me.OutputError("the disk is full"), MemoryError(), KeyboardInterrupt()))
def test_the_message_says_that_the_same_command_goes_on(
    recipe: dict[str, Any], error: BaseException, tmp_path: Path
) -> None:
    output, shards = tmp_path / "out", len(me.plan(recipe, shard_size=SHARD_SIZE).shards)
    complete = interrupted(recipe, output)
    with pytest.raises((me.MergeError, KeyboardInterrupt)) as caught:
        run(recipe, output, memory="2MB", progress=Stop(1, error))
    said = f"{complete} of {shards} shards are complete: the same command goes on from there"
    assert said in str(caught.value)
    assert earlier(run(recipe, output)) == complete


def test_stopped_again_and_again(recipe: dict[str, Any], tmp_path: Path) -> None:
    run(recipe, tmp_path / "whole")
    complete = [interrupted(recipe, tmp_path / "out")]
    for batches in itertools.count(6):
        if not stopped(recipe, tmp_path / "out", batches, KeyboardInterrupt()):
            break
        complete.append(len(recorded(tmp_path / "out")))
    assert complete == sorted(complete)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_over_an_earlier_output(recipe: dict[str, Any], tmp_path: Path) -> None:
    run(recipe, tmp_path / "whole")
    run(recipe | {"seed": 6, "dtype": "float32"}, tmp_path / "out", shard_size="1MB")
    before = contents(tmp_path / "out")
    complete = interrupted(recipe, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out").items() >= before.items()
    assert earlier(run(recipe, tmp_path / "out", overwrite=True)) == complete
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


Change = Callable[[dict[str, Any], Path], dict[str, Any]]


def touch(recipe: dict[str, Any], _: Path) -> dict[str, Any]:
    os.utime(Path(recipe["models"][1]["model"]) / "model-00001-of-00002.safetensors")
    return {}


def exchange(recipe: dict[str, Any], _: Path) -> dict[str, Any]:
    """Another file with the same size, time and header, as archives give it."""
    file = Path(recipe["models"][1]["model"]) / "model-00001-of-00002.safetensors"
    found, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    other = file.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(file)
    return {}


def damage_part(_: dict[str, Any], output: Path) -> dict[str, Any]:
    for record in recorded(output):
        part = output / record.name.replace(".record", "")
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
    return {}


def damage_records(_: dict[str, Any], output: Path) -> dict[str, Any]:
    for record in recorded(output):
        data = bytearray(record.read_bytes())
        data[len(data) // 2] ^= 1
        record.write_bytes(data)
    return {}


def cut_records(_: dict[str, Any], output: Path) -> dict[str, Any]:
    for record in recorded(output):
        os.truncate(record, record.stat().st_size // 2)
    return {}


@pytest.mark.parametrize(
    "change",
    (
        lambda recipe, output: {"recipe": recipe | {"seed": 6}},
        lambda recipe, output: {"recipe": recipe | {"allow_nonfinite": True}},
        lambda recipe, output: {"recipe": recipe | {"parameters": {"weight": 0.5, "density": 0.2}}},
        lambda recipe, output: {"shard_size": "50KB"},
        touch,
        exchange,
        damage_part,
        damage_records,
        cut_records,
    ),
)
def test_what_is_not_the_same_starts_anew(recipe: dict[str, Any], change: Change, tmp_path: Path) -> None:
    interrupted(recipe, tmp_path / "out")
    options = {"recipe": recipe} | change(recipe, tmp_path / "out")
    assert earlier(run(output=tmp_path / "out", **options)) == 0
    run(output=tmp_path / "whole", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_devices_and_memory_do_not_matter(recipe: dict[str, Any], tmp_path: Path) -> None:
    run(recipe, tmp_path / "whole")
    complete = interrupted(recipe, tmp_path / "out")
    result = run(recipe, tmp_path / "out", backend="reference", memory="4MB")
    assert earlier(result) == complete
    found, expected = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert found["merge_manifest.json"].pop("backend") == "cpu, reference"
    expected["merge_manifest.json"].pop("backend")
    assert found == expected


@pytest.mark.parametrize("title", ("linear", "ties over the model"))
def test_between_a_run_and_shards_in_other_processes(
    title: str, recipes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = recipes[title]
    run(recipe, tmp_path / "whole")
    plan, one, other = me.plan(recipe, shard_size=SHARD_SIZE), tmp_path / "one", tmp_path / "other"

    def two_of(do: Any, jobs: Any) -> Any:
        for number, job in enumerate(jobs):
            if do is merge_shard and number == 2:
                raise KeyboardInterrupt
            yield do(job)

    with pytest.raises(KeyboardInterrupt, match=f"2 of {len(plan.shards)} shards are complete"):
        merge_in_shards(plan, one, two_of, backend="cpu")
    complete = interrupted(recipe, other)
    assert earlier(run(recipe, one)) == 2
    assert earlier(merge_in_shards(plan, other, backend="cpu")) == complete
    assert contents(one) == contents(other) == contents(tmp_path / "whole")


def test_inputs_that_are_wrong_leave_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    for error in (me.NonFiniteError("NaN"), me.PlanError(["integers differ"])):
        interrupted(recipe, tmp_path / "out")
        assert stopped(recipe, tmp_path / "out", 1, error)
        assert not list((tmp_path / "out").iterdir())
    with pytest.raises(me.CheckpointError, match="has been written to while it was merged"):
        run(recipe, tmp_path / "other", progress=lambda _: touch(recipe, tmp_path))
    assert not (tmp_path / "other").exists()


def test_methods_of_others_start_anew(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Nobody knows whether their code is still the same."""

    class Half(me.Method):
        name = "half"

        def solve(self, task: me.Task, answers: Any) -> me.Consensus:
            return me.Consensus(tuple(me.Entry(me.Dense(), weight=0.5) for _ in task.models))

    me.register(Half)
    try:
        recipe |= {"merge_method": "half", "parameters": {}}
        for batches in range(1, 6):
            assert stopped(recipe, tmp_path / "out", batches, KeyboardInterrupt())
            assert not (tmp_path / "out").exists()
    finally:
        del me.METHODS["half"]


SLOW = """
import sys, time
import merge_engine as me
import merge_engine.cli.app
from merge_engine.checkpoint import CheckpointWriter
from merge_engine.cli import main

write = CheckpointWriter.write_batch

def slow(*args):
    time.sleep(0.02)
    write(*args)

CheckpointWriter.write_batch = slow
print("begun", flush=True)
"""
COMMAND = SLOW + "main()"
CHILD = (
    SLOW
    + """
me.run(sys.argv[1], sys.argv[2], memory="1MB", shard_size=sys.argv[3], backend="cpu", threads=1)
"""
)


@pytest.mark.parametrize("seconds", (0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6))
def test_killed_at_any_time(recipe: dict[str, Any], tmp_path: Path, seconds: float) -> None:
    whole, output, file = tmp_path / "whole", tmp_path / "out", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    run(file, whole)
    child = subprocess.Popen([sys.executable, "-c", CHILD, file, output, SHARD_SIZE], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"begun\n"
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    complete, is_there = len(recorded(output)), (output / "merge_manifest.json").exists()
    if not is_there and not (output / "merge.part").exists():  # it was not being published
        # Two records at a time may have been begun.
        assert complete - 2 <= earlier(run(file, output)) <= complete
    elif not is_there or list(output.glob("*.part")):
        run(file, output, overwrite=is_there)
    assert contents(output) == contents(whole)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
@pytest.mark.parametrize("seconds", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
def test_a_command_that_is_ended_cleans_up(
    recipe: dict[str, Any], tmp_path: Path, seconds: float, number: signal.Signals
) -> None:
    whole, output, file = tmp_path / "whole", tmp_path / "out", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    run(file, whole)
    command = ["run", file, output, "--shard-size", SHARD_SIZE, "--memory", "2MB"]
    child = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *command, "--backend", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "begun\n"
    time.sleep(seconds)
    child.send_signal(number)
    _, said = child.communicate()
    if (output / "merge_manifest.json").exists():
        # Ctrl-C that comes between the end of the merge and that of the command counts.
        assert child.returncode in ((0,) if number is signal.SIGTERM else (0, 128 + number))
        assert said == "" and contents(output) == contents(whole)
        return
    assert child.returncode == 128 + number
    name = "terminated" if number is signal.SIGTERM else "interrupted"
    complete = len(recorded(output))
    if complete:
        rest = f"; {complete} of 8 shards are complete: the same command goes on from there"
        assert len(list(output.iterdir())) == 2 * complete
    else:
        rest = ""
        assert not output.exists()
    assert said == f"error: {name}{rest}\n"
    assert earlier(run(file, output)) == complete
    assert contents(output) == contents(whole)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_complete_merge_is_no_failure_however_late_the_signal(
    recipe: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    """It comes when Python ends and has given up its handlers."""
    late = """
import os, sys
import merge_engine.cli.app
from merge_engine.cli import main

class Late:
    def __init__(self):
        self.kill, self.process, self.number = os.kill, os.getpid(), int(sys.argv.pop())

    def __del__(self):
        self.kill(self.process, self.number)

sys.late = Late()
main()
"""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["run", tmp_path / "recipe.yaml", tmp_path / "out", "--backend", "cpu", str(int(number))]
    subprocess.run([sys.executable, "-c", late, *command], check=True, stdout=subprocess.DEVNULL)


def test_a_record_is_read_strictly() -> None:
    good = ShardResult(
        "model.safetensors",
        {"w": me.TensorResult("w", 5, {1: me.ModelCounts(4, 3, 2, 1)})},
        {1: 7},
        {"w": {0: bytes(range(16))}},
        ["a note"],
        "cpu",
    )
    encoded = good.encode()
    assert ShardResult.decode(encoded) == good
    document = json.loads(encoded)
    for bad in (b"", b"[]", encoded[:-1], json.dumps(document | {"more": 1}).encode()):
        with pytest.raises(me.OutputError, match="cannot be read"):
            ShardResult.decode(bad)
    for key in document.keys() - {"shared"}:
        rest = {name: value for name, value in document.items() if name != key}
        for other in (rest, rest | {key: None}, rest | {key: 1.5}):
            with pytest.raises(me.OutputError, match="cannot be read"):
                ShardResult.decode(json.dumps(other).encode())
