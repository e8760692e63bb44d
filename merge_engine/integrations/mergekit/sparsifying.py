"""mergekit's function that drops entries of one task vector, which methods of users build on."""

from __future__ import annotations

from typing import Any

import torch

from merge_engine.integrations.mergekit.merging import merge_one

METHODS = {
    "magnitude": "ties",
    "random": "dare_linear",
    "magnitude_outliers": "breadcrumbs",
    "della_magprune": "della_linear",
}
"""By the name of a way to choose the entries: the method that chooses so. With one model there is no conflict."""

NORMS = (None, "l1")
"""The norms that a rescaling can keep."""


def sparsify(
    tensor: torch.Tensor,
    density: float,
    method: str,
    gamma: float = 0,
    epsilon: float = 0,
    rescale_norm: str | None = None,
) -> torch.Tensor:
    """The tensor with zeros in place of the entries that ``method`` drops, with mergekit's arguments.

    ``rescale_norm``: None, or "l1" to keep the L1 norm. Exactly the first of equal magnitudes stay. Raises
    ``MergeError``.
    """
    chosen = METHODS[_name(method)]
    parameters: dict[str, Any] = {
        "weight": 1.0,
        "normalize": False,
        "density": min(max(density, 0.0), 1.0),
        "rescale": rescale_norm is not None,
    }
    if chosen in ("ties", "breadcrumbs"):
        parameters["ties"] = "index"
    if chosen == "breadcrumbs":
        parameters["gamma"] = min(gamma, 1.0)
    if chosen == "della_linear":
        parameters["epsilon"] = epsilon
    return merge_one(chosen, torch.zeros_like(tensor), [tensor], parameters)


def can_sparsify(method: str, rescale_norm: str | None) -> bool:
    """Whether the engine knows this way and this norm."""
    norm = None if rescale_norm is None else _name(rescale_norm)
    return _name(method) in METHODS and norm in NORMS


def _name(value: Any) -> str:
    """The text of mergekit's enumerations, which are texts too."""
    return str(getattr(value, "value", value))
