"""A GGUF file's tokenizer, written out as the ``tokenizer.json`` that Hugging Face's library reads.

Owns what the metadata under ``tokenizer.`` means: byte-level BPE ("gpt2", with a name for how text is split before) and
sentencepiece's BPE ("llama", whose merges follow from the scores). A GGUF file names its rule for splitting text and
does not hold it; a name that is not known here is an error, since another rule would give other ids without a word.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crypten_llm import records
from crypten_llm.errors import UsageError, a_library
from crypten_llm.models.fields import short
from crypten_llm.models.gguf_file import opened, value

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # types of tokens
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ""  # the library's own rule
# How text is split, by tokenizer.ggml.pre. Those of ``_WHOLE_WORDS`` take a word that is a token as it is, whatever its
# merges, and have a first token unless the file says otherwise.
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-2", "smollm"), _GPT2),
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
_EACH_DIGIT = ("smollm",)
_ELSEWHERE = "give the tokenizer of the model it was made from (--tokenizer FOLDER), or token ids with --prompt-ids"


@dataclass(frozen=True)
class _Tokens:
    """Text and type of each id. named: the texts of ``bos_token`` and its like, which count as control tokens."""

    texts: list[str]
    kinds: list[int]
    named: dict[str, str]

    @classmethod
    def of(cls, reader: GGUFReader) -> _Tokens:
        texts = value(reader, "tokenizer.ggml.tokens", list[str]) or []
        kinds = value(reader, "tokenizer.ggml.token_type", list[int]) or [NORMAL] * len(texts)
        if texts and len(kinds) != len(texts):
            raise UsageError(f"it holds {len(texts)} tokens and types of {len(kinds)}; get the file again")
        named = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token = value(reader, f"tokenizer.ggml.{key}_token_id", records.Count)
            if token is not None and token < len(texts):
                named[f"{name}_token"] = texts[token]
                kinds[token] = kinds[token] if kinds[token] == UNKNOWN else CONTROL
        return cls(texts, kinds, named)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids by token, without those that only fill up the embedding table."""
        return {text: i for i, text in enumerate(self.texts) if self.kinds[i] != UNUSED}


def vocabulary(path: str | Path) -> dict[str, int]:
    """Ids by token; empty where the file has no tokens."""
    try:
        return _Tokens.of(opened(path)).vocabulary
    except UsageError as error:
        raise UsageError(f"{path}: {error}; {_ELSEWHERE}") from None


def folder(path: str | Path) -> Path:
    """A folder with the file's tokenizer, which goes when this process ends. Raises UsageError where it cannot be made.

    Its ``config.json`` says no more than a type whose ``tokenizer.json`` transformers uses as it stands.
    """
    return _folder(str(path), opened(path))


@functools.cache
def _folder(path: str, reader: GGUFReader) -> Path:
    try:
        with a_library("the tokenizer", "get the file again"):
            made, names = _made(reader)
    except UsageError as error:
        raise UsageError(f"{path}: {error}; {_ELSEWHERE}") from None
    where = Path(tempfile.mkdtemp(prefix="crypten-llm-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    made.save(str(where / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    if template := value(reader, "tokenizer.chat_template", str):
        settings["chat_template"] = template
    for name, content in {"config": {"model_type": "llama"}, "tokenizer_config": settings}.items():
        (where / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return where


def _made(reader: GGUFReader) -> tuple[Tokenizer, dict[str, str]]:
    """The library's tokenizer, and the texts of ``bos_token`` and its like."""
    from tokenizers import AddedToken

    tokens, model = _Tokens.of(reader), value(reader, "tokenizer.ggml.model", str)
    if not tokens.texts:
        raise UsageError("it holds no tokenizer")
    if model not in ("gpt2", "llama"):
        raise UsageError(f"tokenizer.ggml.model is {short(model)}; only 'gpt2' and 'llama' (both BPE) can be read")
    make, has_first = (_byte_level, _pre(reader) in _WHOLE_WORDS) if model == "gpt2" else (_sentencepiece, True)
    made = make(reader, tokens)
    for text, kind in zip(tokens.texts, tokens.kinds, strict=True):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(text, normalized=False, special=kind != USER_DEFINED)])
    _add_ends(made, reader, tokens.named, has_first)
    return made, tokens.named


def _pre(reader: GGUFReader) -> Any:
    return value(reader, "tokenizer.ggml.pre", str)


def _byte_level(reader: GGUFReader, tokens: _Tokens) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = _pre(reader)
    if name not in _SPLITS:
        raise UsageError(f"tokenizer.ggml.pre is {short(name)}, a way to split text that is not known here")
    merges = [tuple(merge.split(" ", 1)) for merge in value(reader, "tokenizer.ggml.merges", list[str]) or []]
    made = Tokenizer(models.BPE(tokens.vocabulary, merges, ignore_merges=name in _WHOLE_WORDS))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if name in _EACH_DIGIT else []
    steps += [pre_tokenizers.Split(Regex(_SPLITS[name]), "isolated")] if _SPLITS[name] else []
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not _SPLITS[name])]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(reader: GGUFReader, tokens: _Tokens) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = value(reader, "tokenizer.ggml.scores", list[float]) or []
    if len(scores) != len(tokens.texts):
        raise UsageError("it holds no tokenizer.ggml.scores, one for each token")
    vocab = tokens.vocabulary
    normal = {token: i for token, i in vocab.items() if tokens.kinds[i] == NORMAL}
    unknown = next((token for token, i in vocab.items() if tokens.kinds[i] == UNKNOWN), None)
    options: dict[str, Any] = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": "<0x00>" in vocab}
    made = Tokenizer(models.BPE(vocab, _merges(normal, scores), **options))
    leads = value(reader, "tokenizer.ggml.add_space_prefix", bool) is not False
    made.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if leads else []), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if leads else steps)
    return made


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Sentencepiece joins the two neighbours whose union has the best score: one merge for each way to cut a token."""
    cuts = [
        (-scores[i], i, vocab[token[:at]], vocab[token[at:]], (token[:at], token[at:]))
        for token, i in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    return [cut[-1] for cut in sorted(cuts)]


def _add_ends(made: Tokenizer, reader: GGUFReader, names: dict[str, str], has_first: bool) -> None:
    """Has the first and the last token of a text added, where the file wants it."""
    from tokenizers import processors

    def wanted(end: str, default: bool) -> list[str]:
        flag = value(reader, f"tokenizer.ggml.add_{end}_token", bool)
        return [names[f"{end}_token"]] if (default if flag is None else flag) and f"{end}_token" in names else []

    first, last = wanted("bos", has_first), wanted("eos", False)
    if first or last:
        ids = [(token, made.token_to_id(token)) for token in dict.fromkeys((*first, *last))]
        made.post_processor = processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=ids)
