"""What mergekit-evolve merges for genotypes, in mergekit's environment: one JSON object a line in, one a line out.

In: ``genome`` (the keys of a configuration), ``genotype`` (numbers, flat or nested) and ``dtype`` (its type, by numpy's
name). Out: ``recipe``, YAML, and ``initial``, the flat genotype that a search begins with.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition


def answer(job: dict[str, object]) -> dict[str, object]:
    genome = ModelGenome(ModelGenomeDefinition.model_validate(job["genome"]))
    genotype = np.array(job["genotype"], dtype=str(job["dtype"]))
    return {
        "recipe": genome.genotype_merge_config(genotype).to_yaml(),
        "initial": genome.initial_genotype().view(-1).tolist(),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
