"""Checks of merge_engine.integrations.mergekit that need mergekit: run in its environment, by the tests.

Prints JSON: for each check what went wrong, or null. The names of the checks are those of the functions ``check_...``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods import TensorBatch, TensorGroup, merge_state_dicts, merge_tensors
from safetensors.torch import load_file, save_file

from merge_engine.integrations import mergekit as served
from merge_engine.methods import METHODS

VALUES = {"weight": 0.7, "t": 0.4, "density": 1.0, "select_topk": 0.6, "lambda": 0.8}
"""Parameters of all methods. With a density of 1 the random methods draw nothing."""


def shared_methods() -> Iterator[Any]:
    """mergekit's methods that the engine has too."""
    return (method for method in merge_methods.registered_methods() if method.spec.name in METHODS)


def arguments(method: Any) -> dict[str, Any]:
    """Inputs, base and parameters for a call of ``merge_state_dicts``."""
    contract = method.spec.contract
    base = 0 if contract.base.value in ("required", "optional") else None
    count = min(3, contract.max_inputs or 3)
    generator = torch.Generator().manual_seed(7)
    models = [
        {"a": torch.randn(4, 6, generator=generator, dtype=torch.float64), "n": torch.tensor(3)}
        for _ in range(count)
    ]
    parameters = {p.name: VALUES[p.name] for p in method.spec.parameters if p.name in VALUES}
    return {"models": models, "method": method.spec.name, "base": base, "parameters": parameters}


def gradients(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    inputs = [model["a"].clone().requires_grad_() for model in given["models"]]
    merged = merge_state_dicts(**{**given, "models": [{"a": tensor} for tensor in inputs]})["a"]
    return torch.autograd.grad(merged.square().sum(), inputs)


def check_values() -> None:
    """Every method gives mergekit's values, and the engine computes them."""
    for method in shared_methods():
        given = arguments(method)
        expected = merge_state_dicts(**given)
        with served.installed() as tally:
            found = merge_state_dicts(**given)
        assert list(found) == list(expected)
        torch.testing.assert_close(found, expected, msg=lambda text, name=method.spec.name: f"{name}: {text}")
        unscaled = method.spec.name == "passthrough"  # nothing is computed
        assert tally.tensors == ({} if unscaled else {method.spec.name: 1}) and not tally.handed, tally


def check_gradients() -> None:
    """Every method gives mergekit's; where they are not known here, mergekit computes."""
    for method in shared_methods():
        given = arguments(method)
        expected = gradients(given)
        with served.installed() as tally:
            found = gradients(given)
        torch.testing.assert_close(found, expected, msg=lambda text, name=method.spec.name: f"{name}: {text}")
        assert not tally.handed or method.spec.name == "sce", tally


def check_rescaled_gradients() -> None:
    """The ratio of the norms is differentiated too."""
    for name in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        given = arguments(merge_methods.get(name))
        given["parameters"] |= {"density": 0.6, "rescale": True, "normalize": True}
        expected = gradients(given)
        with served.installed():
            torch.testing.assert_close(gradients(given), expected)


def check_kernels() -> None:
    """A kernel that is called directly is computed by the engine, row by row."""
    batch = TensorBatch(tuple(torch.randn(3, 5) for _ in range(2)))
    weight = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, -0.5]])
    linear = merge_methods.get("linear")
    expected = linear.merge_batch(batch, weight=weight)
    with served.installed() as tally:
        torch.testing.assert_close(linear.merge_batch(batch, weight=weight), expected)
    assert tally.tensors == {"linear": 3}, tally


def check_checkpoints() -> None:
    """mergekit's run_merge, as its commands call it, is the engine's run."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions
    from mergekit.scripts import run_yaml

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(llama(Path(folder) / name, seed)) for seed, name in enumerate(("a", "b"))]

        def config() -> Any:  # mergekit changes the one that it is given
            models = [{"model": path, "parameters": {"weight": 0.25}} for path in paths]
            return MergeConfiguration(merge_method="linear", models=models, dtype="float32")

        theirs, ours = Path(folder) / "theirs", Path(folder) / "ours"
        run_yaml.run_merge(config(), str(theirs), MergeOptions(quiet=True))
        with served.installed() as tally:
            run_yaml.run_merge(config(), str(ours), options=MergeOptions(quiet=True, random_seed=5))
            run_yaml.run_merge(config(), str(ours), MergeOptions(quiet=True))  # replaces the output
        assert tally.runs == {"linear": 2} and not tally.handed, tally
        torch.testing.assert_close(
            load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
        )


def llama(folder: Path, seed: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def check_what_is_handed_over() -> None:
    """mergekit computes methods of the user and other types, with one warning for each reason."""

    @merge_methods.merge_method(name="linear")
    def first(group: TensorGroup) -> torch.Tensor:
        return group.tensors[0]

    one, two = torch.ones(2), torch.zeros(2)
    with served.installed() as tally, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(merge_tensors([one, two], first), one)
        assert merge_tensors([one.long()], "passthrough", parameters={"scale": 2.0}).tolist() == [2, 2]
    assert len(caught) == 2 and "linear with a kernel of the user" in str(caught[0].message), caught
    assert sum(tally.handed.values()) == 4 and not tally.tensors, tally


def check_everything_is_put_back() -> None:
    """After uninstall mergekit is as it was."""
    import mergekit.merge

    linear = merge_methods.get("linear")

    def parts() -> tuple[object, ...]:
        return mergekit.merge.run_merge, merge_methods.MergeMethod._execute_resolved, linear.implementation

    before = parts()
    assert served.install() is served.install()
    assert all(now is not then for now, then in zip(parts(), before, strict=True))
    served.uninstall()
    assert parts() == before


def check_flat_checkpoints() -> None:
    """mergekit-pytorch's graph is served tensor by tensor."""
    from mergekit.graph import Executor
    from mergekit.options import MergeOptions
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge

    with tempfile.TemporaryDirectory() as folder, served.installed() as tally:
        paths = [f"{folder}/{i}.safetensors" for i in range(3)]
        for i, path in enumerate(paths):
            save_file({"w": torch.full((4,), float(i)), "b": torch.arange(4.0) * i}, path)
        config = RawPyTorchMergeConfig(
            merge_method="ties",
            base_model=paths[0],
            models=[{"model": path, "parameters": {"weight": i}} for i, path in enumerate(paths)],
        )
        Executor(plan_flat_merge(config, f"{folder}/out", False, False, MergeOptions())).execute()
        found = load_file(f"{folder}/out/model.safetensors")
    torch.testing.assert_close(found["w"], torch.full((4,), 5 / 3))
    assert tally.tensors == {"ties": 2}, tally


def outcome(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    checks = {name: check for name, check in globals().items() if name.startswith("check_")}
    json.dump({name: outcome(check) for name, check in checks.items()}, sys.stdout)
