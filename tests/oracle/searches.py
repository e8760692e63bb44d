"""mergekit-evolve's own command and a problem of mergenetic, searching through sessions of this engine.

Both search for the weights of a known merge of small models, and must come near to it. Every candidate is held against
a plain run. Prints a line for each; the exit code says whether all is as it should be (tests/oracle/README.md).

mergekit-evolve 0.1.5 imports a class for vLLM that no lm_eval beside transformers 5 has at this place, and mergenetic's
problems import all that they could use. What is not there is stood in for: nothing of it is called.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import merge_engine as me
from merge_engine.integrations import evolve, mergenetic
from merge_engine.integrations import mergekit as served

LAYERS = 4
WEIGHTS = (0.7, 0.3)


def stand_in(name: str, **names: object) -> None:
    module: Any = ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module


def make_models(folder: Path) -> dict[str, str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    paths = {}
    for seed, name in enumerate(("base", "first", "second")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_hidden_layers=LAYERS,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        paths[name] = str(folder / name)
    return paths


def target(paths: dict[str, str]) -> dict[str, torch.Tensor]:
    base, *models = (load_file(Path(path) / "model.safetensors") for path in paths.values())
    return {
        name: tensor + sum(w * (model[name] - tensor) for w, model in zip(WEIGHTS, models, strict=True))
        for name, tensor in base.items()
    }


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return sum(float((found[name].float() - tensor).square().sum()) for name, tensor in wanted.items())


def mergekit_evolve(paths: dict[str, str], folder: Path) -> float:
    """The distance of the best recipe that mergekit-evolve's command writes, after every candidate was checked."""
    import lm_eval.models
    import lm_eval.models.huggingface

    stand_in("lm_eval.models.vllm_causallms", VLLM=object)
    lm_eval.models.vllm_causallms = sys.modules["lm_eval.models.vllm_causallms"]
    import mergekit.scripts.evolve as command

    wanted = target(paths)

    def score(merge: me.Merge) -> float:
        found, plain = merge.tensors(), me.run(merge.recipe).tensors
        assert plain is not None and found.keys() == plain.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
        return -distance(found, wanted)

    models = [paths["first"], paths["second"]]
    genome = {"models": models, "base_model": paths["base"], "merge_method": "task_arithmetic"}
    (folder / "evolve.yml").write_text(yaml.safe_dump({"genome": genome, "tasks": []}))
    command.ActorPoolEvaluationStrategy = evolve.strategy_class(score)
    options = ["--max-fevals", "60", "--no-reshard", "--no-merge-cuda"]
    arguments = [str(folder / "evolve.yml"), "--storage-path", str(folder), *options]
    with served.installed() as tally:
        command.main(arguments, standalone_mode=False)
    assert tally.runs == {"task_arithmetic": 1}, tally  # the final model
    tensors = me.run(folder / "best_config.yaml").tensors
    assert tensors is not None
    return distance(tensors, wanted)


def mergenetic_problem(paths: dict[str, str], folder: Path) -> float:
    """The distance of the best of a problem of mergenetic, after every candidate was checked."""
    found = importlib.util.find_spec("mergenetic")
    assert found is not None and found.submodule_search_locations is not None
    stand_in("mergenetic", clean_gpu=lambda: None, __path__=list(found.submodule_search_locations))
    place = f"{found.submodule_search_locations[0]}/optimization"
    stand_in("mergenetic.optimization", __path__=[place])
    stand_in("lm_eval.models.vllm_causallms", VLLM=object)
    from mergenetic.merging import TaskArithmeticMerger
    from mergenetic.optimization.merging_problem import MergingProblem
    from pymoo.algorithms.soo.nonconvex.cmaes import CMAES
    from pymoo.optimize import minimize

    wanted = target(paths)
    models = [paths["first"], paths["second"]]
    form = mergenetic.Form("TaskArithmeticMerger", models, paths["base"], "bfloat16")

    class Problem(MergingProblem):  # type: ignore[misc]
        def load_model(self, path: Path, verbose: bool = True) -> tuple[dict[str, torch.Tensor], None]:
            return load_file(path / "model.safetensors"), None

        def metrics_4_genotype(self, model: Any, tokenizer: Any = None) -> tuple[list[float], str]:
            return [distance(model, wanted)], ""

        def _from_array_to_genotype(self, x: Any) -> Path:
            made: Path = super()._from_array_to_genotype(x)
            found, plain = load_file(made / "model.safetensors"), me.run(form.recipe(x)).tensors
            assert plain is not None and all(torch.equal(found[name], plain[name]) for name in plain)
            return made

        def test(self) -> None:
            raise NotImplementedError

    with me.load(paths["base"], models, device="cpu") as session:
        merger = TaskArithmeticMerger(
            "run", paths["base"], models, folder / "config", folder / "merged", "bfloat16"
        )
        served = mergenetic.SessionMerger(merger, session)
        problem = Problem(served, None, n_var=form.variables, n_obj=1, device="cpu", load_in_4bit=False)
        result = minimize(problem, CMAES(), ("n_evals", 60), seed=1)
    assert len(problem.results_df) >= 60
    return float(result.F[0])


if __name__ == "__main__":
    searches: dict[str, Callable[[dict[str, str], Path], float]] = {
        "mergekit-evolve": mergekit_evolve,
        "mergenetic": mergenetic_problem,
    }
    near = True
    for name, search in searches.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            paths = make_models(folder)
            middle = me.run(
                {
                    "merge_method": "task_arithmetic",
                    "base_model": paths["base"],
                    "models": [{"model": paths["first"]}, {"model": paths["second"]}],
                    "parameters": {"weight": 0.5},
                }
            ).tensors
            assert middle is not None
            start, end = distance(middle, target(paths)), search(paths, folder)
        print(f"{name}: squared distance {start:.3g} before the search, {end:.3g} after it", flush=True)
        near &= end < start / 20
    sys.exit(not near)
