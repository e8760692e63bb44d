"""The Python files of a model that has code of its own. They are found, and never run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from merge_engine.checkpoint.strict_json import parse_json
from merge_engine.errors import CheckpointError, way_out
from merge_engine.storage.bounded import MAX_CONFIG, MAX_TOKENIZER, read_bounded

# The files in which transformers and sentence-transformers look for the classes of a model's own code.
_NAMING_CODE = (
    "config.json",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
# As in "modeling_x.XModel". The code of "owner/name--modeling_x.XModel" is in another repository.
_CLASS = re.compile(r"(\w+)\.\w+")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.\s*(?:import\s+([\w, ]+)|(\w+)\s+import)", re.MULTILINE)


def code_files(folder: Path, present: Mapping[str, Path]) -> set[str]:
    """The names of the Python files that the settings of a model name, and of those that these import.

    ``present`` are the files of the model by name. Raises ``CheckpointError`` for settings or code that cannot be read.
    """
    waiting = [
        name
        for settings in _NAMING_CODE
        if settings in present
        for name in _named_in(_parsed(present[settings]))
    ]
    found: set[str] = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        file = folder / name
        if name in found or not (file.is_file() or file.is_symlink()):
            continue
        found.add(name)
        if file.is_file():
            code = _read(file, MAX_CONFIG).decode(errors="replace")
            for several, one in _RELATIVE_IMPORT.findall(code):
                waiting += [module.strip() for module in several.split(",")] if several else [one]
    return found


def module_folders(folder: Path, present: Mapping[str, Path]) -> list[str]:
    """The subfolders that modules.json of sentence-transformers names, such as ``1_Pooling``."""
    modules = _parsed(present["modules.json"]) if "modules.json" in present else []
    if not isinstance(modules, list):
        return []
    paths = {str(module.get("path")) for module in modules if isinstance(module, dict)}
    return sorted(entry.name for entry in folder.iterdir() if entry.name in paths and entry.is_dir())


def _named_in(settings: object) -> Iterator[str]:
    """The modules of the classes under ``auto_map``, and of the types of sentence-transformers' modules."""
    if isinstance(settings, list):
        named = [module.get("type") for module in settings if isinstance(module, dict)]
    elif isinstance(settings, dict) and isinstance(settings.get("auto_map"), dict):
        named = list(settings["auto_map"].values())
    else:
        return
    for one in named:
        for text in one if isinstance(one, list) else (one,):
            if isinstance(text, str) and (found := _CLASS.fullmatch(text)):
                yield found[1]


def _parsed(file: Path) -> object:
    raw = _read(file, MAX_TOKENIZER)
    try:
        return parse_json(raw, repeated=True)
    except ValueError as error:
        raise CheckpointError(f"{file}: no valid JSON: {error}") from None


def _read(file: Path, limit: int) -> bytes:
    try:
        return read_bounded(file, limit)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}{way_out(error)}") from error
