"""mergekit-evolve's search, whose candidates are merged by this engine.

    from merge_engine.integrations import evolve

    genome = evolve.Genome.of(config["genome"])
    recipe = genome.recipe(x)

``Genome`` needs nothing of mergekit. docs/mergekit.md says how a search runs.
"""

from merge_engine.integrations.evolve.genome import PARAMETERS, Genome

__all__ = ["PARAMETERS", "Genome"]
