"""The cells of the matrix: which merges are measured.

In full products are

- TIES: dtype x zeros x density x slack and ties x rescale, with 2 and 5 models;
- the other sparsified methods: the parameters that choose a path of their kernels, with 2 and 5 models.

For every method, options that have little to do with each other are varied one at a time: arithmetic, dtypes, weights,
election, scope, layouts of memory, a third and a fourth kind of data, 10 models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from merge_engine.methods import METHODS

Options = Mapping[str, Any]

DTYPES = ("bf16", "fp16", "fp32")
MORE_DATA = ("fp32 of bf16", "bf16 and fp16")
"""fp32 that holds bf16 values; a base in bf16 with models in both, which are merged in fp32."""
ZEROS = (0, 20, 50, 80)
"""Per cent of a task vector. 0: what rounding leaves: 17 % in bf16, 2 % in fp16, none in fp32."""
MODELS = (2, 5)

DENSITIES = [{"density": tenths / 10} for tenths in range(1, 10)]
FEW_DENSITIES = DENSITIES[::2]
RESCALES = [{"rescale": how} for how in ("false", "true", "density")]
TIES = [{"ties": how} for how in ("spread", "index", "all")]
TRIM_SLACK = {"trim_slack": 0.1}  # after which ties do not matter
SIGN_SLACKS: list[Options] = [{"sign_slack": 1}, {"sign_slack": 0.5, "sign_slack_mode": "retain"}]
SLACKS: list[Options] = [{}, *SIGN_SLACKS]
DELLA_DENSITIES = [
    {"density": 0.1, "epsilon": 0.05},
    *({"density": density, "epsilon": 0.1} for density in (0.3, 0.5, 0.7)),
    {"density": 0.9, "epsilon": 0.05},
]

LENGTH = 2048
LINES: list[Options] = [{"row": 896}, {"row": LENGTH}, {"row": 8192}, {"row": None}]
"""Lengths of rows; None: the tensor is a single line."""
LAYOUTS: list[Options] = [
    *LINES,
    {"row": None, "cut": 37},
    {"start": 1},
    {"row": None, "cut": 37, "start": 3},
]
"""``cut``: a length that is no multiple of a block. ``start``: elements of memory before the tensor's first one."""

METHODS_ALONE: list[tuple[str, Options]] = [
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("passthrough", {}),
    ("passthrough", {"scale": 0.5}),
    ("slerp", {"t": 0.3}),
    ("nuslerp", {}),
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {}),
    ("karcher", {}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("nearswap", {"t": 0.0002}),
    ("ram", {}),
    ("ramplus_tl", {}),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("arcee_fusion", {}),
    ("task_arithmetic", {}),
]
"""Methods without a density."""

SPARSIFIED: list[tuple[str, Options]] = [
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "ties": "index"}),
    ("breadcrumbs", {"density": 0.7}),
    ("breadcrumbs_ties", {"density": 0.7}),
    ("dare_linear", {"density": 0.5}),
    ("dare_ties", {"density": 0.5}),
    ("della", {"density": 0.5, "epsilon": 0.1}),
    ("della_linear", {"density": 0.5, "epsilon": 0.1}),
]

VARIATIONS: list[Options] = [
    {"arithmetic": "mergekit"},
    {"dtype": "float32"},
    {"dtype": "float32", "out_dtype": "bfloat16"},
    {"out_dtype": "float32"},
    {"out_dtype": "bfloat16"},
    {"weight": 0.3},
    {"lambda": 0.7},
    {"normalize": False},
    {"normalize": True},
    {"elect": "count"},
    {"elect": "count", "sign_slack": 0.5, "sign_slack_mode": "retain"},
    {"trim_scope": "model"},
    {"trim_scope": "model", "ties": "index"},
]
OF_EVERY_METHOD = ("arithmetic", "dtype", "out_dtype")


@dataclass(frozen=True)
class Cell:
    """A merge: method, data, per cent of zeros, number of models, options, and the layout of the tensors in memory."""

    method: str
    data: str
    zeros: int
    models: int
    options: tuple[tuple[str, Any], ...]
    row: int | None = LENGTH
    cut: int = 0
    start: int = 0

    @property
    def label(self) -> str:
        """Method, options and what is unusual about the layout."""
        layout = {"row": self.row or "all", "cut": self.cut, "start": self.start}
        usual = {"row": LENGTH, "cut": 0, "start": 0}
        told = [*self.options, *((name, value) for name, value in layout.items() if value != usual[name])]
        return " ".join((self.method, *(f"{name}={value}" for name, value in told)))


def cells() -> list[Cell]:
    """All cells, each once, with those of the same data in a row."""
    found = dict.fromkeys((*_ties(), *_sparsified(), *_alone(), *_varied()))
    return sorted(found, key=lambda cell: (cell.data, cell.zeros))


def _ties() -> Iterator[Cell]:
    trims = [*_crossed(SLACKS, TIES), TRIM_SLACK]
    yield from _cells(["ties"], _crossed(DENSITIES, trims, RESCALES))
    yield from _cells(["ties"], _crossed(FEW_DENSITIES, TIES), data=MORE_DATA)


def _sparsified() -> Iterator[Cell]:
    some = (0, 80)
    yield from _cells(["breadcrumbs", "breadcrumbs_ties"], _crossed(FEW_DENSITIES, [*TIES, TRIM_SLACK]))
    yield from _cells(["breadcrumbs_ties"], _crossed(FEW_DENSITIES, SIGN_SLACKS), zeros=some)
    yield from _cells(["breadcrumbs", "breadcrumbs_ties"], _crossed(FEW_DENSITIES, RESCALES), zeros=some)
    yield from _cells(["dare_linear", "dare_ties"], _crossed(DENSITIES, RESCALES), zeros=some)
    yield from _cells(["dare_ties"], _crossed(FEW_DENSITIES, SIGN_SLACKS), zeros=some)
    yield from _cells(["della"], _crossed(DELLA_DENSITIES, RESCALES))
    yield from _cells(["della"], DELLA_DENSITIES[2:3], layouts=LINES)
    yield from _cells(["della_linear"], _crossed(DELLA_DENSITIES, RESCALES), zeros=some)
    yield from _cells(["della"], _crossed(DELLA_DENSITIES, SIGN_SLACKS), zeros=some)
    shares = [{"select_topk": options["density"]} for options in DENSITIES]
    yield from _cells(["sce"], _crossed(shares, TIES), zeros=some)


def _alone() -> Iterator[Cell]:
    for method, options in METHODS_ALONE:
        yield from _cells([method], [options])


def _varied() -> Iterator[Cell]:
    for method, options in (*METHODS_ALONE, *SPARSIFIED):
        known = {*OF_EVERY_METHOD, *(parameter.name for parameter in METHODS[method].parameters)}
        varied = [{**options, **more} for more in VARIATIONS if known >= more.keys()]
        yield from _cells([method], varied, zeros=[50])
        yield from _cells([method], [options], zeros=[50], layouts=LAYOUTS)
        yield from _cells([method], [options], zeros=[0, 50], data=MORE_DATA)
        yield from _cells([method], [options], zeros=[0, 50], models=[10])


def _cells(
    methods: Iterable[str],
    options: Iterable[Options],
    data: Iterable[str] = DTYPES,
    zeros: Iterable[int] = ZEROS,
    models: Iterable[int] = MODELS,
    layouts: Iterable[Options] = ({},),
) -> Iterator[Cell]:
    """A full product. A method takes as many of the models as it can: where only one or two, once."""
    for method, chosen, kind, share, count, layout in product(methods, options, data, zeros, models, layouts):
        most = METHODS[method].max_models or count
        yield Cell(method, kind, share, min(count, most), tuple(chosen.items()), **layout)


def _crossed(*choices: Iterable[Options]) -> list[Options]:
    """One of each, in every combination."""
    return [{name: value for one in chosen for name, value in one.items()} for chosen in product(*choices)]
