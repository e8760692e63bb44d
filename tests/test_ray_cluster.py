"""A real cluster of three nodes on this machine: the same bytes, also when a node, a file or the driver is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial import quantised_models
from safetensors.torch import save_file

import merge_engine as me

pytest.importorskip("ray")

SHARD_SIZE = "100KB"
TENSORS = 24
SMALL: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}


class Nodes:
    """A cluster whose nodes are named head, one, two."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "node_name": "head"})
        self._nodes = {name: self._add(name) for name in ("one", "two")}
        self.address: str = self._cluster.address

    def kill(self, name: str) -> None:
        """End a node as a power failure does."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def heal(self) -> None:
        for name in {"one", "two"} - self._nodes.keys():
            self._nodes[name] = self._add(name)

    def end(self) -> None:
        self._cluster.shutdown()

    def _add(self, name: str) -> Any:
        return self._cluster.add_node(**SMALL, node_name=name)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    started = Nodes()
    yield started
    started.end()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number in range(TENSORS):
        base, tuned = quantised_models(150 * 200, 2, torch.bfloat16, seed=number)
        for state, tensor in zip(states, (base, *tuned), strict=True):
            state[f"part_{number}.w"] = tensor.view(150, 200)
            state["steps"] = torch.arange(9)
    for name, state in zip(("base", "a", "b"), states, strict=True):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "test"}')
        save_file(state, folder / name / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def recipe(models: Path) -> dict[str, Any]:
    return {
        "merge_method": "breadcrumbs_ties",
        "base_model": str(models / "base"),
        "models": [{"model": str(models / name)} for name in "ab"],
        "parameters": {"density": 0.4, "gamma": 0.1, "weight": 0.5, "trim_scope": "model", "ties": "index"},
    }


@pytest.fixture(scope="module")
def expected(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of a merge in this process."""
    folder = tmp_path_factory.mktemp("local") / "out"
    me.run(recipe, folder, shard_size=SHARD_SIZE, backend="cpu", threads=1)
    return contents(folder)


def contents(folder: Path) -> dict[str, Any]:
    """The files of an output. What a manifest says of time and bytes moved depends on the run."""
    files: dict[str, Any] = {file.name: file.read_bytes() for file in folder.iterdir()}
    files["merge_manifest.json"] = json.loads(files["merge_manifest.json"])
    files["merge_manifest.json"].pop("ledger")
    return files


@pytest.fixture
def run(nodes: Nodes, recipe: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., me.MergeResult]]:
    nodes.heal()

    def run_on_ray(paths: dict[str, str] | None = None, **options: Any) -> me.MergeResult:
        ray = me.RayOptions(nodes.address, paths or {})
        return me.run(recipe, tmp_path / "out", shard_size=SHARD_SIZE, engine="ray", ray=ray, **options)

    yield run_on_ray


def done_by(result: me.MergeResult) -> dict[str, int]:
    """Shards by node, from the notes of a result."""
    found = (re.match(r"node (\w+): (\d+) shard", note) for note in result.notes)
    return {match[1]: int(match[2]) for match in found if match}


def test_three_nodes(run: Any, expected: Any, tmp_path: Path) -> None:
    """The bytes are those of one process, and the progress and the ledger are those of all nodes."""
    told, totals = [], []
    result = run(progress=told.append, on_schedule=lambda schedule: totals.append(schedule.bytes_read))
    assert contents(tmp_path / "out") == expected
    shares = done_by(result)
    assert shares.keys() == {"head", "one", "two"} and sum(shares.values()) == TENSORS
    assert [sum(told)] == totals
    assert result.ledger.workers == 3
    assert result.ledger.write.bytes >= TENSORS * 150 * 200 * 2


def test_a_node_is_lost_in_the_middle(
    nodes: Nodes, run: Any, models: Path, expected: Any, tmp_path: Path
) -> None:
    """Its work goes to others. One of them has the inputs under another path, as copies of its own."""
    copies = tmp_path / "copies"
    shutil.copytree(models, copies)
    for file in copies.rglob("*.safetensors"):
        os.utime(file, (1, 1))
    told: list[int] = []

    def kill(nbytes: int) -> None:
        told.append(nbytes)
        if len(told) == 5:
            nodes.kill("two")

    result = run({f"one:{models}": str(copies)}, progress=kill)
    assert contents(tmp_path / "out") == expected
    assert "a worker of node two was lost during the merge" in result.notes
    assert done_by(result)["one"] and done_by(result)["head"]


def test_the_driver_is_interrupted_and_killed(
    nodes: Nodes, run: Any, recipe: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    """Each time the same command goes on. Ray prints nothing of its own."""

    def complete() -> int:
        return len(list((tmp_path / "out").glob("*.record.part")))

    def interrupt(_: int) -> None:
        if complete():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"shards are complete: the same command goes on from there"):
        run(progress=interrupt)
    before = complete()
    assert 0 < before < TENSORS
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    here = {"cwd": tmp_path, "timeout": 60, "text": True, "capture_output": True}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, nodes.address, str(before), SHARD_SIZE], check=False, **here
    )
    assert killed.returncode == -signal.SIGKILL and before < complete() < TENSORS
    before = complete()
    command = [sys.executable, "-m", "merge_engine", "run", "recipe.yaml", "out", "--shard-size", SHARD_SIZE]
    done = subprocess.run([*command, "--ray", nodes.address], check=False, **here)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{before} of {TENSORS} shards were complete from an earlier run" in done.stdout
    assert "node head: " in done.stdout
    assert contents(tmp_path / "out") == expected


KILLED = """
import os, sys, merge_engine as me
from pathlib import Path

def kill(_):
    if len(list(Path("out").glob("*.record.part"))) > int(sys.argv[2]):
        os.kill(os.getpid(), 9)

me.run("recipe.yaml", "out", shard_size=sys.argv[3], engine="ray", ray=sys.argv[1], progress=kill)
"""


def test_nodes_that_cannot_do_it(run: Any, models: Path, tmp_path: Path) -> None:
    """Copies of another version, although size and header are the same; a missing file; another output folder."""
    copies = tmp_path / "copies"
    shutil.copytree(models, copies)
    weights = copies / "a" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (copies / "b" / "model.safetensors").unlink()
    with pytest.raises(me.ClusterError) as caught:
        run({f"two:{models}": str(copies)})
    assert caught.value.problems == [
        f"node two: {copies}/a: with other values than here: model.safetensors; give the node the same files, or say "
        "where they are (ray paths)",
        f"node two: {copies}/b: not there: model.safetensors; give the node the same files, or say where they are "
        "(ray paths)",
    ]
    with pytest.raises(
        me.OutputError, match=f"node two: does not see the output folder {tmp_path}/else; all nodes"
    ):
        run({f"two:{tmp_path}/out": str(tmp_path / "else")})
    assert not (tmp_path / "out").exists()


def test_another_version_of_ray(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.__version__", "1.0")
    with pytest.raises(me.ClusterError, match=r"Ray: \d\.\d+\.\d+ .* Ray: 1\.0") as caught:
        run()
    assert "\n" not in str(caught.value)
