"""The config.json of an output."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from merge_engine.checkpoint.tie_flags import set_tie_flags
from merge_engine.dtypes import DType

_DTYPE_KEYS = ("dtype", "torch_dtype")
# Their dtypes are not those of the stored tensors.
_QUANTIZATION = ("quantization_config", "compression_config")
_TEXT_OR_INFINITY = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|Infinity')


def merged_config(config: Mapping[str, Any], out_dtype: DType | None, untied: bool) -> dict[str, Any]:
    """The config.json of the output: a copy of ``config`` with the output's dtype.

    The dtype is set in every nested section that states one (``vision_config``), under the key that the section uses,
    ``torch_dtype`` (old) or ``dtype``; None leaves all of them as they are. ``untied`` says that the output has a
    head of its own: ``tie_word_embeddings`` becomes false at all levels. Otherwise all levels get the value that
    decides.
    """
    merged = copy.deepcopy(dict(config))
    if out_dtype is not None:
        if not any(key in merged for key in _DTYPE_KEYS):
            merged["dtype"] = out_dtype.name
        for section in _sections(merged):
            section.update({key: out_dtype.name for key in _DTYPE_KEYS if _states_dtype(section, key)})
    set_tie_flags(merged, untied)
    return merged


def encode_config(config: Mapping[str, Any]) -> bytes:
    """The config as JSON. Infinity is written as the number 1e999, which every reader takes for infinity."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    text = _TEXT_OR_INFINITY.sub(lambda found: "1e999" if found[0] == "Infinity" else found[0], text)
    return text.encode() + b"\n"


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and all objects in it, except those about quantisation."""
    yield config
    for key, value in config.items():
        if key not in _QUANTIZATION:
            for inner in value if isinstance(value, list) else (value,):
                if isinstance(inner, dict):
                    yield from _sections(inner)


def _states_dtype(section: Mapping[str, Any], key: str) -> bool:
    return key in section and (section[key] is None or isinstance(section[key], str))
