"""Whole merges from RAM to RAM: the GPU beside the CPU of the same machine, and beside the link.

    python -m benchmarks.gpu_merges [--shapes 3b,7b] [--methods ties,linear,della]

The checkpoints and the output are in /dev/shm: three times the model's size, and once more for the output. Both devices
merge in turns. Prints a line for each merge, and writes benchmarks/results/gpu_merges.json and .md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import merge_engine as me
from benchmarks.gpu_kernels import RESULTS, described, timed
from merge_engine.bench.checkpoints import Family
from merge_engine.bench.contestants import Merge

RAM = Path("/dev/shm")
ROUNDS = 3


@dataclass(frozen=True)
class Outcome:
    """Merges of one model by one method: medians of seconds, and the most device memory that was taken."""

    shape: str
    method: str
    nbytes: int
    gpu_seconds: float
    cpu_seconds: float
    device_bytes: int
    same_bytes: bool


def link_rate(device: torch.device) -> float:
    """Bytes per second from pinned host memory to the device."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**28, dtype=torch.uint8, device=device)
    return host.numel() / timed(device, lambda: target.copy_(host, non_blocking=True))


def merges(shape: str, methods: list[str], device: str) -> list[Outcome]:
    """Merge a base and two fine-tunes of a shape on the device and on the CPU, in turns."""
    root = Path(tempfile.mkdtemp(dir=RAM, prefix="merge_engine_gpu_"))
    try:
        base, tuned = Family(root, shape).make(2)
        outcomes = []
        for method in methods:
            merge = Merge(method, base, tuple(tuned))
            on_gpu: list[float] = []
            on_cpu: list[float] = []
            digests = set()
            taken = 0
            for _ in range(ROUNDS):
                for name, seconds in ((device, on_gpu), ("cpu", on_cpu)):
                    with DeviceMemory(torch.device(device)) as memory:
                        start = time.perf_counter()
                        me.run(merge.recipe(), root / "out", device=name, overwrite=True)
                        seconds.append(time.perf_counter() - start)
                    taken = max(taken, memory.peak if seconds is on_gpu else 0)
                    digests.add(_digest(root / "out"))
            outcome = Outcome(
                shape,
                method,
                merge.bytes_read,
                statistics.median(on_gpu),
                statistics.median(on_cpu),
                taken,
                len(digests) == 1,
            )
            print(_told(outcome), flush=True)
            outcomes.append(outcome)
        return outcomes
    finally:
        shutil.rmtree(root)


def _told(outcome: Outcome) -> str:
    return (
        f"{outcome.shape} {outcome.method}: GPU {outcome.gpu_seconds:.2f} s, CPU {outcome.cpu_seconds:.2f} s, "
        f"{outcome.device_bytes / 2**20:,.0f} MiB of device memory, same bytes: {outcome.same_bytes}"
    )


def _digest(folder: Path) -> str:
    return str(json.loads((folder / "merge_manifest.json").read_text())["digest"])


class DeviceMemory:
    """The most device memory that was taken since the start, by looking every few milliseconds."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stop = threading.Event()
        self.peak = 0

    def __enter__(self) -> DeviceMemory:
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info(self._device)

        def watch() -> None:
            while not self._stop.wait(0.005):
                self.peak = max(self.peak, before - torch.cuda.mem_get_info(self._device)[0])

        self._thread = threading.Thread(target=watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def table(outcomes: list[Outcome], link: float) -> str:
    """A row for each merge."""
    lines = [
        "| shape | method | GPU, s | CPU, s | times as fast | of the link | device memory, MiB | same bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in outcomes:
        cells = [
            one.shape,
            one.method,
            f"{one.gpu_seconds:.2f}",
            f"{one.cpu_seconds:.2f}",
            f"{one.cpu_seconds / one.gpu_seconds:.2f}",
            f"{one.nbytes / one.gpu_seconds / link:.0%}",
            f"{one.device_bytes / 2**20:,.0f}",
            "yes" if one.same_bytes else "NO",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="3b,7b")
    parser.add_argument("--methods", default="ties,linear,della")
    options = parser.parse_args()
    device = torch.device("cuda:0")
    link = link_rate(device)
    print(f"link {link / 1e9:,.1f} GB/s", flush=True)
    outcomes: list[Outcome] = []
    for shape in options.shapes.split(","):
        outcomes += merges(shape, options.methods.split(","), str(device))
        _write(outcomes, link, device)
    print(table(outcomes, link))


def _write(outcomes: list[Outcome], link: float, device: torch.device) -> None:
    document = {
        **described(device, {"ram": RAM}),
        "link_bytes_per_second": link,
        "merges": [asdict(outcome) for outcome in outcomes],
    }
    (RESULTS / "gpu_merges.json").write_text(json.dumps(document, indent=1) + "\n")
    machine = document["machine"]
    lines = [
        f"# Merges from RAM to RAM on {document['device']['name']}, {machine['cores']} cores of {machine['cpu']}",
        "",
        f"{document['date']}, link {link / 1e9:,.1f} GB/s; a base and two fine-tunes.",
        "`python -m benchmarks.gpu_merges`",
        "",
        table(outcomes, link),
        "",
    ]
    (RESULTS / "gpu_merges.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
