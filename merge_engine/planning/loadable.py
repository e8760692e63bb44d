"""Whether loaders will find in the output what its config.json promises: names and layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from merge_engine.planning.inputs import examples
from merge_engine.recipe import layer_of, rename_key
from merge_engine.text import counted, shown

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_forward_module.")
"""``torch.compile``, data parallel training, FSDP and DeepSpeed put these before all names."""


def check_loadable(
    names: Collection[str], donor: Collection[str], config: Mapping[str, Any], stacked: Collection[str]
) -> list[str]:
    """Warnings about an output with tensors of these names. ``donor`` has the donor's names, ``config`` its config.

    ``stacked`` are the stacks whose layers the config was made for.
    """
    warnings = []
    for wrapper in _WRAPPERS:
        wrapped = sorted(name for name in names if name.startswith(wrapper))
        if wrapped:
            warnings.append(
                f"{len(wrapped)} names in the output begin with {shown(wrapper)} ({examples(wrapped)}), which "
                f"loaders do not know; to remove it, add {rename_key({wrapper: ''})} to the recipe"
            )
    written, given = _layers(names), _layers(donor)
    for stack, layers in given.items():
        if stack in stacked:
            continue
        left = written.get(stack, set())
        key = next((key for key in _LAYERS if _value(config, key) == len(layers)), None)
        if len(left) != len(layers) and key is not None:
            what = "make up the others" if len(left) < len(layers) else "leave out the others"
            warnings.append(
                f"{stack}: the output has {counted(len(left), 'layer')}, its config.json says {key} "
                f"{len(layers)}; loaders {what}, unless you change {key} there"
            )
    return warnings


def _layers(names: Collection[str]) -> dict[str, set[int]]:
    """The layers by stack."""
    stacks: dict[str, set[int]] = {}
    for place in map(layer_of, names):
        if place is not None:
            stacks.setdefault(place[0], set()).add(place[1])
    return stacks


def _value(config: Mapping[str, Any], key: str) -> object:
    """The value in the config, or else in its section of the language model."""
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)
