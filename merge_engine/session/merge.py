"""One merge of a session: planned, and carried out when its tensors are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_engine.observe.result import MergeResult
from merge_engine.recipe import Recipe
from merge_engine.session.targets import GivenTensors, NewTensors

if TYPE_CHECKING:
    import torch

    from merge_engine.planning import MergePlan
    from merge_engine.session.session import Planned, Session


class Merge:
    """A merge that is planned and checked. ``Session.merge`` makes one.

    It may be carried out several times. Each of its methods raises ``NonFiniteError`` for NaN or infinity, and
    ``OptionError`` if the session is closed.
    """

    def __init__(self, session: Session, planned: Planned):
        self._session = session
        self._planned = planned

    @property
    def recipe(self) -> Recipe:
        """The recipe with the same meaning: ``run`` makes the same bytes of it, if the session holds checkpoints."""
        return self._planned.plan.recipe

    @property
    def plan(self) -> MergePlan:
        """What each output tensor is made of, and notes and warnings."""
        return self._planned.plan

    def tensors(self) -> dict[str, torch.Tensor]:
        """The merged tensors by name: new and contiguous, on the session's device, of the recipe's output dtype."""
        _, made = self._session.carry_out(self._planned, NewTensors)
        return made.in_order

    def into(self, target: torch.nn.Module | Mapping[str, torch.Tensor]) -> MergeResult:
        """Write the merged tensors into a module of torch, or into tensors by name, in place.

        Names are those of the module's ``state_dict``; one prefix, such as ``model.``, may be on one side only. Tensors
        that the module ties are written once, and must be one in the merge too. Devices and dtypes of the target stay:
        a value is rounded to the recipe's output dtype first, and then converted. If both dtypes are the same, the
        bytes are those of ``run``. Autograd records nothing, and learns that the tensors have changed.

        Raises ``PlanError`` before anything is written if names, shapes or ties do not fit, or if the target is the
        memory of an input. After a ``NonFiniteError`` the target holds parts of the merge.
        """
        import torch

        with torch.no_grad():
            result, _ = self._session.carry_out(self._planned, partial(GivenTensors, target))
        return result

    def save(self, output: str | Path, **options: Any) -> MergeResult:
        """Write a checkpoint to a folder, as ``run`` does. ``options`` are its ``shard_size`` and ``overwrite``.

        Raises as ``run`` does, and ``OptionError`` for a session of state dicts, which have neither config nor
        tokenizer.
        """
        return self._session.save(self.recipe, output, **options)
