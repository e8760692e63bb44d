"""One input under examination, with the small files beside its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_engine.checkpoint import Checkpoint, read_settings
from merge_engine.errors import CheckpointError
from merge_engine.fit.findings import Findings
from merge_engine.storage.bounded import MAX_CONFIG, MAX_TOKENIZER, read_bounded
from merge_engine.text import without_common_folder

_LONG = 40
"""Labels up to this many characters are shown as the user wrote them."""


@dataclass
class Candidate:
    """One input. ``label`` names it in messages.

    Its files are read on first use. One that cannot be read gives a warning, and counts as missing: the input may
    need none of it.
    """

    label: str
    checkpoint: Checkpoint
    findings: Findings
    _settings: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json; empty if there is none."""
        return self.checkpoint.config

    def path(self, name: str) -> Path:
        """The file of this name beside the weights."""
        return self.checkpoint.folder / name

    def settings(self, name: str) -> Mapping[str, Any] | None:
        """The JSON object in a file of at most 10 MB; None without one."""
        if name not in self._settings:
            try:
                self._settings[name] = read_settings(self.path(name), MAX_CONFIG)
            except CheckpointError as error:
                self._settings[name] = None
                self.not_compared(str(error))
        return self._settings[name]

    def read(self, name: str) -> bytes | None:
        """The bytes of a file of at most 100 MB; None without one."""
        path = self.path(name)
        try:
            return read_bounded(path, MAX_TOKENIZER)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.not_compared(f"{path}: cannot be read: {error.strerror}")
            return None

    def not_compared(self, reason: str) -> None:
        """Warn that one of its files could not be compared with those of other inputs."""
        self.findings.warnings.append(f"{reason}; not compared with the other models")


def short_labels(names: Sequence[str]) -> list[str]:
    """The names for messages: as they are or, if one is long, without the folders that all begin with."""
    if len(set(names)) < 2 or all(len(name) <= _LONG for name in names):
        return list(names)
    return without_common_folder(names)


def shown(value: Any) -> str:
    """A value of a JSON file for a message; None is "none"."""
    if value is None:
        return "none"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def labels(candidates: Iterable[Candidate]) -> str:
    """The labels of some inputs, each once, separated by commas."""
    return ", ".join(dict.fromkeys(each.label for each in candidates))


def by_value(values: Iterable[tuple[Candidate, Any]], show: Callable[[Any], str] = shown) -> str:
    """Which inputs have which value: ``4096 in models/base, 2048 in models/a, models/b``."""
    owners: dict[str, list[Candidate]] = {}
    texts = {}
    for candidate, value in values:
        key = repr(value)  # a long value is shown in part
        texts[key] = show(value)
        owners.setdefault(key, []).append(candidate)
    return ", ".join(f"{texts[key]} in {labels(having)}" for key, having in owners.items())
