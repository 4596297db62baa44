"""A small tokenizer as sentencepiece trains and reads it: of Llama's kind, BPE with bytes for what is no token."""

import json
from pathlib import Path

import sentencepiece

TEXTS = (
    *("The capital of France", "  two", "trailing ", "12 naïve 日本 🙂", "a\nb\tc", "", " ", "ends.", "İstanbul ﬁ"),
    *("the rounds of a layer", "theory of everything, said 'they'", "x" * 60, "éé e\u0301"),
)
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def train(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Writes tokenizer.model and tokenizer_config.json into the folder."""
    text = folder / "text.txt"
    text.write_text((Path(__file__).parents[1] / "README.md").read_text("utf-8"), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"add_bos_token": True, "legacy": False}))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def metadata(model: sentencepiece.SentencePieceProcessor, **more) -> dict:
    """Of a GGUF file with this tokenizer, as llama.cpp's converter writes it."""
    count = model.get_piece_size()
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in range(count)
    ]
    made = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in range(count)],
        "scores": [model.get_score(i) for i in range(count)],
        "token_type": kinds,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }
    return {f"tokenizer.ggml.{key}": given for key, given in (made | more).items() if given is not None}
