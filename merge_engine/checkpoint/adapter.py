"""Reading a LoRA adapter of PEFT: its settings, the factors of each module, and tensors that replace the model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merge_engine.checkpoint.layout import WeightFiles, find_weights
from merge_engine.checkpoint.lora_settings import MERGE_FIRST, SETTINGS_FILE, LoraSettings, lora_settings
from merge_engine.checkpoint.source import AdapterFiles, open_weights
from merge_engine.checkpoint.strict_json import read_settings
from merge_engine.errors import CheckpointError
from merge_engine.operands import Operand
from merge_engine.storage import File
from merge_engine.storage.bounded import MAX_CONFIG
from merge_engine.text import some

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_WRAPPER = "base_layer"
_SAVED = "modules_to_save"
_SIDES = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}

MAX_RANK = 1024
"""The largest rank: factors that cannot be mapped are copied by each thread that reads."""


@dataclass
class Factors:
    """The factors of a module: ``a`` [rank, in] and ``b`` [out, rank]. Those of an ``embedding`` make its transpose."""

    a: Operand
    b: Operand
    embedding: bool


@dataclass
class Adapter:
    """An adapter as it is in its files. Names are those of the model that it was trained on.

    ``factors`` are by module. ``replaced`` are tensors that take the place of the model's, with the names that each may
    mean, the likeliest first.
    """

    files: AdapterFiles
    settings: LoraSettings
    factors: dict[str, Factors] = field(default_factory=dict)
    replaced: list[tuple[tuple[str, ...], Operand]] = field(default_factory=list)


def open_adapter(path: Path) -> Adapter:
    """Open the adapter in a folder, or a weight file beside its adapter_config.json. Tensor data is not read.

    Raises ``CheckpointError`` with every problem: files that are missing or damaged, settings that are not supported,
    tensors that are none of a LoRA.
    """
    weights = _find(path)
    file = weights.folder / SETTINGS_FILE
    settings_file = File.of(file) if file.exists() else None
    raw = read_settings(file, MAX_CONFIG)
    if raw is None or settings_file is None:
        raise CheckpointError(
            f"{path}: no LoRA adapter: there is no {SETTINGS_FILE}; name the folder of a PEFT adapter behind the +"
        )
    settings, problems = lora_settings(file, raw)
    opened = open_weights(weights)
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    files = AdapterFiles(weights.path, weights.folder, ((settings_file, digest), *opened.contents))
    if settings is None:
        raise CheckpointError(problems)
    adapter = Adapter(files, settings)
    problems += _sort(adapter, opened.tensors)
    problems += _check_ranks(adapter)
    if problems:
        raise CheckpointError(problems)
    return adapter


def _find(path: Path) -> WeightFiles:
    """The weight file of an adapter, also where a trainer's folder holds others."""
    for name in _WEIGHTS:
        if (path / name).is_file():
            return WeightFiles(path, path, (path / name,))
    return find_weights(path)


def _sort(adapter: Adapter, tensors: Mapping[str, Operand]) -> list[str]:
    """Put every tensor of the adapter's files where it belongs. Returns a line for each kind of problem."""
    sides: dict[str, dict[str, Operand]] = {}
    strange: list[str] = []
    twice: list[str] = []
    magnitudes = False
    for name, operand in tensors.items():
        parts = name.removeprefix(_PREFIX).split(".")
        at = next((i for i in range(len(parts) - 1, -1, -1) if parts[i].startswith("lora_")), None)
        if at is None:
            adapter.replaced.append((_meanings(parts), operand))
            continue
        kind, rest = parts[at], parts[at + 1 :]
        magnitudes |= kind == "lora_magnitude_vector"
        if kind not in _SIDES or not _ends_well(kind, rest):
            strange.append(name)
            continue
        of_module = sides.setdefault(".".join(part for part in parts[:at] if part != _WRAPPER), {})
        if _SIDES[kind] in {_SIDES[known] for known in of_module}:
            twice.append(name)
        of_module[kind] = operand
    path = adapter.files.path
    alone = []
    for module, found in sides.items():
        embedding = "lora_embedding_A" in found
        pair = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if found.keys() == set(pair):
            adapter.factors[module] = Factors(found[pair[0]], found[pair[1]], embedding)
        else:
            alone.append(module)
    problems = []
    if magnitudes:
        problems.append(f"{path}: a DoRA adapter, which cannot be put into a model exactly; {MERGE_FIRST}")
    elif strange:
        problems.append(f"{path}: tensors that are no part of a plain LoRA: {named(strange)}; {MERGE_FIRST}")
    if twice:
        problems.append(f"{path}: two adapters in one file: {named(twice)}; save each in a folder of its own")
    elif alone:
        problems.append(f"{path}: only one of the two factors of {named(alone)}; save the adapter again")
    if not problems and not adapter.factors:
        what = "holds no factors of a LoRA" if tensors else "holds no tensors"
        problems.append(f"{path}: {what}; name the folder of a LoRA adapter behind the +")
    return problems


def _ends_well(kind: str, rest: list[str]) -> bool:
    """Whether this may follow the kind of a factor: an adapter's name, and ``weight`` where it is a module."""
    if kind.startswith("lora_embedding"):
        return len(rest) < 2
    return 1 <= len(rest) < 3 and rest[-1] == "weight"


def _meanings(parts: list[str]) -> tuple[str, ...]:
    """The names that a tensor may mean: behind ``modules_to_save`` there may be the name of an adapter."""
    plain = [part for part in parts if part != _WRAPPER]
    if _SAVED not in plain:
        return (".".join(plain),)
    at = plain.index(_SAVED)
    return ".".join(plain[:at] + plain[at + 1 :]), ".".join(plain[:at] + plain[at + 2 :])


def _check_ranks(adapter: Adapter) -> list[str]:
    """A line for factors that are no matrices of one rank, or of another than the settings say, or too large."""
    path, ranks = adapter.files.path, adapter.settings.ranks
    convolutions, apart, packed, other, large = [], [], [], [], []
    for module, pair in adapter.factors.items():
        a, b = pair.a.shape, pair.b.shape
        if len(a) > 2 or len(b) > 2:
            convolutions.append(module)
        elif len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            apart.append(f"{module} ({list(a)} and {list(b)})")
        elif not (pair.a.dtype.mergeable and pair.b.dtype.mergeable):
            packed.append(f"{module} ({pair.a.dtype})")
        elif a[0] > MAX_RANK:
            large.append(f"{module} ({a[0]})")
        elif a[0] not in ranks:
            other.append(f"{module} ({a[0]})")
    lines = []
    if convolutions:
        lines.append(f"layers other than linear ones and embeddings: {named(convolutions)}; {MERGE_FIRST}")
    if apart:
        lines.append(f"factors that are no matrices of one rank: {named(apart)}; save the adapter again")
    if packed:
        lines.append(
            f"factors that are no floats of 16 to 64 bits: {named(packed)}; convert them to bfloat16"
        )
    if large:
        lines.append(f"ranks above {MAX_RANK}: {named(large)}; {MERGE_FIRST}")
    if other:
        known = some([f"{rank:,}" for rank in sorted(ranks)])
        lines.append(
            f"ranks that {SETTINGS_FILE} does not name ({known}): {named(other)}; correct one of them"
        )
    return [f"{path}: {line}" for line in lines]


def named(names: Iterable[str]) -> str:
    """The first three names for a message, each cut off if it is long, and the number of the others."""
    return some([f"{name:.200}" for name in names], 3)
