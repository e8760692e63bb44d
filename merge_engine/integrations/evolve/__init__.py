"""mergekit-evolve's search, whose candidates are merged by this engine.

    from merge_engine.integrations import evolve

    genome = evolve.Genome.of(config["genome"])
    session.merge(genome.recipe(genotype))

``Strategy`` merges and scores what a search proposes. Nothing of mergekit is needed; docs/mergekit.md has examples.
"""

from merge_engine.integrations.evolve.genome import PARAMETERS, Genome
from merge_engine.integrations.evolve.strategy import Score, Strategy, strategy_class

__all__ = ["PARAMETERS", "Genome", "Score", "Strategy", "strategy_class"]
