"""The GPU kernels against the card's own copy rate.

    python -m benchmarks.gpu_kernels [--backends cuda,triton] [--elements 1000000000]

Kernels are timed on bf16 tensors in device memory, whose task vectors have as many ties as real ones. Each rate counts
the bytes that the kernel's own design moves. ``bound`` is the time, divided by that of reading every input and writing
the output once at the copy rate. Prints a line for each measurement, and writes benchmarks/results/gpu_kernels.json
and gpu_kernels.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from merge_engine.backends import Backend, create_backend
from merge_engine.backends.operations import (
    Chunk,
    Combine,
    Consensus,
    Draw,
    Entry,
    FoundBand,
    KeyColumn,
    Line,
    Rank,
    Ranked,
    RankMask,
    Sought,
)
from merge_engine.bench.machine import describe
from merge_engine.dtypes import BF16

RESULTS = Path(__file__).parent / "results"
DENSITY = 0.2
MODELS = (2, 4, 8, 16)
SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
ROUNDS = 9
LINE = 4096
"""Elements of a line in which DELLA ranks."""


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


def inputs(models: int, count: int, device: torch.device) -> list[torch.Tensor]:
    """A base and fine-tunes in bf16, as ``merge_engine.bench.checkpoints`` draws them."""
    generator = torch.Generator(device).manual_seed(count + models)
    tensors: list[torch.Tensor] = []
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


def kernels(
    backend: Backend, tensors: list[torch.Tensor]
) -> dict[str, tuple[Callable[[], object], int, int]]:
    """What is timed on a base and models: the call, the bytes that it moves, and those of one read and write."""
    models, count = len(tensors) - 1, tensors[0].numel()
    output = torch.empty_like(tensors[0])
    target = backend.tensor(output)
    arrays = [backend.tensor(tensor) for tensor in tensors]
    chunk, no_base = Chunk(arrays, True, BF16, 0, count), Chunk(arrays[1:], False, BF16, 0, count)
    in_lines = count // LINE * LINE
    lined = [backend.tensor(tensor[:in_lines]) for tensor in tensors]
    lines = Chunk(lined, True, BF16, 0, in_lines, Line.of((count // LINE, LINE)))
    rank = max(1, int(DENSITY * count))

    def histogram() -> Any:
        counts = backend.new_counts(0, [None] * models)
        backend.count(chunk, [KeyColumn(model, model) for model in range(models)], counts)
        return backend.find(counts, [Rank(model, rank) for model in range(models)])

    def ranks() -> list[Any]:
        return [
            key for [key] in backend.find_all(chunk, 0, [Sought(model, (rank,)) for model in range(models)])
        ]

    def bands() -> list[Any]:
        asked = [FoundBand(RankMask(1, rank, random_key=model), key) for model, key in enumerate(ranks())]
        return [solved.mask for solved in backend.bands(asked, BF16)]

    def consensus(masks: list[Any], over: Chunk = chunk, election: str = "sum", **options: float) -> Any:
        entries = tuple(Entry(mask, 0.5, **options) for mask in masks)
        where = target if over is chunk else backend.tensor(output[: over.count])
        return backend.consensus(over, Consensus(entries, election, True), where)

    solved = bands()
    drawn = [Draw(int(DENSITY * 2**32), model) for model in range(models)]
    ranked = [Ranked(DENSITY, 0.1, False, model) for model in range(models)]
    read, element = 2 * (models + 1) * count, 2 * count
    work: dict[str, tuple[Callable[[], object], int, int]] = {
        "histogram": (histogram, read, read),
        "ranks": (ranks, read, read),
        "consensus": (lambda: consensus(solved), read + element, read + element),
        "consensus, slack": (lambda: consensus(solved, vote_slack=0.5), read + element, read + element),
        "dare": (lambda: consensus(drawn, election="none", rescale=5.0), read + element, read + element),
        "ties": (lambda: consensus(bands()), 2 * read + element, read + element),
        "norms": (lambda: backend.l1_norms(chunk, solved, False), read, read),
        # The models and the output: the base takes no part.
        "combine": (lambda: backend.combine(no_base, Combine((1 / models,) * models), target), read, read),
    }
    if lines.count:  # thresholds of four bytes are written and read
        moved = 2 * read + element + 8 * models * count
        work["della"] = (lambda: consensus(ranked, lines), moved, read + element)
    return work


def measured(backend: Backend, models: int, count: int, device: torch.device) -> list[Timing]:
    """All kernels on so many models and elements."""
    work = kernels(backend, inputs(models, count, device))
    return [
        Timing(backend.name, what, models, count, timed(device, body), nbytes, bound)
        for what, (body, nbytes, bound) in work.items()
    ]


def table(timings: list[Timing], copy: float) -> str:
    """A row for each backend, kernel and number of models; percent of the copy rate by size."""
    sizes = sorted({timing.elements for timing in timings})
    lines = [
        f"| backend | kernel | models | us, {sizes[0]:.0e} | "
        + " | ".join(f"{size:.0e}" for size in sizes)
        + " | bound |",
        "| --- | --- | ---: |" + " ---: |" * (len(sizes) + 2),
    ]
    rows: dict[tuple[str, str, int], dict[int, Timing]] = {}
    for timing in timings:
        rows.setdefault((timing.backend, timing.what, timing.models), {})[timing.elements] = timing
    for (backend, what, models), row in rows.items():
        cells = [f"{t.nbytes / t.seconds / copy:.0%}" if (t := row.get(size)) else "" for size in sizes]
        first, last = row.get(sizes[0]), row[max(row)]
        bound = last.seconds * copy / last.bound_bytes
        smallest = f"{first.seconds * 1e6:.0f}" if first else ""
        lines.append(f"| {backend} | {what} | {models} | {smallest} | {' | '.join(cells)} | {bound:.2f} x |")
    return "\n".join(lines)


def described(device: torch.device, folders: dict[str, Path]) -> dict[str, Any]:
    """Date, device, machine and versions of a measurement, whose files are in ``folders``, by their use."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {"name": properties.name, "cuda": torch.version.cuda, "memory": properties.total_memory},
        **describe(folders, None),
    }


def write(timings: list[Timing], copy: float, device: torch.device) -> None:
    """Write what was measured so far."""
    document = {
        **described(device, {}),
        "copy_bytes_per_second": copy,
        "kernels": [asdict(timing) for timing in timings],
    }
    (RESULTS / "gpu_kernels.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        f"# Kernels on {document['device']['name']}",
        "",
        f"{document['date']}, copy {copy / 1e9:,.0f} GB/s. Percent of the copy rate by own bytes, and times the",
        "one-read bound for the largest size. `python -m benchmarks.gpu_kernels`",
        "",
        table(timings, copy),
        "",
    ]
    (RESULTS / "gpu_kernels.md").write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--elements", type=int, default=max(SIZES), help="the largest tensor")
    options = parser.parse_args()
    device = torch.device("cuda:0")
    copy = copy_rate(device)
    print(f"copy {copy / 1e9:,.0f} GB/s", flush=True)
    timings: list[Timing] = []
    for name in options.backends.split(","):
        backend = create_backend(name)
        for models in MODELS:
            for count in (size for size in SIZES if size <= options.elements):
                if 2 * count * (models + 2) > 0.8 * torch.cuda.mem_get_info(device)[0]:
                    print(
                        f"{name}, {models} models of {count:.0e} elements: the device is too small",
                        flush=True,
                    )
                    continue
                new = measured(backend, models, count, device)
                timings += new
                rates = ", ".join(f"{t.what} {t.nbytes / t.seconds / copy:.0%}" for t in new)
                print(f"{name}, {models} models, {count:.0e}: {rates}", flush=True)
                write(timings, copy, device)
    print(table(timings, copy))


if __name__ == "__main__":
    main()
