"""Names of one tensor that differ in parts: those that wrappers of training put in, and old ones of transformers."""

from __future__ import annotations

import re
from collections.abc import Collection

from merge_engine.planning.inputs import Catalogue

_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|base_layer)\."
)
"""``torch.compile``, FSDP, gradient checkpointing and PEFT put these before the names in each layer that they wrap."""

_OLD = (
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (re.compile(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (re.compile(r"\.weight_v$"), ".parametrizations.weight.original1"),
)
"""Names in old checkpoints, which transformers and torch replace when they load them."""


def respelled(catalogue: Catalogue, reference: Catalogue) -> dict[str, str]:
    """The names that the reference has for tensors of a model that spells them otherwise, by the model's names.

    It is empty if two tensors would get one name.
    """
    theirs = {_plain(name): name for name in reference.tensors}
    new = {name: theirs.get(_plain(name), name) for name in catalogue.names - reference.names}
    found = {name: other for name, other in new.items() if other != name}
    return {} if _collide(found, catalogue.names) else found


def _plain(name: str) -> str:
    plain = _WRAPPERS.sub("", name)
    for pattern, new in _OLD:
        plain = pattern.sub(new, plain)
    return plain


def _collide(new: dict[str, str], names: Collection[str]) -> bool:
    return len(set(new.values())) < len(new) or not set(names).isdisjoint(new.values())
