"""The result of a merge, with its counts."""

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
    """Numbers of one model's entries in a tensor, or in all tensors. Zeros are never counted.

    ``kept``: kept by the trim or the draw. ``saved_by_trim``: those of them that are kept only because of trim
    slack (in expectation if ties are spread; with ``trim_scope: model`` only counted for the whole model).
    ``lost``: kept, but left out of the mean by the election. ``saved_by_sign``: in the mean only because of sign
    slack.
    """

    kept: int = 0
    lost: int = 0
    saved_by_trim: int = 0
    saved_by_sign: int = 0

    @property
    def retained(self) -> int:
        """Entries in the mean."""
        return self.kept - self.lost

    @property
    def lost_share(self) -> float:
        """The share of the kept entries that are lost, from 0 to 1."""
        return self.lost / self.kept if self.kept else 0.0

    @property
    def saved_share(self) -> float:
        """The share of the kept entries that either slack saved, from 0 to 1."""
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
    """One merged tensor: its number of elements, and for methods with task vectors the counts by recipe position."""

    name: str
    elements: int
    counts: dict[int, ModelCounts] = field(default_factory=dict)


@dataclass
class MergeResult:
    """A finished merge.

    ``output`` is its folder, or None; then ``tensors`` holds the merged tensors by name. ``per_tensor`` has the
    counts of each tensor. ``models`` has the name of each model by recipe position. ``ledger`` has bytes and
    seconds of each stage, ``notes`` are messages for the user, ``warnings`` say what may be
    wrong with the inputs. ``trimmed_to`` has, by recipe position, the number
    of entries that a trim over the whole model would have kept without slack.
    """

    output: Path | None
    tensors: Mapping[str, torch.Tensor] | None
    per_tensor: list[TensorResult]
    models: Mapping[int, str]
    ledger: Ledger
    notes: list[str]
    trimmed_to: Mapping[int, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

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
