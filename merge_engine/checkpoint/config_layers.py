"""The config.json of an output that is stacked of layers: what it says of single layers goes with them.

Configs say how many layers there are, and what is special about some: in lists with an entry for each layer, in lists
of layers' numbers, as the number of the first layer with a property, or as a period.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NEUTRAL = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_ENCODER = ("encoder_layers", "num_encoder_layers", "n_encoder_layers")
_DECODER = ("decoder_layers", "num_decoder_layers", "n_decoder_layers")
COUNTS = (*_NEUTRAL, *_ENCODER, *_DECODER)
"""Keys that count layers."""

_NUMBERS = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "attn_layer_idx"),
    *("cross_attention_layers", "hybrid_layer_ids", "global_attn_layers", "global_attn_idx"),
    *("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes", "no_rope_layer_ids"),
)
"""Lists of numbers of layers."""

_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""The number of layers at the start that are unlike the others."""

_PERIODS: Mapping[str, str | int] = {
    "attn_layer_period": "attn_layer_offset",
    "expert_layer_period": "expert_layer_offset",
    "decoder_sparse_step": -1,
    "interleave_moe_layer_step": -1,
    "no_rope_layer_interval": -1,
    "moe_layer_freq": 0,
}
"""Each so many layers one is unlike the others: the remainder of its number, or the key that has it."""

_WINDOWS = ("sliding_window_pattern", "full_attention_interval", "max_window_layers", "layer_types")
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
"""The period of layers that attend to everything, where the config of a model does not say it."""

_TEXTS = ("hybrid_override_pattern",)
"""Texts with a letter for each layer."""

_OTHER_LISTS = (
    *(
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "mrope_section",
        "image_grid_pinpoints",
    ),
    *(
        "short_factor",
        "long_factor",
        "suppress_tokens",
        "begin_suppress_tokens",
        "keys_to_ignore_at_inference",
    ),
)
"""Lists that may happen to be as long as there are layers."""

_TOWER = re.compile("visi|visual|image|audio|speech")


@dataclass(frozen=True)
class LayerOrigin:
    """Where a layer of the output comes from.

    ``label`` and ``config`` are those of a model, ``count`` is the number of its layers, ``layer`` the number of this
    one.
    """

    label: str
    config: Mapping[str, Any]
    count: int
    layer: int


def is_about_layers(key: str, values: Sequence[Any]) -> bool:
    """Whether a key with these values says something of single layers."""
    if key in (*COUNTS, *_NUMBERS, *_FIRST, *_PERIODS, *_WINDOWS, *_TEXTS, "attention_types"):
        return True
    return key not in _OTHER_LISTS and any(isinstance(value, list) for value in values)


def stacked_config(
    config: Mapping[str, Any], kind: str, alone: bool, count: int, origins: Sequence[LayerOrigin]
) -> tuple[dict[str, Any], list[str]]:
    """The config of an output with these layers in one of its stacks, and what is wrong with it.

    ``kind`` is "text", "vision", "audio", "encoder" or "decoder"; ``alone`` says that no other stack is there, towers
    aside. In ``config`` the stack has ``count`` layers.
    """
    made = copy.deepcopy(dict(config))
    warnings: list[str] = []
    if not made:
        return made, warnings
    places = _places(made, kind, alone, count)
    if not places and kind == "decoder" and not alone:
        made["num_decoder_layers"] = len(origins)  # T5 has as many as the encoder unless this key is there
        return made, warnings
    if not places:
        warnings.append(
            f"config.json: no key counts the layers; the output has {len(origins)}, which loaders must be told"
        )
    for path, keys in places:
        section = _at(made, path) or {}
        if kind == "encoder" and not alone and "num_layers" in keys:
            section.setdefault("num_decoder_layers", section["num_layers"])
        _Section(section, path, keys, count, origins, warnings).edit()
    return made, list(dict.fromkeys(warnings))


def _places(
    config: Mapping[str, Any], kind: str, alone: bool, count: int
) -> list[tuple[tuple[str, ...], list[str]]]:
    """The sections that count the layers of a stack, with the keys that do."""
    found = []
    for path, section in _sections(config):
        last = path[-1] if path else ""
        tower = _TOWER.search(last)
        if (kind in ("vision", "audio")) != (tower is not None) or (tower and kind[:4] not in last):
            continue
        keys: tuple[str, ...] = COUNTS if alone and kind in ("encoder", "decoder") else _NEUTRAL
        if not alone:
            keys = {"encoder": (*_NEUTRAL, *_ENCODER), "decoder": _DECODER}.get(kind, _NEUTRAL)
            if last.startswith("decoder"):
                keys = _NEUTRAL if kind == "decoder" else ()
        given = [key for key in keys if type(section.get(key)) is int]
        if given:
            found.append((path, given))
    exact = [(path, [key for key in keys if (_at(config, path) or {})[key] == count]) for path, keys in found]
    return [each for each in exact if each[1]] or found[:1]


def _sections(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("config") or key in ("encoder", "decoder")):
            yield from _sections(value, (*path, key))


def _at(config: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    section: Any = config
    for key in path:
        section = section.get(key) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None


class _Section:
    """A section of the output's config, and the same sections of the models that its layers come from."""

    def __init__(
        self,
        section: dict[str, Any],
        path: tuple[str, ...],
        counts: Sequence[str],
        count: int,
        origins: Sequence[LayerOrigin],
        warnings: list[str],
    ):
        self._section = section
        self._counts = counts
        self._lengths = {count, *(section[key] for key in counts)}
        self._origins = origins
        self._warnings = warnings
        own: dict[int, Mapping[str, Any]] = {}
        for each in origins:
            if id(each.config) not in own:
                nested = _at(each.config, path) or _at(each.config, ("text_config",))
                own[id(each.config)] = nested or dict(each.config)
        self._sources = [own[id(each.config)] for each in origins]

    def edit(self) -> None:
        """Set all keys that are about layers."""
        section = self._section
        types = [_type_of(source, each.layer) for source, each in self._pairs()]
        for key, value in list(section.items()):
            if key in self._counts:
                section[key] = len(self._origins)
            elif key in _NUMBERS and isinstance(value, list):
                section[key] = [
                    new
                    for new, (source, each) in enumerate(self._pairs())
                    if each.layer in source.get(key, value)
                ]
            elif key in _FIRST and type(value) is int:
                self._set_first(key)
            elif key in _PERIODS and type(value) is int and value > 0:
                self._check_period(key, value)
            elif key == "attention_types":
                self._set_attention_types()
            elif key != "layer_types" and self._is_by_layer(key, value):
                self._restack(key)
        self._set_types(types)

    def _pairs(self) -> Iterator[tuple[Mapping[str, Any], LayerOrigin]]:
        return zip(self._sources, self._origins, strict=True)

    def _is_by_layer(self, key: str, value: object) -> bool:
        if isinstance(value, str):
            return key in _TEXTS and len(value) in self._lengths
        return isinstance(value, list) and key not in _OTHER_LISTS and len(value) in self._lengths

    def _restack(self, key: str) -> None:
        own = self._section[key]
        entries = []
        for source, each in self._pairs():
            given = source.get(key, own)
            if not isinstance(given, list | str) or each.layer >= len(given):
                self._warnings.append(
                    f"config.json: {key} has an entry for each layer, but not for layer {each.layer} of {each.label}; "
                    "it is left out of the output's"
                )
                del self._section[key]
                return
            entries.append(given[each.layer])
        self._section[key] = "".join(entries) if isinstance(own, str) else entries

    def _set_first(self, key: str) -> None:
        own = self._section[key]
        first = [each.layer < source.get(key, own) for source, each in self._pairs()]
        number = first.index(False) if False in first else len(first)
        self._section[key] = number
        if any(first[number:]):
            self._warn(key, own, first.index(True, number))

    def _check_period(self, key: str, own: int) -> None:
        def marked(section: Mapping[str, Any], layer: int) -> bool:
            period, place = section.get(key, own), _PERIODS[key]
            rest = section.get(place, 0) if isinstance(place, str) else place
            return type(period) is not int or period < 1 or (layer - rest) % period == 0

        for new, (source, each) in enumerate(self._pairs()):
            if marked(source, each.layer) != marked(self._section, new):
                self._warn(key, own, new)
                return

    def _warn(self, key: str, value: object, new: int) -> None:
        was = self._origins[new]
        self._warnings.append(
            f"config.json: {key} {value} does not fit the output: its layer {new} is layer {was.layer} of {was.label}, "
            "which is of another kind; loaders will take it for what it is not"
        )

    def _set_attention_types(self) -> None:
        """GPT-Neo: pairs of types and how often they are repeated."""
        own = self._section["attention_types"]
        try:
            types = [
                [one for kinds, times in source.get("attention_types", own) for one in kinds * times][
                    each.layer
                ]
                for source, each in self._pairs()
            ]
        except (TypeError, ValueError, IndexError):
            return  # not of this form
        self._section["attention_types"] = [[types, 1]]

    def _set_types(self, types: Sequence[object]) -> None:
        """What the layers attend to: as a list if the key that says it otherwise cannot say it any more."""
        section = self._section
        given = section.pop("layer_types", None)
        if section.get("use_sliding_window") is True and "max_window_layers" in section:
            full = [one == "full_attention" for one in types]
            section["max_window_layers"] = full.index(False) if False in full else len(full)
        derived = [_type_of(section, new) for new in range(len(types))]
        if given is None and derived == types:
            return
        if given is not None and any(one is None for one in types):
            bare = next(each for one, each in zip(types, self._origins, strict=True) if one is None)
            self._warnings.append(
                f"config.json: layer_types has an entry for each layer, but that of {bare.label} does not say what its "
                "layers are; it is left out of the output's"
            )
        elif all(one is not None for one in types):
            section["layer_types"] = list(types)
            key = next((key for key in _WINDOWS if section.get(key) and key != "layer_types"), None)
            if given is None:
                self._warnings.append(
                    f"config.json: {key or 'the default'} does not fit the output, so layer_types says which of its "
                    "layers attend to everything; versions of transformers before 4.53 do not read it"
                )
        elif any(one is not None for one in types):
            new = next(i for i, one in enumerate(types) if one is not None)
            self._warn("layer_types", types[new], new)


def _type_of(section: Mapping[str, Any], layer: int) -> object:
    """What a layer attends to, in the words of transformers; None if the config does not say."""
    types = section.get("layer_types")
    if isinstance(types, list):
        return types[layer] if layer < len(types) else None
    pattern = section.get("sliding_window_pattern", _PATTERNS.get(section.get("model_type", "")))
    interval = section.get("full_attention_interval")
    for period, kind in ((pattern, "sliding_attention"), (interval, "linear_attention")):
        if type(period) is int and period > 0:
            return kind if (layer + 1) % period else "full_attention"
    start = section.get("max_window_layers")
    if type(start) is int and section.get("use_sliding_window") is True:
        return "sliding_attention" if layer >= start else "full_attention"
    return None
