"""Stage 2: train the tokenizer on the training text of both languages, and write it beside the text.

python -m examples.low_resource.tokenizer
"""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from examples.low_resource.errors import ExampleError, told
from examples.low_resource.settings import DATA, VOCABULARY
from examples.low_resource.text import documents

END = "<|end|>"
"""Ends every text, and therefore also stands before each."""
FOLDER = DATA / "tokenizer"


def train() -> PreTrainedTokenizerFast:
    """Byte-level BPE. Words are cut at spaces alone: the usual expression would cut Tamil at vowel signs."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^ ]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Tamil counts thrice, or there would be so little of it that its words fall into single letters.
    tokenizer.train_from_iterator(documents("english") + 3 * documents("tamil"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


@cache
def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the repository."""
    if not (FOLDER / "tokenizer.json").is_file():
        raise ExampleError(
            f"{FOLDER}: no tokenizer; restore it with `git checkout`, or train it with "
            "`python -m examples.low_resource.tokenizer`"
        )
    return PreTrainedTokenizerFast.from_pretrained(FOLDER)


def encode(texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without marks at its ends."""
    ids: list[list[int]] = load_tokenizer()(texts, add_special_tokens=False)["input_ids"]
    return ids


def main() -> None:
    """Train and write."""
    train().save_pretrained(FOLDER)
    for kind in ("english", "tamil"):
        texts = documents(kind)
        words = sum(len(text.split()) for text in texts)
        print(f"{kind}: {sum(map(len, encode(texts))) / words:.2f} tokens a word")


if __name__ == "__main__":
    told(main)
