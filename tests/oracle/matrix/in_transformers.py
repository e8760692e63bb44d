"""Loads checkpoints in transformers: are all weights found, are logits finite, what do 8 generated tokens cost.

usage: python in_transformers.py FOLDERS.json RESULTS.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

TEXT = "the rain in Spain <extra_shared> stays <extra_a>"
MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]


def loaded(folder: Path) -> dict[str, Any]:
    """What is wrong with a checkpoint, in ``problem``, and what its tokenizer does."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    problem = "; ".join(f"{key}: {', '.join(value[:3])}" for key, value in wrong.items())
    model.eval()
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        if not torch.isfinite(logits).all():
            problem += " logits are not finite"
        if model.can_generate():
            settings = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            made = model.generate(input_ids=ids, **settings)
            if made.shape[1] != 12:
                problem += f" {made.shape[1] - 4} tokens were generated, not 8"
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    written = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    if written > rows:
        problem += f" the tokenizer has {written} tokens, the embedding {rows} rows"
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False) if tokenizer.chat_template else None
    return {
        "problem": problem.strip(),
        "config": {key: value for key, value in config.to_dict().items() if key not in _NOT_COMPARED},
        "vocabulary": tokenizer.get_vocab(),
        "ids": tokenizer(TEXT).input_ids,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "template": rendered,
        "weights": {
            name: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, value in model.state_dict().items()
            if name not in info["missing_keys"]
        },
    }


_NOT_COMPARED = ("transformers_version", "use_cache", "_name_or_path")


def main(folders: str, results: str) -> None:
    """Load each folder."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = {}
    for folder in json.loads(Path(folders).read_text()):
        try:
            found[folder] = loaded(Path(folder))
        except Exception as error:
            found[folder] = {"problem": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
