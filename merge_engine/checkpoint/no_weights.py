"""Why a path that people name is no checkpoint, and what to name instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from merge_engine.text import some

_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".tflite": "TensorFlow Lite",
    ".ckpt": "a checkpoint of a training run",
    ".npz": "NumPy",
    ".nemo": "NeMo",
    ".mlmodel": "Core ML",
}
_CONVERT = "is not supported; convert it to safetensors, or name a model that has them"
_META = re.compile(r"consolidated\.\d+\.pth")
_DEEPSPEED = re.compile(r"(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_\w*states\.pt")
_CACHE_FOLDER = re.compile(r"models--(.+)")


def why_no_weight_file(file: Path) -> str:
    """What is wrong with a file of another suffix than weight files have, and the way out."""
    if kind := _OTHER_FORMATS.get(file.suffix.lower()):
        return f"{kind} {_CONVERT}"
    if file.name.endswith(".index.json"):
        return "an index, not a weight file; name its folder"
    return "not a weight file; name a folder, or a .safetensors, .bin, .pt or .pth file"


def which_of(files: Sequence[str]) -> str:
    """What to do with a folder that has several weight files and no index."""
    if all(_META.fullmatch(name) for name in files):
        return f"it holds {some(files)}: Meta's format of several parts {_CONVERT}"
    return f"it holds {some(files)} and no index; name the file to read, not the folder"


def why_no_weights(folder: Path, files: list[str]) -> str:
    """What a folder without weights is instead, and the way out. ``files`` are the names of its files."""
    if snapshots := _folders(folder / "snapshots"):
        hub_name = f", or write {_hub_name(folder.name)}" if _CACHE_FOLDER.fullmatch(folder.name) else ""
        paths = [f"snapshots/{name}" for name in snapshots]
        return f"a folder of the hub's cache, not a model; name one of its snapshots, {some(paths)}{hub_name}"
    others = [name for name in files if Path(name).suffix.lower() in _OTHER_FORMATS]
    if others:
        return f"it holds {some(others)}: {_OTHER_FORMATS[Path(others[0]).suffix.lower()]} {_CONVERT}"
    if cached := [name for name in _folders(folder) if _CACHE_FOLDER.fullmatch(name)]:
        return f"the hub's cache, not a model; write the name of one in it, such as {_hub_name(cached[0])}"
    if any(name.endswith(".distcp") for name in files + _files_below(folder)):
        return "a checkpoint of FSDP in parts; join them first (accelerate merge-weights) and name the result"
    if any(_DEEPSPEED.fullmatch(name) for name in files + _files_below(folder)):
        return "a checkpoint of DeepSpeed in parts; join them first (its zero_to_fp32.py) and name the result"
    inner = [name for name in _folders(folder) if _holds_weights(folder / name)]
    if inner:
        return f"no weights in it, but in its subfolder {some(inner)}; name the one that is meant"
    if "config.json" in files:
        return "it holds a config.json, but its weights were not downloaded; download the whole model"
    return (
        "no weights in it: looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
        "pytorch_model.bin.index.json, or a single .safetensors, .bin, .pt or .pth file"
    )


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _files_below(folder: Path) -> list[str]:
    """The names of the files in its subfolders."""
    return [entry.name for name in _folders(folder) for entry in (folder / name).iterdir()]


def _hub_name(cached: str) -> str:
    return cached.removeprefix("models--").replace("--", "/", 1)


def _holds_weights(folder: Path) -> bool:
    return any(
        entry.name.endswith((".safetensors", ".safetensors.index.json"))
        or entry.name.startswith("pytorch_model")
        for entry in folder.iterdir()
    )
