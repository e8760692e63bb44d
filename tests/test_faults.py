"""Every fault gives one error that says what and where, and leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from adversarial import quantised_models
from conftest import SaveCheckpoint
from safetensors.torch import load_file

import merge_engine as me
from merge_engine.backends import create_backend
from merge_engine.checkpoint import CheckpointWriter
from merge_engine.engine.ring import Ring
from merge_engine.engine.to_folders import merge_to_folders
from merge_engine.engine.work import Work
from merge_engine.errors import BackendChoiceError
from merge_engine.observe.digests import Digests
from merge_engine.operands import Access, Stored
from merge_engine.planning import Budget, Schedule
from merge_engine.storage import OpenFiles, Way

SHAPES = {"embed.weight": (50, 40), "layers.0.weight": (300, 200), "layers.1.weight": (300, 200)}
SMALL = "400KB"
BYTES = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


class Setup:
    """A recipe that works, its checkpoints, and the folder it is to be merged into."""

    def __init__(self, save: SaveCheckpoint, folder: Path):
        self.save = save
        self.output = folder / "merged"
        self.tensors: list[dict[str, torch.Tensor]] = [{} for _ in range(3)]
        for number, (name, shape) in enumerate(SHAPES.items()):
            base, tuned = quantised_models(torch.Size(shape).numel(), 2, torch.bfloat16, seed=number)
            for tensors, tensor in zip(self.tensors, (base, *tuned), strict=True):
                tensors[name] = tensor.view(shape)
        self.base, self.a, self.b = (
            save(name, tensors, shards=2)
            for name, tensors in zip(("base", "a", "b"), self.tensors, strict=True)
        )

    def recipe(self, **keys: Any) -> dict[str, Any]:
        return {
            "merge_method": "ties",
            "base_model": str(self.base),
            "models": [{"model": str(self.a)}, {"model": str(self.b)}],
            "parameters": {"weight": 0.5, "density": 0.4},
            **keys,
        }

    def replace(self, name: str, tensors: dict[str, torch.Tensor]) -> Path:
        folder: Path = getattr(self, name)
        shutil.rmtree(folder)
        return self.save(folder.name, tensors, shards=2)

    def run_reading(self, way: Way, in_place: bool, memory: int, overwrite: bool = False) -> None:
        """A run that reads in the given way."""
        plan = me.plan(self.recipe(), self.output, overwrite=overwrite)
        with OpenFiles() as files:
            access = Access(files, way, in_place)
            merge_to_folders(Schedule(plan, Budget(memory)), [self.output], create_backend("cpu"), access)

    def refused(self, kind: type[me.MergeError], *said: object, **options: Any) -> str:
        """Runs and checks that it raises this error, with all these texts in its message, and leaves no output.

        With a ``way`` the run reads in that way, and in place if it says so.
        """
        way, in_place = options.pop("way", None), options.pop("in_place", False)
        recipe = options.pop("recipe", None) or self.recipe()
        output = options.pop("output", self.output)
        before = sorted(output.rglob("*")) if output.exists() else None
        with pytest.raises(me.MergeError) as caught:
            if way is None:
                me.run(recipe, output, **options)
            else:
                self.run_reading(way, in_place, options.pop("memory", 400_000))
        assert type(caught.value) is kind, repr(caught.value)
        message = str(caught.value)
        for part in said:
            assert str(part) in message, message
        assert (sorted(output.rglob("*")) if output.exists() else None) == before
        assert_no_threads_left()
        return message


def assert_no_threads_left() -> None:
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("feed", "read", "write", "digest", "fsync"))], (
        names
    )


@pytest.fixture
def setup(save_checkpoint: SaveCheckpoint, tmp_path: Path) -> Setup:
    return Setup(save_checkpoint, tmp_path)


SHARD = "model-00002-of-00002.safetensors"


def test_nothing_wrong(setup: Setup) -> None:
    """The recipe works before the tests below break it."""
    result = me.run(setup.recipe(), setup.output, memory=SMALL)
    merged = load_file(setup.output / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == SHAPES
    assert result.output == setup.output
    assert_no_threads_left()


def test_missing_shard(setup: Setup) -> None:
    (setup.a / SHARD).unlink()
    setup.refused(me.CheckpointError, setup.a, SHARD, "missing")


def test_every_missing_model_is_named(setup: Setup) -> None:
    shutil.rmtree(setup.a)
    shutil.rmtree(setup.b)
    setup.refused(me.CheckpointError, setup.a, setup.b)


@pytest.mark.parametrize("left", (0, 4, 100, -1))
def test_truncated_shard(setup: Setup, left: int) -> None:
    file = setup.b / SHARD
    os.truncate(file, left if left >= 0 else file.stat().st_size - 1)
    setup.refused(me.CheckpointError, file)


def write_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def test_header_whose_tensors_overlap(setup: Setup) -> None:
    shutil.rmtree(setup.a)
    setup.a.mkdir()
    header = {
        name: {"dtype": "BF16", "shape": [4], "data_offsets": [start, start + 8]}
        for name, start in (("first", 0), ("second", 4))
    }
    write_header(setup.a / "model.safetensors", header, bytes(12))
    message = setup.refused(me.CheckpointError, setup.a / "model.safetensors")
    assert "first" in message or "second" in message


def test_unknown_dtype(setup: Setup) -> None:
    shutil.rmtree(setup.a)
    setup.a.mkdir()
    header = {"embed.weight": {"dtype": "F7", "shape": [8], "data_offsets": [0, 7]}}
    write_header(setup.a / "model.safetensors", header, bytes(7))
    setup.refused(me.CheckpointError, setup.a / "model.safetensors", "embed.weight", "F7")


@pytest.mark.parametrize("target", ("../base/" + SHARD, "/etc/passwd", "..\\base\\" + SHARD))
def test_index_that_leaves_its_folder(setup: Setup, target: str) -> None:
    index = setup.a / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["layers.1.weight"] = target
    index.write_text(json.dumps(document))
    setup.refused(me.CheckpointError, index, "outside")


def test_every_tensor_whose_shapes_differ_is_named(setup: Setup) -> None:
    tensors = setup.tensors[2]
    tensors["embed.weight"] = tensors["embed.weight"][:48]
    tensors["layers.1.weight"] = tensors["layers.1.weight"].reshape(200, 300)
    setup.replace("b", tensors)
    setup.refused(
        me.PlanError, "embed.weight", "[50, 40]", "[48, 40]", "layers.1.weight", "[200, 300]", setup.b
    )


def test_a_tensor_that_the_base_lacks(setup: Setup) -> None:
    setup.replace("b", {**setup.tensors[2], "extra.weight": torch.zeros(3)})
    setup.refused(me.PlanError, "extra.weight", setup.b, setup.base)


@pytest.mark.parametrize("owner", ("base", "a", "b"))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("memory", (SMALL, "384MB"))
def test_nan_and_infinity(setup: Setup, owner: str, value: float, memory: str) -> None:
    tensors = setup.tensors[("base", "a", "b").index(owner)]
    tensors["layers.1.weight"][299, 199] = value
    folder = setup.replace(owner, tensors)
    setup.refused(me.NonFiniteError, folder / SHARD, "layers.1.weight", "1 NaN or infinite", memory=memory)
    allowed = me.run(setup.recipe(allow_nonfinite=True), setup.output, memory=memory)
    assert allowed.output == setup.output


def test_nan_everywhere_alike(setup: Setup) -> None:
    """Tensors that no model changed are checked, too."""
    for name, tensors in zip(("base", "a", "b"), setup.tensors, strict=True):
        tensors["embed.weight"] = torch.full((50, 40), float("nan"), dtype=torch.bfloat16)
        setup.replace(name, tensors)
    setup.refused(me.NonFiniteError, "embed.weight", setup.base)


@pytest.mark.parametrize(
    ("parameters", "said"),
    (
        ({"weight": 1, "density": 1.5}, ("density", "1.5")),
        ({"weight": 1, "density": -0.1}, ("density", "-0.1")),
        ({"weight": 1, "density": float("nan")}, ("density", "nan")),
        ({"weight": 1, "density": [0.1, 2]}, ("density[1]", "2")),
        ({"weight": 1, "trim_slack": 1}, ("trim_slack", "1")),
        ({"weight": 1, "sign_slack": -1}, ("sign_slack", "-1")),
        ({"weight": "heavy"}, ("weight", "heavy")),
        ({"weight": 1, "densty": 0.5}, ("densty", '"density"')),
        ({"weight": 1, "ties": "random"}, ("ties", "random", "spread")),
        ({"density": 0.5}, ("weight", "required")),
    ),
)
def test_parameters(setup: Setup, parameters: dict[str, Any], said: tuple[str, ...]) -> None:
    setup.refused(me.RecipeError, *said, recipe=setup.recipe(parameters=parameters))


@pytest.mark.parametrize(
    ("parameters", "said"),
    (
        ({"weight": 1, "sign_slack": 2, "sign_slack_mode": "retain"}, "sign_slack must not exceed 1"),
        ({"weight": 1, "density": [0.1, 0.2], "trim_scope": "model"}, "density"),
    ),
)
def test_parameters_that_do_not_go_together(setup: Setup, parameters: dict[str, Any], said: str) -> None:
    setup.refused(me.PlanError, said, "models[0]", recipe=setup.recipe(parameters=parameters))


def test_a_keep_probability_beyond_one(setup: Setup) -> None:
    parameters = {"weight": 1, "density": 0.9, "epsilon": 0.2}
    recipe = setup.recipe(merge_method="della", parameters=parameters)
    setup.refused(me.PlanError, "density 0.9", "epsilon 0.2", recipe=recipe)


def test_weights_that_cancel(setup: Setup) -> None:
    recipe = setup.recipe(merge_method="linear", parameters={})
    for entry, weight in zip(recipe["models"], (1, -1), strict=True):
        entry["parameters"] = {"weight": weight}
    del recipe["base_model"]
    setup.refused(me.PlanError, "embed.weight", "sum to 0", recipe=recipe)


def test_no_base_model(setup: Setup) -> None:
    recipe = setup.recipe()
    del recipe["base_model"]
    setup.refused(me.PlanError, "ties", "base_model", recipe=recipe)


def test_unknown_method(setup: Setup) -> None:
    setup.refused(me.RecipeError, "tiess", '"ties"', recipe=setup.recipe(merge_method="tiess"))


def test_unknown_backend(setup: Setup) -> None:
    setup.refused(BackendChoiceError, "abacus", "cpu", backend="abacus")


def test_output_folder_in_use(setup: Setup) -> None:
    setup.output.mkdir()
    (setup.output / "notes.txt").write_text("mine")
    setup.refused(me.PlanError, setup.output, "not empty")
    assert (setup.output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", (False, True))
def test_output_folder_that_is_an_input(setup: Setup, overwrite: bool) -> None:
    setup.refused(me.PlanError, setup.a, "input", output=setup.a, overwrite=overwrite)
    setup.refused(me.PlanError, "input", output=setup.a / "merged", overwrite=overwrite)
    link = setup.a.parent / "link"
    link.symlink_to(setup.a)
    setup.refused(me.PlanError, "input", output=link, overwrite=overwrite)


def test_disk_too_small(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=BYTES - 1))
    setup.refused(me.PlanError, setup.output, "free")


def test_memory_too_small(setup: Setup) -> None:
    setup.refused(me.PlanError, "memory budget", "1,000 bytes", memory="1KB")
    setup.refused(me.OptionError, "memory", "plenty", memory="plenty")


def failing(nth: int, original: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The n-th call fails."""
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise error
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("memory", (400_000, 384_000_000))
@pytest.mark.parametrize(
    ("owner", "method", "nth", "error"),
    (
        (Stored, "range", 1, me.CheckpointError("the disk has gone")),
        (Stored, "range", 5, RuntimeError("a bug")),
        (Ring, "acquire", 1, RuntimeError("a bug")),
        (Ring, "acquire", 3, RuntimeError("a bug")),
        (Work, "measure", 1, RuntimeError("a bug")),
        (Work, "merge", 3, KeyboardInterrupt()),
        (Work, "wait", 2, RuntimeError("a bug")),
        (CheckpointWriter, "write_batch", 1, me.OutputError("the disk is full")),
        (Digests, "add", 3, RuntimeError("a bug")),
        (CheckpointWriter, "add_file", 1, me.OutputError("the disk is full")),
        (CheckpointWriter, "add_file", 2, me.OutputError("the disk is full")),
        (CheckpointWriter, "flush", 1, me.OutputError("the disk is full")),
        (CheckpointWriter, "flush", 2, me.OutputError("the disk is full")),
    ),
)
def test_a_failure_in_any_thread_stops_the_run(
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    nth: int,
    error: BaseException,
    memory: int,
) -> None:
    monkeypatch.setattr(owner, method, failing(nth, getattr(owner, method), error))
    with pytest.raises(type(error)) as caught:
        setup.run_reading("cached", False, memory)
    assert caught.value is error
    if method in ("add_file", "flush"):  # the weights are complete, and the next run publishes them
        assert "1 of 1 shards are complete: the same command goes on from there" in str(error)
        assert all(file.name.endswith(".part") for file in setup.output.iterdir())
    else:
        assert not setup.output.exists()
    assert_no_threads_left()
    monkeypatch.undo()
    me.run(setup.recipe(), setup.output, memory=memory)


def test_a_failure_keeps_an_earlier_output(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    me.run(setup.recipe(), setup.output)
    before = {file.name: file.read_bytes() for file in setup.output.iterdir()}
    error = me.OutputError("the disk is full")
    monkeypatch.setattr(CheckpointWriter, "write_batch", failing(2, CheckpointWriter.write_batch, error))
    setup.refused(me.OutputError, "the disk is full", overwrite=True, recipe=setup.recipe(seed=1))
    assert {file.name: file.read_bytes() for file in setup.output.iterdir()} == before


SLOW_RUN = """
import sys, time
import merge_engine as me
from merge_engine.checkpoint import CheckpointWriter

write = CheckpointWriter.write_batch

def slow(*args):
    write(*args)
    sys.stdout.write("written" + chr(10))  # in one piece, for several threads write
    sys.stdout.flush()
    time.sleep(float(sys.argv[3]))

CheckpointWriter.write_batch = slow
me.run(sys.argv[1], sys.argv[2], memory="100KB", overwrite=True, shard_size="150KB")
print("done", flush=True)
"""


@pytest.mark.parametrize("earlier", (False, True))
@pytest.mark.parametrize("pieces", (1, 4))
def test_a_killed_run_leaves_no_checkpoint_and_can_be_repeated(
    setup: Setup, tmp_path: Path, pieces: int, earlier: bool
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(setup.recipe()))
    if earlier:
        me.run(setup.recipe(parameters={"weight": 1}), setup.output)
    kept = {file.name: file.read_bytes() for file in setup.output.glob("*")}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(recipe), str(setup.output), "0.2"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        for _ in range(pieces):
            assert child.stdout.readline() == "written\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
    assert child.returncode == -signal.SIGKILL
    if earlier:
        assert {name: (setup.output / name).read_bytes() for name in kept} == kept
        me.plan({"merge_method": "passthrough", "models": [{"model": str(setup.output)}]})
    else:
        taken = {"merge_method": "passthrough", "models": [{"model": str(setup.output)}]}
        with pytest.raises(me.CheckpointError, match="unfinished merge"):
            me.plan(taken)
    me.run(setup.recipe(), setup.output, overwrite=earlier)
    fresh = setup.output.with_name("fresh")
    me.run(setup.recipe(), fresh)
    assert load_bytes(setup.output) == load_bytes(fresh)
    assert not list(setup.output.glob("*.part"))


def load_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def rewrite_in_place(path: Path) -> None:
    """Other bytes, and the same size: what ``rsync --inplace`` does."""
    data = path.read_bytes()
    with path.open("r+b") as stream:
        stream.seek(len(data) // 2)
        stream.write(data[: len(data) - len(data) // 2])
    os.utime(path)  # the times of a file system may be coarser than this test


@pytest.mark.parametrize("way", ("cached", "direct"))
@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("owner", ("base", "b"))
def test_an_input_that_is_rewritten_during_the_run(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, owner: str, in_place: bool, way: Way
) -> None:
    """Before it is first read, and after."""
    file = getattr(setup, owner) / SHARD
    for nth in (1, 4):
        original, calls = Work.merge, itertools.count(1)

        def merge(*args: Any, calls: Any = calls, nth: int = nth, original: Any = original) -> None:
            if next(calls) == nth:
                rewrite_in_place(file)
            original(*args)

        monkeypatch.setattr(Work, "merge", merge)
        setup.refused(me.CheckpointError, file, "it has been written to", way=way, in_place=in_place)
        monkeypatch.undo()


def test_an_input_that_is_rewritten_during_a_merge_into_memory(setup: Setup) -> None:
    plan = me.plan(setup.recipe())
    with pytest.raises(me.CheckpointError, match="it has been written to while it was merged"):
        me.run(plan, progress=lambda _: rewrite_in_place(setup.a / SHARD))


def test_a_pickle_that_is_rewritten_during_the_run(setup: Setup) -> None:
    for name, tensors in zip(("base", "a"), setup.tensors, strict=False):
        folder = setup.output.with_name(f"{name}-pickled")
        folder.mkdir()
        torch.save(tensors, folder / "pytorch_model.bin")
    recipe = setup.recipe(base_model=str(setup.output.with_name("base-pickled")))
    recipe["models"][0]["model"] = str(folder)
    file = folder / "pytorch_model.bin"
    setup.refused(
        me.CheckpointError,
        file,
        "it has been written to",
        recipe=recipe,
        progress=lambda _: os.utime(file),
    )
