"""The settings of a LoRA adapter, adapter_config.json of PEFT: what scales its factors, and what is not supported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_engine.text import shown, some

SETTINGS_FILE = "adapter_config.json"
MERGE_FIRST = "merge it into its model with PEFT (merge_and_unload) and name the result"

_NOT_EXACT = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "lora_bias": "biases of the factors",
    "megatron_config": "Megatron's layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "factors of parameters",
    "trainable_token_indices": "single tokens that were trained",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
"""Keys that make the adapter something else than a product of two factors, and what that is."""

_LEAVES_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations of the factors. All others change the weights of the base too, so that the adapter fits no other."""

_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True)
class LoraSettings:
    """What a valid adapter_config.json says.

    ``alphas`` are in order, by the end of a module's name or, behind a "^", by the whole name: the first that fits
    counts. ``ranks`` are all ranks that the file names. ``targets`` (ends of names) and ``layers`` say which modules
    have factors; None is all. ``base`` is the name of the model that it was trained on.
    """

    alpha: float
    alphas: Mapping[str, tuple[int, float]]
    ranks: frozenset[int]
    rank_stabilized: bool
    fan_in_fan_out: bool
    targets: frozenset[str] | None
    layers: frozenset[int] | None
    layers_patterns: frozenset[str]
    base: str | None

    def scale(self, module: str, rank: int) -> float:
        """The number that the product of a module's factors is multiplied by: alpha / r, or alpha / sqrt(r)."""
        keys = (f"^{module}", *_ends(module))
        _, alpha = min((self.alphas[key] for key in keys if key in self.alphas), default=(0, self.alpha))
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def has_factors(self, module: str) -> bool:
        """Whether the settings give a module factors."""
        if self.targets is not None and self.targets.isdisjoint(_ends(module)):
            return False
        return self.layers is None or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        """The last whole number behind one of the patterns, or behind any name that has another before it."""
        parts = module.split(".")
        for at in range(len(parts) - 2, 1 if not self.layers_patterns else 0, -1):
            known = not self.layers_patterns or parts[at - 1] in self.layers_patterns
            if known and parts[at].isdecimal() and len(parts[at]) < 10:
                return int(parts[at])
        return None


def lora_settings(file: Path, raw: Mapping[str, Any]) -> tuple[LoraSettings | None, list[str]]:
    """The settings in a JSON object, or a line for each problem. ``file`` is named in the lines."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        what = "has no peft_type" if kind is None else f"an adapter of the type {shown(kind)}"
        return None, [f"{file}: {what}, and only LORA can be put into a model; {MERGE_FIRST}"]
    problems = [
        f"{file}: {what} ({key}) cannot be put into a model exactly; {MERGE_FIRST}"
        for key, what in _NOT_EXACT.items()
        if raw.get(key)
    ]
    start = raw.get("init_lora_weights")
    if not any(start is known or start == known for known in _LEAVES_THE_BASE):
        problems.append(
            f"{file}: init_lora_weights {shown(start)} changes the weights of the model before the training, so the "
            f"adapter belongs to other weights; convert it to plain LoRA, or {MERGE_FIRST}"
        )
    read = _Reader(file, raw, problems)
    alphas: dict[str, tuple[int, float]] = {}
    for place, (key, number) in enumerate(read.numbers("alpha_pattern").items()):
        alphas.setdefault(key.replace("\\.", "."), (place, number))
    if strange := [key for key in alphas if not _NAME.fullmatch(key.removeprefix("^"))]:
        problems.append(
            f"{file}: alpha_pattern has regular expressions, which are not evaluated: {some(strange)}; write names of "
            "modules"
        )
    settings = LoraSettings(
        alpha=read.number("lora_alpha", 8.0),
        alphas=alphas,
        ranks=frozenset(map(int, (read.number("r", 8.0), *read.numbers("rank_pattern").values()))),
        rank_stabilized=bool(raw.get("use_rslora")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        targets=read.names("target_modules"),
        layers=read.layers(),
        layers_patterns=read.names("layers_pattern", texts=True) or frozenset(),
        base=base if isinstance(base := raw.get("base_model_name_or_path"), str) else None,
    )
    return (None if problems else settings), problems


def _ends(module: str) -> Iterator[str]:
    """A module's name, and what follows each of its dots."""
    parts = module.split(".")
    return (".".join(parts[at:]) for at in range(len(parts)))


class _Reader:
    """Values of the right types. Others add a problem."""

    def __init__(self, file: Path, raw: Mapping[str, Any], problems: list[str]):
        self._file = file
        self._raw = raw
        self._problems = problems

    def number(self, key: str, default: float) -> float:
        """A number; the default if there is none."""
        value = self._raw.get(key)
        return default if value is None else self._checked(key, value)

    def numbers(self, key: str) -> dict[str, float]:
        """Numbers by name."""
        value = self._raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._refuse(key, "a map of names to numbers", value)
            return {}
        return {name: self._checked(f"{key}.{name}", number) for name, number in value.items()}

    def names(self, key: str, *, texts: bool = False) -> frozenset[str] | None:
        """Names in a list; None without one. A text is a regular expression, or a name if ``texts`` is set."""
        value = self._raw.get(key)
        if value is None or (isinstance(value, str) and not texts):
            return None
        if isinstance(value, str):
            return frozenset((value,))
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._refuse(key, "a list of names", value)
            return None
        return frozenset(value)

    def layers(self) -> frozenset[int] | None:
        """The numbers of the layers that have factors; None for all."""
        value = self._raw.get("layers_to_transform")
        if value is None:
            return None
        given = value if isinstance(value, list) else [value]
        if not all(type(number) is int for number in given):
            self._refuse("layers_to_transform", "a number or a list of numbers", value)
            return None
        return frozenset(given)

    def _checked(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
            self._refuse(key, "a number", value)
            return 1.0
        return float(value)

    def _refuse(self, key: str, wanted: str, value: object) -> None:
        self._problems.append(f"{self._file}: {key} must be {wanted}, not {shown(value)}")


_LARGEST = 2.0**100
"""Numbers from here on would not fit float32 when they are used."""
