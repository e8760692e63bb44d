"""Measures with their errors, and fronts: what a set of recipes reaches in two measures at once.

The first measure, Tamil bits per byte, is to be small; the second, English accuracy, large. Errors are those of the
texts that happen to be in a half: a sentence counts as one draw, with all its items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Measured(NamedTuple):
    """A quotient of two sums over texts, such as bits over bytes: ``found`` and ``of``, both float [texts]."""

    found: np.ndarray
    of: np.ndarray

    @property
    def value(self) -> float:
        """The quotient."""
        return float(self.found.sum() / self.of.sum())

    @property
    def error(self) -> float:
        """Its standard error."""
        rest = self.found - self.value * self.of
        texts = len(rest)
        return float(np.sqrt((rest**2).sum() * texts / (texts - 1)) / self.of.sum())


def weights_of_texts(texts: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each text is in each of so many samples, drawn with replacement: [1 + draws, texts].

    The first row is the texts as they are, each once.
    """
    drawn = rng.multinomial(texts, np.full(texts, 1 / texts), size=draws)
    return np.vstack([np.ones(texts), drawn])


def resampled(measured: Sequence[Measured], weights: np.ndarray) -> np.ndarray:
    """The quotients of several recipes over the same texts for each row of weights: [rows, recipes]."""
    found = np.stack([each.found for each in measured])
    return (weights @ found.T) / (weights @ measured[0].of)[:, None]


def hypervolume(tamil: np.ndarray, english: np.ndarray, reference: tuple[float, float]) -> np.ndarray:
    """The area that recipes dominate, up to the reference: [...] for measures [..., recipes]."""
    worst_tamil, worst_english = reference
    order = np.argsort(tamil, axis=-1)
    tamil = np.minimum(np.take_along_axis(tamil, order, -1), worst_tamil)
    english = np.maximum(np.take_along_axis(english, order, -1), worst_english)
    widths = np.diff(tamil, axis=-1, append=np.full((*tamil.shape[:-1], 1), worst_tamil))
    area: np.ndarray = (widths * (np.maximum.accumulate(english, axis=-1) - worst_english)).sum(-1)
    return area
