"""What decides on a merge on many machines, without any: placing, paths, checks of nodes, counts in parts."""

from __future__ import annotations

import heapq
import os
import pickle
import signal
import socket
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from adversarial import quantised_models
from conftest import SaveCheckpoint
from emulated_cuda.backend import EmulatedCudaBackend
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_engine as me
from merge_engine.cli.app import call
from merge_engine.distributed.checks import differing, short_of_memory
from merge_engine.distributed.connecting import connected, heard
from merge_engine.distributed.crew import free_of, nodes_of, taken
from merge_engine.distributed.greeting import demand_answer
from merge_engine.distributed.looking import differences, look, wanted_files
from merge_engine.distributed.options import NodePaths, parse_paths, ray_options, unknown_nodes
from merge_engine.distributed.parcels import pack, unpack
from merge_engine.distributed.placing import Piece, after, choose, evenly, held_of, workers_of
from merge_engine.distributed.worker import Introduction
from merge_engine.engine.jobs import Done
from merge_engine.engine.shards import merge_in_shards

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a server of HTTP/2 begins. Then it answers with headers; these were recorded."""


def headers(content: bytes) -> bytes:
    return bytes([0, 0, len(content), 1, 4, 0, 0, 0, 1]) + content


ALIVE = headers(b"\x88@\x0ccontent-type\x10application/grpc")
NO_SUCH = headers(b"\x88@\x0ccontent-type\x10application/grpc@\x0bgrpc-status\x0212")
NEEDS_TOKEN = headers(b"\x88@\x0ccontent-type\x10application/grpc@\x0bgrpc-status\x0216")
REFUSED = headers(b"\x8d")  # 404

SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=30)


def simulated(sizes: list[int], held: dict[int, list[float]]) -> tuple[dict[int, list[int]], float]:
    """Workers of one speed: the jobs of each, and when the last one ends."""
    waiting, free = dict(enumerate(sizes)), [(0.0, worker) for worker in held]
    done: dict[int, list[int]] = {worker: [] for worker in held}
    end = 0.0
    while waiting:
        now, worker = heapq.heappop(free)
        number = choose(waiting, worker, held)
        end = max(end, now + waiting.pop(number))
        done[worker].append(number)
        heapq.heappush(free, (now + sizes[number], worker))
    return done, end


@given(SIZES, st.integers(1, 5))
def test_largest_first_ends_evenly(sizes: list[int], workers: int) -> None:
    done, end = simulated(sizes, {worker: [0.5] * len(sizes) for worker in range(workers)})
    assert sorted(number for numbers in done.values() for number in numbers) == list(range(len(sizes)))
    assert all(sizes[a] >= sizes[b] for numbers in done.values() for a, b in pairwise(numbers))
    assert end <= (4 / 3) * best_end(sizes, workers) + 1e-9


def best_end(sizes: list[int], workers: int) -> float:
    """No order ends before this."""
    ordered = sorted(sizes, reverse=True)
    pairs = ordered[workers - 1] + ordered[workers] if len(sizes) > workers else 0
    return max(sum(sizes) / workers, ordered[0], pairs)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.randoms())
def test_each_worker_takes_what_its_page_cache_holds(counts: list[int], random: Any) -> None:
    """No worker does a job of others while one of its own waits."""
    homes = [worker for worker, count in enumerate(counts) for _ in range(count)]
    random.shuffle(homes)
    pieces = [Piece(10, {file: 10}) for file in range(len(homes))]
    held = {w: held_of(pieces, [float(home == w) for home in homes]) for w in range(len(counts))}
    done, _ = simulated([10] * len(homes), held)
    for worker, numbers in done.items():
        own = [homes[number] == worker for number in numbers]
        assert own[0] and own == sorted(own, reverse=True)


def test_what_was_read_is_held() -> None:
    assert after(Piece(9, {0: 50, 2: 300}), [0.2, 0.1, 0.9], [100, 100, 400]) == [0.7, 0.1, 1.0]
    assert after(Piece(9, {}), [0.5], [0]) == [0.5]


@given(st.floats(0.1, 256), st.integers(1, 16))
def test_workers_of_a_node_take_no_more_than_it_has(cores: float, workers: int) -> None:
    each, threads = evenly(cores, workers)
    assert each * workers <= cores + 1e-9
    assert threads >= 1 and (threads == 1 or threads == each)


def test_two_workers_where_all_have_enough_to_do() -> None:
    assert [workers_of(cores, 0, 3, 12) for cores in (1, 1.5, 2, 64)] == [1, 1, 2, 2]
    assert [workers_of(8, 0, 3, jobs) for jobs in (1, 11, 12)] == [1, 1, 2]
    assert workers_of(8, 4, 3, 1) == 4


def test_paths() -> None:
    paths = {"/m": "/mnt/m", "/m/llama": "/fast/llama", "n1:/m": "/local", "[fd00::1]:/m/": "/v6/"}
    rules = ray_options(me.RayOptions("h:1", paths)).rules
    other, one = NodePaths.of(rules, {"n2"}), NodePaths.of(rules, {"n1", "10.0.0.1"})
    assert [str(other.there(Path(p))) for p in ("/m/llama/a", "/m/x", "/mm/x", "/m")] == [
        "/fast/llama/a",
        "/mnt/m/x",
        "/mm/x",
        "/mnt/m",
    ]
    assert str(one.there(Path("/m/llama/a"))) == "/local/llama/a"
    assert str(NodePaths.of(rules, {"[fd00::1]"}).there(Path("/m/x"))) == "/v6/x"
    assert parse_paths(["n1:/m=/local", "/a=b=/c"]) == {"n1:/m": "/local", "/a=b": "/c"}
    (line,) = unknown_nodes(rules, {"n1", "n2"})
    assert line == "ray paths: the cluster has no node [fd00::1]; it has n1, n2"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("ray://h:1",), "is the address of a Ray client"),
        (("h",), "must be auto, local or HOST:PORT"),
        (("h:port",), "must be auto, local or HOST:PORT"),
        ((7,), "must be an address, not 7"),
        (("auto", {"m": "/n"}), "'m': '/n' must be two absolute paths"),
        (("auto", {"/m": "n"}), "must be two absolute paths"),
        (("auto", {":/m": "/n"}), "must be two absolute paths"),
        (("auto", ["/m"]), "paths must be a mapping"),
    ],
)
def test_wrong_options(given: Any, said: str) -> None:
    with pytest.raises(me.OptionError, match=said):
        me.RayOptions(*given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "spark"}, "engine: must be local or ray, not 'spark'"),
        ({"ray": "auto"}, "ray: is for engine ray only"),
        ({"engine": "ray", "device": "cuda:1"}, "must be auto, cpu or cuda, not cuda:1"),
        ({"engine": "ray", "backend": "abacus"}, 'there is no backend "abacus"'),
        ({"engine": "ray", "ray": 5}, "ray: must be an address, not 5"),
    ],
)
def test_wrong_arguments(options: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(me.OptionError, match=said):
        me.run("no such recipe", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_several_recipes_need_a_folder_that_all_nodes_see(tmp_path: Path) -> None:
    one = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    with pytest.raises(me.OptionError, match="intermediate_dir: with engine ray several recipes need one"):
        me.run(f"name: first\n{one}---\n{one}", tmp_path / "out", engine="ray")


def test_the_command_line_takes_paths_only_with_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    with patch("sys.argv", ["merge-engine", "run", "recipe.yaml", "out", "--ray-path", "/a=/b"]):
        assert call() == 2
    assert capsys.readouterr().err == "error: --ray-path: needs --ray\n"


def test_an_address_without_a_cluster_is_found_in_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        me.ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: Connection refused"
    ):
        connected("127.0.0.1:1").__enter__()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")  # of a cluster that was killed
    with pytest.raises(me.ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        connected("auto").__enter__()


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", SETTINGS + REFUSED, SETTINGS + NO_SUCH]
)
def test_something_else_at_the_address(answer: bytes) -> None:
    """What speaks another protocol, or the same one without being the head of a cluster, as Ray's other ports do."""
    with pytest.raises(me.ClusterError, match=r"something else does; check the port \(6379 by default\)"):
        demand_answer(serving(answer))


@pytest.mark.parametrize("answer", [SETTINGS + ALIVE, SETTINGS + NEEDS_TOKEN])
def test_a_cluster_at_the_address(answer: bytes) -> None:
    demand_answer(serving(answer))


def serving(answer: bytes) -> str:
    """The address where the next connection gets this answer."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server, server.accept()[0] as connection:
            while not connection.recv(1000).endswith(bytes(5)):
                pass
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_waits_while_ray_starts(fails: bool) -> None:
    """It counts even if the start fails, a second one counts at once, and handlers of others go again."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(KeyboardInterrupt), heard():
        signal.raise_signal(signal.SIGINT)
        done.append("to the end")
        if fails:
            raise ValueError
    assert done
    with pytest.raises(KeyboardInterrupt), heard():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError
    with heard():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("given", ["junk", "ray://host:10001"])
def test_rays_variable_holds_no_address(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(me.OptionError, match=r"^RAY_ADDRESS: "):
        connected("auto").__enter__()


def listed(name: str, number: str, **resources: float) -> dict[str, Any]:
    return {
        "NodeID": number * 16,
        "NodeName": name,
        "NodeManagerAddress": "10.0.0.1",
        "NodeManagerHostname": "host",
        "Alive": number != "f",
        "Resources": resources,
    }


def test_nodes() -> None:
    nodes = nodes_of(
        [
            listed("b", "1", CPU=8.0, GPU=2.0),
            listed("a", "2", CPU=4.0),
            listed("a", "3", CPU=4.0),
            listed("head", "4", memory=1.0),
            listed("dead", "f", CPU=4.0),
        ]
    )
    assert [(node.name, node.cores, node.gpus) for node in nodes] == [
        ("a#222222", 4.0, 0),
        ("a#333333", 4.0, 0),
        ("b", 8.0, 2),
    ]
    assert {"a", "a#222222", "10.0.0.1", "host", "2" * 16} == nodes[0].names


def test_what_other_work_leaves_of_nodes() -> None:
    """Whole cores, or what a node with less than one has; a node without any is left out."""
    nodes = nodes_of(
        [
            listed("busy", "1", CPU=8.0),
            listed("half", "2", CPU=8.0, GPU=2.0),
            listed("idle", "3", CPU=4.0),
            listed("less", "4", CPU=0.5),
            listed("part", "5", CPU=2.0),
        ]
    )
    free = [{}, {"CPU": 2.5, "GPU": 1.0}, {"CPU": 4.0}, {"CPU": 0.5}, {"CPU": 0.9}]
    left = [free_of(node, each) for node, each in zip(nodes, free, strict=True)]
    assert [(node.cores, node.gpus) for node in left] == [(0, 0), (2.5, 1), (4, 0), (0.5, 0), (0, 0)]
    assert taken(nodes, left, left[1:4]) == [
        "nothing is free on node busy, node part: other work has it, or it has stopped",
        "other work has 5.5 of 8 cores of node half",
        "other work has 1 of 2 GPUs of node half",
    ]
    assert taken(nodes, nodes, nodes) == []


def test_nodes_that_do_not_fit_together() -> None:
    here = Introduction("1.0 with arithmetic 1", "x", "3.11", 10**9)
    others = {
        "a": here,
        "b": replace(here, version="1.1 with arithmetic 1", sources="y"),
        "c": replace(here, python="3.12"),
        "d": replace(here, sources="y"),
        "e": replace(here, sources="y", memory=None),
    }
    assert differing(here, others) == [
        "node b: merge_engine 1.1 with arithmetic 1, but 1.0 with arithmetic 1 on this machine; install the same on "
        "all nodes",
        "node c: Python 3.12, but 3.11 on this machine; install the same on all nodes",
        "nodes d, e: another state of merge_engine 1.0 with arithmetic 1 than on this machine; install the same on all "
        "nodes",
    ]
    few = {"a": here, "b": replace(here, memory=600_000_000), "c": replace(here, memory=None)}
    (line,) = short_of_memory(few, dict.fromkeys("abc", 1), dict.fromkeys("abc", 400_000_000))
    assert line.startswith("node b: has 600.0 MB of memory available, the merge takes 700.0 MB there; ")


@pytest.fixture
def recipe(save_checkpoint: SaveCheckpoint) -> dict[str, Any]:
    states: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for number in range(5):
        base, tuned = quantised_models(64 * 50, 2, torch.float32, seed=number)
        for state, tensor in zip(states, (base, *tuned), strict=True):
            state[f"part_{number}.w"] = tensor.view(64, 50)
            state["steps"] = torch.arange(9)
    del states[2]["part_3.w"]
    folders = [str(save_checkpoint(*each)) for each in zip("oab", states, strict=True)]
    return {
        "merge_method": "breadcrumbs_ties",
        "base_model": folders[0],
        "models": [{"model": folder} for folder in folders[1:]],
        "parameters": {"density": 0.4, "gamma": 0.1, "weight": 0.5, "trim_scope": "model", "ties": "index"},
    }


def test_what_a_node_sees(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Copies will do, whatever their time. Others are found, although size and header are the same."""
    wanted, numbers = wanted_files(me.plan(recipe))
    assert [one.file.path for one in wanted] == [file.path for file in numbers]
    assert differences(wanted, look(wanted, lambda path: path)) == []
    copies = tmp_path / "copies"
    for one in wanted:
        copy = copies / one.file.path.relative_to(tmp_path)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(one.file.path.read_bytes())
        os.utime(copy, (1, 1))
    there = NodePaths.of(me.RayOptions(paths={str(tmp_path): str(copies)}).rules, ()).there
    seen = look(wanted, there)
    assert differences(wanted, seen) == []
    assert [one.file and one.file.path.is_relative_to(copies) for one in seen] == [True] * 3
    a, b, o = (there(one.file.path) for one in wanted)
    data = bytearray(a.read_bytes())
    data[-1] ^= 1
    a.write_bytes(data)
    b.write_bytes(b.read_bytes().replace(b"part_4", b"part_9"))
    o.unlink()
    end = ": model.safetensors; give the node the same files, or say where they are (ray paths)"
    assert differences(wanted, look(wanted, there)) == [
        f"{a.parent}: with other values than here{end}",
        f"{b.parent}: with another header than here{end}",
        f"{o.parent}: not there{end}",
    ]


def test_a_parcel_has_numbers_for_files(recipe: dict[str, Any]) -> None:
    plan = me.plan(recipe)
    wanted, numbers = wanted_files(plan)
    parcel = pack(plan, numbers)
    assert unpack(parcel, list(numbers)).tasks == plan.tasks
    others = [replace(one.file, path=Path("/elsewhere") / one.file.path.name, inode=1) for one in wanted]
    assert set(unpack(parcel, others).files) == set(others)
    assert len(parcel) < len(pickle.dumps(plan))

    class Here(me.Method):  # as in a program or a notebook
        name = "here"

        def solve(self, task: Any, answers: Any) -> Any:
            return 5

    Here.__module__ = "__main__"
    assert unpack(pack(Here(), {}), ()).solve(None, None) == 5


@settings(max_examples=8)
@given(st.integers(2_000, 60_000), st.randoms())
def test_counts_of_parts_in_any_order_and_twice(
    tmp_path_factory: pytest.TempPathFactory, limit: int, random: Any
) -> None:
    """The answers are those of one process, whatever the shards and whoever counts."""
    tmp_path = tmp_path_factory.mktemp("counts")
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    given = recipe_in(tmp_path)
    result = me.run(given, whole, shard_size=limit, backend="cpu", threads=1)

    def shuffled(do: Any, jobs: Any) -> Any:
        jobs = [job for job in jobs for _ in range(random.choice((1, 1, 2)))]
        random.shuffle(jobs)
        done: list[Done[Any]] = [do(pickle.loads(pickle.dumps(job))) for job in jobs]
        return done

    again = merge_in_shards(
        me.plan(given, shard_size=limit),
        pieces,
        shuffled,
        backend=random.choice(("cpu", "reference")),
        threads=1,
    )
    assert again.per_tensor == result.per_tensor and again.counts == result.counts
    assert me.diff(whole, pieces).tensors == []


def test_counts_of_a_device(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    me.run(recipe, tmp_path / "whole", shard_size="20KB", backend="cpu")
    monkeypatch.setattr("merge_engine.engine.jobs.choose_backend", lambda *_: EmulatedCudaBackend())
    merge_in_shards(me.plan(recipe, shard_size="20KB"), tmp_path / "pieces", memory=1_000_000)
    assert me.diff(tmp_path / "whole", tmp_path / "pieces").tensors == []


def recipe_in(folder: Path) -> dict[str, Any]:
    def save(name: str, tensors: Any) -> Path:
        from safetensors.torch import save_file

        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        save_file(tensors, folder / name / "model.safetensors")
        return folder / name

    return recipe.__wrapped__(save)  # type: ignore[attr-defined, no-any-return]
