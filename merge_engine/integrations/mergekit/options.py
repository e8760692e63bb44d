"""mergekit's options: those that are known, and what some of them say of a recipe."""

from __future__ import annotations

import reprlib
from collections.abc import Collection

from merge_engine.errors import OptionError
from merge_engine.recipe import Recipe
from merge_engine.text import did_you_mean

NAMES = frozenset(
    (
        *("allow_crimes", "async_write", "clone_tensors", "copy_tokenizer", "cuda", "device", "gpu_rich"),
        *("lazy_unpickle", "lora_merge_cache", "lora_merge_dtype", "low_cpu_memory", "multi_gpu"),
        *("num_threads", "out_shard_size", "quiet", "random_seed", "read_to_gpu", "safe_serialization"),
        *("transformers_cache", "trust_remote_code", "unsafe_truncate_embeddings", "verbosity"),
        *("write_model_card", "write_threads"),
        "lenient",  # ours
    )
)


def check_names(given: Collection[str]) -> None:
    """Raise ``OptionError`` for options that do not exist: each may have been meant to do something."""
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise OptionError([f"{name}: there is no such option{did_you_mean(name, NAMES)}" for name in unknown])


def with_options(
    recipe: Recipe, *, random_seed: object, allow_crimes: object, unsafe_truncate_embeddings: object
) -> Recipe:
    """The recipe with what the options say about the result. Raises ``OptionError`` for a seed that is none."""
    changes: dict[str, object] = {}
    if random_seed is not None:
        if type(random_seed) is not int or not 0 <= random_seed < 2**64:
            raise OptionError(
                f"random_seed: must be a whole number from 0 to 2**64 - 1, not {reprlib.repr(random_seed)}"
            )
        changes["seed"] = random_seed
    allowed = list(recipe.allow)
    if allow_crimes:
        allowed.append("architecture")
    if unsafe_truncate_embeddings:
        changes["unsafe_truncate_embeddings"] = True
        allowed.append("tokenizer")
    return recipe.model_copy(update=changes | {"allow": tuple(dict.fromkeys(allowed))})
