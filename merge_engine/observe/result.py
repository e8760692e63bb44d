"""What a merge gives back, and what it counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_engine.observe.ledger import Ledger

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModelCounts:
    """What became of one model's entries in a tensor, or in all of them. Zeros are never counted.

    ``kept``: survived the trim or the draw; of those ``saved_by_trim`` only thanks to trim slack (in
    expectation when ties are spread; with ``trim_scope: model`` known for the whole model alone). ``lost``:
    kept, but left out of the mean by the election; ``saved_by_sign``: in the mean only thanks to sign slack.
    """

    kept: int = 0
    lost: int = 0
    saved_by_trim: int = 0
    saved_by_sign: int = 0

    @property
    def retained(self) -> int:
        """Entries that entered the mean."""
        return self.kept - self.lost

    @property
    def lost_share(self) -> float:
        """Lost of kept, from 0 to 1."""
        return self.lost / self.kept if self.kept else 0.0

    @property
    def saved_share(self) -> float:
        """Saved by either slack, of kept."""
        return (self.saved_by_trim + self.saved_by_sign) / self.kept if self.kept else 0.0

    def as_dict(self) -> dict[str, int]:
        """Plain numbers for the manifest and the report."""
        return dict(vars(self))

    def __add__(self, other: ModelCounts) -> ModelCounts:
        return ModelCounts(
            self.kept + other.kept,
            self.lost + other.lost,
            self.saved_by_trim + other.saved_by_trim,
            self.saved_by_sign + other.saved_by_sign,
        )


@dataclass
class TensorResult:
    """One merged tensor: elements, and counts by recipe position for methods with task vectors."""

    name: str
    elements: int
    counts: dict[int, ModelCounts] = field(default_factory=dict)


@dataclass
class MergeResult:
    """A finished merge.

    ``output`` is the folder it was written to, or None; then ``tensors`` holds the merged tensors.
    ``per_tensor`` counts tensor by tensor; ``models`` names the recipe positions used in counts;
    ``trimmed_to`` is what a trim over the whole model would have kept without slack.
    """

    output: Path | None
    tensors: Mapping[str, torch.Tensor] | None
    per_tensor: list[TensorResult]
    models: Mapping[int, str]
    ledger: Ledger
    notes: list[str]
    trimmed_to: Mapping[int, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[int, ModelCounts]:
        """Counts by recipe position, over all tensors."""
        sums: dict[int, list[int]] = {}
        for result in self.per_tensor:
            for model, counts in result.counts.items():
                total = sums.setdefault(model, [0, 0, 0, 0])
                total[0] += counts.kept
                total[1] += counts.lost
                total[2] += counts.saved_by_trim
                total[3] += counts.saved_by_sign
        totals = {model: ModelCounts(*total) for model, total in sums.items()}
        for model, trimmed_to in self.trimmed_to.items():
            totals[model] = replace(totals[model], saved_by_trim=totals[model].kept - trimmed_to)
        return totals
