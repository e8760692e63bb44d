"""The GPU kernels against the card's own copy rate, and a whole merge against its link to the host.

    bash benchmarks/gpu.sh                        # build, prove, measure: all of it
    python -m benchmarks.gpu [--mergekit PATH]    # the measurements alone

Kernels are timed on bf16 tensors in device memory, whose task vectors have as many ties as real ones. Each rate
counts the bytes that the kernel's own design moves. ``bound`` is the time to read every input and write the output
once at the copy rate, divided by the measured time. Results are written to benchmarks/results/gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import merge_engine as me
from merge_engine.backends import Backend, create_backend
from merge_engine.backends.operations import (
    Chunk,
    Combine,
    Consensus,
    Entry,
    FoundBand,
    KeyColumn,
    Rank,
    RankMask,
)
from merge_engine.bench.checkpoints import Family, weight_bytes
from merge_engine.bench.contestants import METHODS
from merge_engine.bench.machine import describe
from merge_engine.bench.measuring import measure
from merge_engine.dtypes import BF16

RESULTS = Path(__file__).parent / "results"
DENSITY = 0.2
MODELS = (2, 4, 8, 16)
SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
ROUNDS = 9
RAM = Path("/dev/shm")


@dataclass(frozen=True)
class Timing:
    """One kernel, or all of TIES: seconds (median) and the bytes that its design moves."""

    backend: str
    what: str
    models: int
    elements: int
    seconds: float
    nbytes: int
    bound_bytes: int


def timed(device: torch.device, body: Callable[[], object]) -> float:
    """Median seconds of a call on the device, after three to warm up."""
    for _ in range(3):
        body()
    seconds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        body()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(device, lambda: target.copy_(source))


def link_rate(device: torch.device) -> float:
    """Bytes per second from pinned host memory to the device."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(2**28, dtype=torch.uint8, device=device)
    return host.numel() / timed(device, lambda: target.copy_(host, non_blocking=True))


def inputs(models: int, count: int, device: torch.device) -> list[torch.Tensor]:
    """A base and fine-tunes in bf16, as ``merge_engine.bench.checkpoints`` draws them."""
    generator = torch.Generator(device).manual_seed(count + models)
    tensors = []
    for model in range(models + 1):
        tensor = torch.empty(count, dtype=torch.bfloat16, device=device)
        for part, base in zip(tensor.split(2**26), (tensors or [tensor])[0].split(2**26), strict=True):
            draw = torch.empty(part.numel(), device=device)
            if model == 0:
                part.copy_(draw.normal_(0, 0.02, generator=generator))
                continue
            draw.normal_(0, 0.0002, generator=generator)
            draw[torch.rand(part.numel(), device=device, generator=generator) < 0.15] = 0
            part.copy_(base.float() + draw)
        tensors.append(tensor)
    return tensors


def kernels(backend: Backend, models: int, count: int, device: torch.device) -> list[Timing]:
    """Histogram, consensus, combine, and TIES as a whole."""
    tensors = inputs(models, count, device)
    output = torch.empty_like(tensors[0])
    target = backend.tensor(output)
    arrays = [backend.tensor(tensor) for tensor in tensors]
    chunk, no_base = Chunk(arrays, True, BF16, 0, count), Chunk(arrays[1:], False, BF16, 0, count)
    rank = max(1, int(DENSITY * count))

    def histogram() -> Any:
        counts = backend.new_counts(0, [None] * models)
        backend.count(chunk, [KeyColumn(model, model) for model in range(models)], counts)
        return counts

    def masks() -> list[Any]:
        found = backend.find(histogram(), [Rank(model, rank) for model in range(models)])
        bands = [FoundBand(RankMask(1, rank, random_key=model), key) for model, key in enumerate(found)]
        return [solved.mask for solved in backend.bands(bands, BF16)]

    def consensus(kept: list[Any]) -> Any:
        entries = tuple(Entry(mask, 0.5) for mask in kept)
        return backend.consensus(chunk, Consensus(entries, "sum", True), target)

    solved = masks()
    coefficients = Combine((1 / models,) * models)
    read, element = 2 * (models + 1) * count, 2 * count
    work: dict[str, tuple[Callable[[], object], int, int]] = {
        "histogram": (histogram, read, read),
        "consensus": (lambda: consensus(solved), read + element, read + element),
        "ties": (lambda: consensus(masks()), 2 * read + element, read + element),
        "combine": (
            lambda: backend.combine(no_base, coefficients, target),
            read,  # the models and the output: the base takes no part
            read,
        ),
    }
    return [
        Timing(backend.name, what, models, count, timed(device, body), nbytes, bound)
        for what, (body, nbytes, bound) in work.items()
    ]


def end_to_end(size: str, mergekit: Path | None, device: torch.device) -> dict[str, Any]:
    """A TIES merge of a base and two fine-tunes from RAM to RAM, and the device memory that it took."""
    root = Path(tempfile.mkdtemp(dir=RAM, prefix="merge_engine_gpu_"))
    try:
        base, tuned = Family(root, size).make(2, distinct=1)
        setting = METHODS["ties"]
        recipe = {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [{"model": str(model), "parameters": setting.model} for model in tuned],
            "parameters": setting.merge,
            "dtype": "bfloat16",
        }
        result: dict[str, Any] = {"size": size, "bytes_up": sum(weight_bytes(f) for f in (base, *tuned))}
        seconds = []
        for _ in range(3):
            with _DeviceMemory(device) as memory:
                start = time.perf_counter()
                me.run(recipe, root / "out", device=str(device), overwrite=True)
                seconds.append(time.perf_counter() - start)
        result |= {"seconds": statistics.median(seconds), "device_bytes": memory.peak}
        digests = {device: _digest(root / "out")}
        me.run(recipe, root / "out", device="cpu", overwrite=True)
        digests["cpu"] = _digest(root / "out")
        result["same_bytes_as_cpu"] = len(set(digests.values())) == 1
        if mergekit is not None:
            shutil.rmtree(root / "out")
            (root / "recipe.yaml").write_text(json.dumps(recipe))
            command = [str(mergekit), str(root / "recipe.yaml"), str(root / "out"), "--cuda"]
            result["mergekit_seconds"] = measure(command, root / "out").seconds
        return result
    finally:
        shutil.rmtree(root)


def _digest(folder: Path) -> str:
    return str(json.loads((folder / "merge_manifest.json").read_text())["digest"])


class _DeviceMemory:
    """The most device memory that was taken since the start, by looking every few milliseconds."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stop = threading.Event()
        self.peak = 0

    def __enter__(self) -> _DeviceMemory:
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


def table(timings: list[Timing], copy: float) -> str:
    """A row for each backend, kernel and number of models; percent of the copy rate by size."""
    sizes = sorted({timing.elements for timing in timings})
    lines = [
        "| backend | kernel | models | " + " | ".join(f"{size:.0e}" for size in sizes) + " | bound |",
        "| --- | --- | ---: |" + " ---: |" * (len(sizes) + 1),
    ]
    rows: dict[tuple[str, str, int], dict[int, Timing]] = {}
    for timing in timings:
        rows.setdefault((timing.backend, timing.what, timing.models), {})[timing.elements] = timing
    for (backend, what, models), row in rows.items():
        cells = [f"{t.nbytes / t.seconds / copy:.0%}" if (t := row.get(size)) else "" for size in sizes]
        last = row[max(row)]
        bound = last.seconds * copy / last.bound_bytes
        lines.append(f"| {backend} | {what} | {models} | {' | '.join(cells)} | {bound:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--size", default="7b", help="shape of the merge from RAM")
    parser.add_argument("--elements", type=int, default=max(SIZES), help="the largest tensor")
    parser.add_argument("--mergekit", type=Path, help="path of mergekit-yaml")
    options = parser.parse_args()
    device = torch.device("cuda:0")
    copy, link = copy_rate(device), link_rate(device)
    timings: list[Timing] = []
    for name in options.backends.split(","):
        backend = create_backend(name)
        for count in (size for size in SIZES if size <= options.elements):
            for models in MODELS:
                if 2 * count * (models + 2) < 0.8 * torch.cuda.mem_get_info(device)[0]:
                    timings += kernels(backend, models, count, device)
    merge = end_to_end(options.size, options.mergekit, device)
    merge["of_link"] = merge["bytes_up"] / merge["seconds"] / link
    properties = torch.cuda.get_device_properties(device)
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {"name": properties.name, "cuda": torch.version.cuda, "memory": properties.total_memory},
        **describe({"ram": RAM}, options.mergekit),
        "copy_bytes_per_second": copy,
        "link_bytes_per_second": link,
        "kernels": [asdict(timing) for timing in timings],
        "merge": merge,
    }
    (RESULTS / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        f"# {properties.name}",
        "",
        f"{document['date']}, copy {copy / 1e9:,.0f} GB/s, link {link / 1e9:,.1f} GB/s. Percent of the copy rate by "
        "own bytes, and times the one-read bound for the largest size. `bash benchmarks/gpu.sh`",
        "",
        table(timings, copy),
        "",
        f"TIES, {merge['size']}, from RAM to RAM: {merge['seconds']:.2f} s, {merge['of_link']:.0%} of the link, "
        f"{merge['device_bytes'] / 2**20:,.0f} MiB of device memory, same bytes as the CPU: "
        f"{merge['same_bytes_as_cpu']}"
        + (f"; mergekit --cuda: {merge['mergekit_seconds']:.1f} s." if "mergekit_seconds" in merge else "."),
        "",
    ]
    (RESULTS / "gpu.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
