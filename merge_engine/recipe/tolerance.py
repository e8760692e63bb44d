"""Keys that published recipes have although mergekit ignores them: they are left out, with a warning each.

mergekit ignores a misspelt key too, but nobody knows what it was meant to do. It is an error, unless the caller is
``lenient``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from merge_engine.recipe.problems import Place, dotted, suggestion
from merge_engine.text import some

_BY_NAME = "tensors are found by their names, whatever the architecture"
_IGNORED = {
    "architecture": _BY_NAME,
    "int8_mask": "no result depends on it",
    "normalize": 'move it into "parameters" to set the parameter',
    "override_architecture": _BY_NAME,
    "pad_to_multiple_of": 'move it into "tokenizer" to pad the vocabulary',
    "revision": 'write "model: path@revision" to merge that revision',
}
"""Keys that mergekit ignores where it does not know them, and what to say of each."""

_OF_REFERENCES = "override_architecture"
"""A key of maps that name a model. mergekit knows it there, and takes the class in it for that of the model."""


def without_ignored(
    raw: Mapping[Any, Any],
    error: ValidationError,
    lenient: bool,
    known_keys: Callable[[Place], Iterable[str]],
) -> tuple[Mapping[Any, Any], list[str]]:
    """A recipe's keys and values without those that ``error`` does not know and that may be ignored.

    Also returns a warning for each key. ``lenient``: every key that does not exist may be ignored. ``known_keys`` gives
    the known keys of the map that holds a place.
    """
    places: dict[str, list[Place]] = {}
    for detail in error.errors(include_url=False):
        place, value = detail["loc"], detail["input"]
        if detail["type"] == "extra_forbidden" and (lenient or place[-1] in _IGNORED):
            places.setdefault(str(place[-1]), []).append(place)
        elif isinstance(value, Mapping) and value.get(_OF_REFERENCES) is not None:
            places.setdefault(_OF_REFERENCES, []).append((*place, _OF_REFERENCES))
    for place in (place for same in places.values() for place in same):
        raw = _without(raw, place)
    return raw, [_warning(key, same, known_keys) for key, same in places.items()]


def _warning(key: str, places: list[Place], known_keys: Callable[[Place], Iterable[str]]) -> str:
    paths = some([dotted(place) for place in places])
    if key in _IGNORED:
        return f"{paths}: ignored, as mergekit does; {_IGNORED[key]}"
    return f"{paths}: no such key, ignored as mergekit does{suggestion(key, known_keys(places[0]))}"


def _without(raw: Any, place: Place) -> Any:
    """A copy without the key at a place. What is beside the way to it is shared."""
    step, *below = place
    if not below:
        return {key: value for key, value in raw.items() if key != step}
    if isinstance(raw, Mapping):
        return {key: _without(value, tuple(below)) if key == step else value for key, value in raw.items()}
    return [_without(value, tuple(below)) if i == step else value for i, value in enumerate(raw)]
