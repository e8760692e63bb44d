"""State dicts that a session merges: their tensors stay the caller's, who may change them between merges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from merge_engine.checkpoint import Checkpoint
from merge_engine.engine.resident import catalogue_of
from merge_engine.operands import Operand
from merge_engine.recipe import ModelReference

if TYPE_CHECKING:
    import torch

_Seen: TypeAlias = "tuple[int, int | None, int | None, tuple[int, ...]]"


class Watched:
    """State dicts by the names that recipes have for them.

    A change is seen by the counter with which torch counts what is written to a tensor, by its address and shape, and
    by another tensor under the same name. What is written through ``.data``, numpy or another process is not seen, nor
    is a change of tensors that were made in inference mode.
    """

    def __init__(self, given: Mapping[ModelReference, Mapping[str, torch.Tensor]]):
        self._given = given
        self._seen: dict[ModelReference, dict[str, _Seen]] = {}
        self._operands: dict[ModelReference, Mapping[str, Operand]] = {}

    def opened(self) -> dict[ModelReference, Checkpoint]:
        """The state dicts as checkpoints without files. Tensors that did not change have the same operands as before.

        Raises ``PlanError`` for what is no state dict, or has no values in memory.
        """
        for reference, tensors in self._given.items():
            made = catalogue_of(str(reference), tensors).tensors
            before, seen = self._seen.get(reference, {}), _seen(tensors)
            known = self._operands.get(reference, {})
            self._operands[reference] = {
                name: known[name] if before.get(name) == seen[name] else operand
                for name, operand in made.items()
            }
            self._seen[reference] = seen
        return {
            reference: Checkpoint(Path(str(reference)), Path(str(reference)), operands, {}, ())
            for reference, operands in self._operands.items()
        }

    def changed(self) -> bool:
        """Whether a change is seen since ``opened`` was called."""
        return any(_seen(tensors) != self._seen[reference] for reference, tensors in self._given.items())


def _seen(tensors: object) -> dict[str, _Seen]:
    """What shows that tensors are as they were."""
    import torch

    if not isinstance(tensors, Mapping):
        return {}
    return {
        name: (
            id(tensor),
            None if tensor.is_inference() else tensor._version,
            _address(tensor),
            tuple(tensor.shape),
        )
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


def _address(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse, or inside a transform of torch
        return None
