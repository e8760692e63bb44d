"""Two merged checkpoints, held against each other: weights, files, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_OURS = {"merge_manifest.json", "generation_config.json"}
"""Files that only ours writes: mergekit loses the settings of generation where it writes the tokenizer anew."""
MANY = 1e-2
"""How much kept shares and norms of two random merges may differ."""


@dataclass(frozen=True)
class Weights:
    """How two checkpoints differ, over all of their elements.

    ``ulps``: the largest difference in units of the last place of the larger of the two elements, or of the mean
    magnitude of the tensor if that is larger: elements near zero have tiny units. ``kept`` and ``norms``: for each, the
    share of elements that differ from the base's, and the L1 norm of that difference. ``wider``: the number of tensors
    that mergekit writes in float32 although the recipe has another dtype; they are rounded for the comparison.
    """

    elements: int = 0
    differ: int = 0
    largest: float = 0.0
    ulps: float = 0.0
    names: str = ""
    kept: tuple[float, float] = (0.0, 0.0)
    norms: tuple[float, float] = (0.0, 0.0)
    wider: int = 0

    @property
    def alike_as_draws(self) -> bool:
        """Whether two random merges may be of one distribution, by these two measures."""
        (one, other), (ours, theirs) = self.kept, self.norms
        return abs(one - other) < MANY and abs(ours - theirs) < 2 * MANY * theirs

    def __str__(self) -> str:
        if self.names:
            return self.names
        note = f" ({self.wider} tensors rounded: mergekit writes float32)" if self.wider else ""
        if not self.differ:
            return f"bits{note}"
        return f"{self.largest:.1g}, {self.ulps:.3g} ulp, {self.differ / self.elements:.3%}{note}"


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's safetensors files."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def compare_weights(ours: Path, theirs: Path, base: Path | None) -> Weights:
    """Compare two checkpoints; ``base`` is that of their task vectors, to compare random merges."""
    one, other = read_tensors(ours), read_tensors(theirs)
    origin = read_tensors(base) if base is not None else {}
    if one.keys() != other.keys():
        missing, more = sorted(other.keys() - one.keys()), sorted(one.keys() - other.keys())
        return Weights(names=f"names: {len(missing)} missing, {len(more)} more ({(missing + more)[0]} ...)")
    elements = differ = wider = 0
    largest = ulps = 0.0
    kept, norms, counted = [0, 0], [0.0, 0.0], 0
    for name, x in one.items():
        y = other[name]
        if y.dtype == torch.float32 and x.dtype != y.dtype:  # a method that forgets the dtype of the recipe
            wider += 1
            y = y.to(x.dtype)
        if x.dtype != y.dtype or x.shape != y.shape:
            return Weights(names=f"{name}: {x.dtype} {tuple(x.shape)}, mergekit {y.dtype} {tuple(y.shape)}")
        elements += x.numel()
        unequal = x.view(_BITS[x.element_size()]) != y.view(_BITS[x.element_size()])
        differ += int(unequal.sum())
        gap = (x.double() - y.double()).abs()
        largest = max(largest, float(gap.max()))
        ulps = max(ulps, float((gap / _unit(x, y)).max()))
        if name in origin and origin[name].shape == x.shape:
            counted += x.numel()
            for i, tensor in enumerate((x, y)):
                step = tensor.double() - origin[name].double()
                kept[i] += int((step != 0).sum())
                norms[i] += float(step.abs().sum())
    shares = (kept[0] / max(counted, 1), kept[1] / max(counted, 1))
    return Weights(elements, differ, largest, ulps, "", shares, (norms[0], norms[1]), wider)


def distance(folder: Path, truth: Path) -> float:
    """The share of elements that are farther than a unit of the last place from those of a checkpoint in float64."""
    exact = read_tensors(truth)
    far = elements = 0
    for name, x in read_tensors(folder).items():
        far += int(((x.double() - exact[name]).abs() > _unit(x, exact[name])).sum())
        elements += x.numel()
    return far / elements


def _unit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The unit of the last place of each pair of elements."""
    size = torch.maximum(x.double().abs(), y.double().abs())
    size = size.clamp(min=max(float(size.mean()), torch.finfo(x.dtype).tiny))
    return torch.exp2(torch.floor(torch.log2(size))) * torch.finfo(x.dtype).eps


def compare_loaded(ours: Mapping[str, Any], theirs: Mapping[str, Any], own_template: bool) -> list[str]:
    """What differs in config, tokenizer, chat template; ``own_template``: that of ours may be another."""
    found = []
    one, other = ours.get("config", {}), theirs.get("config", {})
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key):
            found.append(f"config {key}: {one.get(key)}, mergekit {other.get(key)}")
    keys = ("vocabulary", "ids", "special", *(() if own_template else ("template",)))
    found += [f"{key} differs" for key in keys if ours.get(key) != theirs.get(key)]
    return found


def compare_files(ours: Path, theirs: Path) -> list[str]:
    """Files that mergekit writes and ours does not, weights apart, and the other way round."""
    one, other = _names(ours), _names(theirs)
    return [
        *(f"no {name}" for name in sorted(other - one)),
        *(f"also {name}" for name in sorted(one - other - _OURS)),
    ]


def _names(folder: Path) -> set[str]:
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {name for name in files if ".safetensors" not in name}
