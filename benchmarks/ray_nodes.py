"""A merge on nodes of one core each: what a second node brings, what Ray costs, and how a large plan is handed out.

    python -m benchmarks.ray_nodes [--folder /dev/shm/ray_nodes] [--size 0.5b] [--rounds 5]

Starts two clusters on this machine, one of one node and one of two nodes, each with one core. TIES with slack is merged
in turns: in this process on one core, on one node, on two. Inputs and output are on a RAM disk. Times are medians.
Before that, a merge of 70B is planned from headers in sparse files, and all its jobs are made and packed. Needs Ray,
and two cores that do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import merge_engine as me
from merge_engine.bench.checkpoints import Family, weight_bytes
from merge_engine.bench.shapes import Architecture
from merge_engine.checkpoint import DEFAULT_SHARD_SIZE, OutputTensor, plan_shards
from merge_engine.checkpoint.layout import INDEX_FILE
from merge_engine.distributed.looking import look, wanted_files
from merge_engine.distributed.parcels import pack, unpack
from merge_engine.distributed.placing import choose
from merge_engine.dtypes import BF16
from merge_engine.engine.shards import ShardJob
from merge_engine.inspect.verify import verify
from merge_engine.observe.recorded import read_manifest

SHARDS = 12
LLAMA_70B = Architecture("llama", 8192, 28672, layers=80, heads=64, kv_heads=8, vocabulary=128256)
NODES = 16
SMALL: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/ray_nodes"))
    parser.add_argument("--size", default="0.5b")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    try:
        plan_70b(options.folder / "70b")
        nodes(options.folder, options.size, options.rounds)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


def nodes(folder: Path, size: str, rounds: int) -> None:
    """One node against two, and both against a merge in this process."""
    base, tuned = Family(folder, size).make(2)
    recipe = merging("ties", base, tuned, density=0.2, sign_slack=[0, 2], weight=0.5)
    limit = weight_bytes(base) // SHARDS
    with cluster(1) as one, cluster(2) as two:
        ways: dict[str, dict[str, Any]] = {
            "this process": {},
            "one node": {"engine": "ray", "ray": one},
            "two nodes": {"engine": "ray", "ray": two},
        }
        whole: dict[str, list[float]] = {way: [] for way in ways}
        alone: dict[str, list[float]] = {way: [] for way in ways}
        digests = set()
        for _ in range(rounds):
            for way, arguments in ways.items():
                output = folder / "merged"
                shutil.rmtree(output, ignore_errors=True)
                start = time.perf_counter()
                with pinned(0) if way == "this process" else nullcontext():
                    result = me.run(recipe, output, shard_size=limit, device="cpu", **arguments)
                whole[way].append(time.perf_counter() - start)
                alone[way].append(result.ledger.seconds)
                digests.add(read_manifest(output).digest)
    assert len(digests) == 1 and verify(output).complete
    for way in ways:
        print(
            f"{way}: {statistics.median(whole[way]):.2f} s, the merge alone {statistics.median(alone[way]):.2f} s"
        )
    print(f"two nodes, the merge alone: {ratio(alone['one node'], alone['two nodes']):.2f} times one node")
    more = statistics.median(a - b for a, b in zip(whole["one node"], whole["this process"], strict=True))
    print(f"Ray costs {more:.2f} s: connecting, starting a worker, ending")


def ratio(slower: list[float], faster: list[float]) -> float:
    """The median of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def plan_70b(folder: Path) -> None:
    """Plan from headers, look at the inputs, and make, place, pack and unpack the jobs of all shards."""
    base, *tuned = (write_headers(folder / name) for name in ("base", "a", "b"))
    taken: dict[str, float] = {}

    def timed(name: str, do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = do()
        taken[name] = time.perf_counter() - start
        return result

    recipe = merging("ties", base, tuned, density=0.2, weight=0.5, trim_scope="model")
    plan = timed("plan", lambda: me.plan(recipe))
    wanted, numbers = wanted_files(plan)
    seen = timed("look", lambda: look(wanted, lambda path: path))
    files = [one.file for one in seen if one.file is not None]

    def hand_out() -> int:
        jobs = [ShardJob(plan=plan.only(number), drafts=folder) for number in range(len(plan.shards))]
        waiting = {number: job.nbytes for number, job in enumerate(jobs)}
        held = {node: [0.0] * len(jobs) for node in range(NODES)}
        total = 0
        while waiting:
            for node in range(min(NODES, len(waiting))):
                number = choose(waiting, node, held)
                del waiting[number]
                parcel = pack(jobs[number], numbers)
                unpack(parcel, files)
                total += len(parcel)
        return total

    nbytes = timed("hand out", hand_out)
    parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items())
    shards = len(plan.shards)
    print(f"70B: {len(files)} input files, {shards} shards, {nbytes / 1e6:.1f} MB of jobs: {parts}")
    print(f"70B, planned and handed out: {sum(taken.values()):.2f} s")


def write_headers(folder: Path) -> Path:
    """A checkpoint of 70B whose weights take no room: real headers in sparse files.

    Each tensor begins with bytes of its own, or else a plan would take all for copies and read them whole.
    """
    folder.mkdir(parents=True)
    tensors = [OutputTensor(name, BF16, shape) for name, shape in LLAMA_70B.tensors().items()]
    shards = plan_shards(tensors, DEFAULT_SHARD_SIZE)
    for shard in shards:
        with (folder / shard.name).open("xb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
            for tensor in shard.tensors.values():
                file.seek(tensor.start)
                file.write(random.randbytes(64))
    places = {name: shard.name for shard in shards for name in shard.tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(LLAMA_70B.config()))
    return folder


def merging(method: str, base: Path, tuned: list[Path], **parameters: Any) -> dict[str, Any]:
    """A recipe."""
    models = [{"model": str(each)} for each in tuned]
    return {"merge_method": method, "base_model": str(base), "models": models, "parameters": parameters}


@contextmanager
def cluster(count: int) -> Iterator[str]:
    """The address of a cluster of so many nodes."""
    from ray.cluster_utils import Cluster

    with pinned(0):
        started = Cluster(initialize_head=True, head_node_args=SMALL)
    try:
        for core in range(1, count):
            with pinned(core):
                started.add_node(**SMALL)
        yield started.address
    finally:
        started.shutdown()


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Let this process, and those that it starts, run on one core of the machine."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[core]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    main()
