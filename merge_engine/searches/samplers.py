"""Optuna's samplers by name. Each trial gets a sampler with a seed of its own, so that a search can be resumed.

A sampler draws random numbers. If one sampler drew those of all trials, the first trial of a resumed search would get
the numbers of the very first one. So trial n gets a new sampler, seeded for n: what it proposes depends on the seed, on
n, and on the finished trials, which are in the storage.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from merge_engine.errors import OptionError
from merge_engine.recipe.problems import suggestion
from merge_engine.searches.space import Choices, Domain, Space
from merge_engine.text import shown, some

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

NAMES = ("tpe", "nsga2", "cmaes")
_POPULATION = 16
"""Trials in a generation of NSGA-II. Optuna's 50 would be the whole of many a search, drawn at random."""


class Samplers:
    """The samplers of a search, one for each trial. ``notes`` says what the caller may not expect of them."""

    def __init__(self, sampler: str | BaseSampler | None, seed: int, objectives: int, space: Space):
        """``sampler``: one of ``NAMES``, a sampler of Optuna, which then serves all trials, or None for the default.

        Raises ``OptionError`` for a sampler that does not exist, or that cannot do this search.
        """
        from optuna.samplers import BaseSampler

        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise OptionError(f"seed: must be a whole number from 0 on, not {shown(seed)}")
        if sampler is None:
            sampler = "tpe" if objectives == 1 else "nsga2"
        if not isinstance(sampler, BaseSampler) and sampler not in NAMES:
            raise OptionError(
                f"sampler: there is no sampler {shown(sampler)}{suggestion(str(sampler), NAMES)}"
            )
        self.notes = _cmaes_notes(objectives, space) if sampler == "cmaes" else []
        self._sampler = sampler
        self._seed = seed

    def of_trial(self, number: int) -> BaseSampler:
        """The sampler that proposes the trial of this number."""
        if not isinstance(self._sampler, str):
            return self._sampler
        from numpy.random import SeedSequence
        from optuna.samplers import CmaEsSampler, NSGAIISampler, TPESampler

        seed = int(SeedSequence([self._seed, number]).generate_state(1)[0])
        if self._sampler == "tpe":
            return TPESampler(seed=seed)
        if self._sampler == "nsga2":
            return NSGAIISampler(seed=seed, population_size=_POPULATION)
        return CmaEsSampler(seed=seed, warn_independent_sampling=False)


def distributions(space: Space, whole: Collection[str]) -> dict[str, BaseDistribution]:
    """What Optuna calls the domains of a space. ``whole`` are the names of ranges with whole numbers only."""
    return {name: _distribution(domain, name in whole) for name, domain in space.varied.items()}


def _distribution(domain: Domain, whole: bool) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choices):
        return CategoricalDistribution(domain.values)
    if whole:
        return IntDistribution(int(domain.low), int(domain.high), log=domain.log, step=int(domain.step or 1))
    return FloatDistribution(domain.low, domain.high, log=domain.log, step=domain.step)


def _cmaes_notes(objectives: int, space: Space) -> list[str]:
    """Raises ``OptionError`` if CMA-ES cannot do the search, or is not installed."""
    if objectives > 1:
        raise OptionError("sampler: cmaes has one objective; nsga2 and tpe take several")
    choices = [name for name, domain in space.varied.items() if isinstance(domain, Choices)]
    if space.varied and len(choices) == len(space.varied):
        raise OptionError(
            "sampler: cmaes needs a range of numbers, and the space has choices only; tpe takes them"
        )
    try:
        import cmaes  # noqa: F401
    except ImportError:
        raise OptionError(
            'sampler: cmaes is not installed; run: pip install "merge_engine[search]"'
        ) from None
    return (
        [f"cmaes proposes numbers of ranges; choices are drawn at random: {some(choices)}"] if choices else []
    )
