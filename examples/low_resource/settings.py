"""Every number of the experiment: seeds, text, tokenizer, model, stages, tasks and merges.

A finished stage keeps its settings. If they are changed here, it is refused until its folder is removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
"""The cleaned text and the tokenizer, part of the repository."""
MODELS = HERE / "models"
"""The shipped checkpoints of one seed, in float16."""
RECIPES = HERE / "recipes"
RUNS = HERE / "runs"
"""What training, merging and evaluating write; not part of the repository."""

SEEDS = (0, 1, 2, 3)
"""A seed decides the initial weights and the order of the data of all stages. Task items are the same for all."""
SHIPPED_SEED = 0


@dataclass(frozen=True)
class Package:
    """A Debian package, and the file that it must be."""

    name: str
    version: str
    url: str
    sha256: str


_POOL = "https://deb.debian.org/debian/pool/main"
PACKAGES = (
    Package(
        "libreoffice-l10n-ta",
        "4:7.4.7-1+deb12u14",
        f"{_POOL}/libr/libreoffice/libreoffice-l10n-ta_7.4.7-1+deb12u14_all.deb",
        "88a3c6c020aa6e024bbd18be3e5e404cb54550857746f41c5d8e268faea6aa1a",
    ),
    Package(
        "libreoffice-help-en-us",
        "4:7.4.7-1+deb12u14",
        f"{_POOL}/libr/libreoffice/libreoffice-help-en-us_7.4.7-1+deb12u14_all.deb",
        "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    ),
    Package(
        "gnome-user-docs",
        "43.0-2",
        f"{_POOL}/g/gnome-user-docs/gnome-user-docs_43.0-2_all.deb",
        "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f",
    ),
)
HELD_OUT_PAIRS, HELD_OUT_ENGLISH = 0.2, 0.05
"""Shares of the pairs and of the English paragraphs that no stage trains on."""

VOCABULARY = 3072

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
}
"""A Llama of 1.25 million parameters."""

SEQUENCE, BATCH = 96, 16
"""Tokens of a sequence and sequences of a step, when language is modelled."""


@dataclass(frozen=True)
class Training:
    """One stage: steps, learning rate, and whether it falls to a tenth or stays as it is."""

    steps: int
    learning_rate: float
    decays: bool


BASE = Training(steps=455, learning_rate=4e-3, decays=True)
BASE_TEXT = {"english": 0.78, "english_short": 0.20, "tamil": 0.02}
"""Shares of the tokens by kind of text."""

CT = Training(steps=700, learning_rate=2e-3, decays=False)
"""A constant rate, so that every snapshot is what a run of that length would have given."""
CT_TEXT = {"tamil": 0.45, "bilingual": 0.25, "english": 0.30}
CT_SNAPSHOTS = (40, 100, 200, 400, 700)

SFT = Training(steps=1200, learning_rate=1e-3, decays=True)
SFT_BATCH = 24
"""Task items of a step. The loss is on the answers alone, and the embeddings are frozen: they hold the Tamil."""

WORDS = (4, 14)
"""Fewest and most words of a sentence in a task."""
ITEMS = {("tamil", "edge"): 700, ("tamil", "cloze"): 500, ("english", "edge"): 200, ("english", "cloze"): 200}
"""Test items by language and task, at most."""
BPB_TEXTS = 300
"""Held-out Tamil texts whose bits per byte are measured."""


def ct_tokens(steps: int) -> int:
    """Tokens that a snapshot of CT has seen."""
    return steps * SEQUENCE * BATCH


SLACKS = {"ties_elect": (1, 2, 4), "ties_retain": (0.3, 0.6), "ties_trim": (0.25, 0.5)}
"""Values of SFT's slack that are tried, by recipe."""
SHIPPED_CT = (100, 400, 700)
"""CT snapshots that the repository holds: with base and SFT five checkpoints of 2.5 MB."""

_WEIGHTS = {"weight[0]": (0.0, 1.5), "weight[1]": (0.0, 1.5)}
_TIES = _WEIGHTS | {"density": (0.1, 1.0), "normalize": [True, False]}
SEARCH_SPACES: dict[str, dict[str, object]] = {
    "task_arithmetic": {**_WEIGHTS},
    "ties": {**_TIES},
    "ties_elect": {**_TIES, "sign_slack[1]": (0.0, 8.0)},
    "ties_retain": {**_TIES, "sign_slack[1]": (0.0, 1.0)},
    "ties_trim": {**_TIES, "trim_slack[1]": (0.0, 0.9)},
}
"""What a search varies, by recipe. Model 0 is CT, model 1 SFT; each space holds both alone."""
SEARCH_TRIALS = 50
"""Proposals for each recipe, after its own values."""
SEARCH_SENTENCES, SEARCH_TEXTS = 200, 100
"""English sentences, with an item of each task, and Tamil texts that score a trial, of the half that chooses."""
SEARCH_JUDGING_TEXTS = 150
"""Tamil texts of the half that judges; it has items for all its sentences."""
SEARCH_REFERENCE = (1.1, 0.25)
"""Tamil bits per byte and English accuracy that count for nothing: about those of the base in the study, and chance."""
SEARCH_BUDGETS = (0.7, 0.75, 0.8, 0.9, 1.0)
"""Tamil bits per byte that a merge may take."""
SEARCH_RESAMPLES = 4000
"""Draws of the bootstrap."""
