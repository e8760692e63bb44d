"""mergekit-evolve's strategies of evaluation: genotypes are merged through a session, and scored by the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import merge_engine
from merge_engine.errors import OptionError
from merge_engine.integrations.evolve.genome import Genome
from merge_engine.text import shown

if TYPE_CHECKING:
    from merge_engine.session import Merge, Session

Score: TypeAlias = "Callable[[Merge], float | Mapping[str, Any]]"
"""Says how good a merge is; more is better. A map has the number as ``score``, and as ``results`` what mergekit-evolve
logs: by task, numbers by metric."""


class Strategy:
    """Merges genotypes through a session and scores them, with the methods that mergekit-evolve's own loop calls.

    ``genome`` makes the recipes, over the inputs of ``session``. ``score`` gets each merge, planned and not computed
    yet: ``merge.into(model)`` writes it into a torch module. ``changes`` are those of ``Session.merge``, such as
    ``seed=7`` or ``sign_slack=1``, and hold for all genotypes. One genotype is merged and scored after the other,
    because a merge uses all cores.
    """

    def __init__(self, genome: Genome, session: Session, score: Score, **changes: Any):
        self.genome = genome
        self.session = session
        self._score = score
        self._changes = changes

    def evaluate_genotypes(self, genotypes: Iterable[object]) -> list[dict[str, Any]]:
        """For each genotype a map with its ``score``, a number, and ``results``, a map.

        Raises ``MergeError`` for a genotype that cannot be merged, and for a score that is no number, or NaN. What
        ``score`` raises is not caught.
        """
        return [self.evaluate_genotype(genotype) for genotype in genotypes]

    def evaluate_genotype(self, genotype: object) -> dict[str, Any]:
        """The same for one genotype."""
        found = self._score(self.session.merge(self.genome.recipe(genotype), **self._changes))
        result = dict(found) if isinstance(found, Mapping) else {"score": found}
        try:
            score = float(result["score"])
        except (KeyError, TypeError, ValueError):
            score = math.nan
        if math.isnan(score):
            raise OptionError(
                f'score: must return a number, or a map with a number as "score", not {shown(found)}'
            )
        return {"results": {}, **result, "score": score}


def strategy_class(score: Score, **options: Any) -> Callable[..., Strategy]:
    """What mergekit-evolve's command can use in place of its own class of strategies.

        mergekit.scripts.evolve.ActorPoolEvaluationStrategy = evolve.strategy_class(score)

    The models are loaded once, with ``options`` of ``merge_engine.load``. Of mergekit's options the random seed counts,
    and ``--no-merge-cuda`` keeps merges on the CPU; those about tasks, storage and GPUs do not, because ``score`` does
    the evaluation.
    """

    def strategy(config: Any, genome: Any, merge_options: Any, **unused: Any) -> Strategy:
        ours = Genome.of(genome.definition, layers=genome.num_layers)
        device = "auto" if merge_options.cuda else "cpu"
        session = merge_engine.load(ours.base_model, list(ours.models), **{"device": device, **options})
        return Strategy(ours, session, score, seed=merge_options.random_seed or 0)

    return strategy
