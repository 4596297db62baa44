"""Trains the byte-level BPE tokenizer on the corpus: `python -m experiments.model.tokenizer --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from experiments.model.corpus import Encoder, sample
from experiments.model.drafts import TASKS
from experiments.model.lexicon import POOLS
from experiments.model.writer import SPLITS
from experiments.tools.command import command

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def _wrap(tokenizer: Tokenizer, positions: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def _blank() -> Tokenizer:
    """Bytes only: any text round-trips, each digit stands alone, a space belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trainer(vocab: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )


def train_tokenizer(vocab: int = 2048, positions: int = 4096, documents: int = 40) -> PreTrainedTokenizerFast:
    """Tokenizer of `vocab` entries trained on documents of every task and on the word lists."""
    # Lengths are counted in tokens, so writing documents takes a tokenizer: bytes will do here.
    bytes_only = _blank()
    bytes_only.train_from_iterator([], _trainer(300))
    encode = Encoder(_wrap(bytes_only, positions))
    texts = []
    for task in TASKS:
        for i in range(documents):
            drawn = sample(task, 4096, i, encode, split=SPLITS[0], seed=-1)
            texts.append(drawn.prompt + drawn.answer)
    # Words that can be answers stay whole, however rare in the documents.
    texts += [" " + word for words in POOLS.values() for word in words] * 400
    tokenizer = _blank()
    tokenizer.train_from_iterator(texts, _trainer(vocab))
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]),
        ]
    )
    return _wrap(tokenizer, positions)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write tokenizer.json into")
    args = parser.parse_args()
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(args.out)
    words = [word for pool in POOLS.values() for word in pool]
    split = [word for word in words if len(tokenizer.tokenize(" " + word)) > 1]
    print(f"{len(tokenizer)} tokens written to {args.out}; words in several tokens: {split or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
