"""The vectors that searches propose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge_engine.errors import RecipeError
from merge_engine.text import shown


def read_vector(name: str, given: object) -> torch.Tensor:
    """An array of numbers as a tensor of floats on the CPU, of the same shape.

    ``given`` is a tensor, an array or sequences of numbers. Those of Python and whole numbers become float64; all
    others keep their type. Raises ``RecipeError``, which begins with ``name``, for anything else, and for NaN and
    infinity.
    """
    try:
        if isinstance(given, torch.Tensor):
            read = given.detach().cpu()
        else:  # of Python's numbers torch would make float32
            read = torch.tensor(given, dtype=None if hasattr(given, "dtype") else torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise RecipeError(f"{name}: must be an array of numbers, not {shown(given)}") from None
    if read.is_complex():
        raise RecipeError(f"{name}: must be an array of real numbers, not of complex ones")
    wrong = (~read.isfinite()).flatten().nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise RecipeError(f"{name}[{place}]: must be a finite number, not {read.flatten()[place].item()}")
    return read if read.is_floating_point() else read.double()


def shape_text(shape: Sequence[int]) -> str:
    """A shape for messages: ``2 x 3``."""
    return " x ".join(map(str, shape)) or "a single number"
