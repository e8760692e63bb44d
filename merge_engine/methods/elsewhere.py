"""Names of mergekit's methods and of their parameters, for messages and warnings."""

from __future__ import annotations

MERGEKIT_METHODS = frozenset(
    (
        *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties"),
        *("dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"),
        *("model_stock", "nearswap", "arcee_fusion", "passthrough", "sce", "ram", "ramplus_tl"),
    )
)
"""The methods of mergekit 0.1.5."""

MERGEKIT_PARAMETERS = frozenset(
    (
        # of methods
        *("alpha", "eps", "filter_wise", "int8_mask", "max_iter", "normalize_weights", "nuslerp_flatten"),
        *("nuslerp_row_wise", "r", "select_topk", "t", "tol"),
        # of mergekit-evolve, and of older versions
        *("allow_negative_weights", "consensus_method", "embed_slerp", "layer_granularity", "smooth"),
        # keys of other places
        *("arithmetic", "dtype", "out_dtype", "pad_to_multiple_of", "seed"),
    )
)
"""Names under ``parameters`` in published recipes, beside the parameters of the methods that are here."""
