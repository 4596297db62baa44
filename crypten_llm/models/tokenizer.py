"""Text to token ids and back: the fast path for ``tokenizer.json``, transformers for everything else.

Owns what is read of a folder's tokenizer. Importing transformers' AutoTokenizer and building its object takes about
1.5 s of processor time; the library under it reads the same ``tokenizer.json`` in hundredths of a second. So where
transformers would hand text to that file as it stands, this module does; where it would first change anything, it is
asked itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from crypten_llm import limits
from crypten_llm.errors import UsageError, a_library
from crypten_llm.files import check_regular, read, read_json
from crypten_llm.models import gguf_tokenizer
from crypten_llm.models.gguf_file import is_gguf
from crypten_llm.records import Extract

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder without any of these has no tokenizer."""

_WITHOUT = "repair it, or give token ids with --prompt-ids instead"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # of transformers: tokenizer.json is used as it is
# Keys of tokenizer_config.json that change neither ids nor text where tokenizer.json is used as it is. That is so of
# add_bos_token and add_eos_token too: transformers leaves them out where there is a tokenizer.json.
_HARMLESS = {
    *("tokenizer_class", "added_tokens_decoder", "model_max_length", "max_length", "padding_side", "truncation_side"),
    *("chat_template", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "spaces_between_special_tokens"),
    *("clean_up_tokenization_spaces", "model_input_names", "backend", "is_local", "local_files_only", "name_or_path"),
    *("use_default_system_prompt", "sp_model_kwargs", "transformers_version", "stride", "truncation_strategy"),
    *("pad_to_multiple_of", "pad_token_type_id", "special_tokens_map_file", "processor_class", "tokenizer_file"),
}


class _Model(Extract, frozen=True):
    """vocab: ids by token, or [token, score] in the order of ids."""

    vocab: dict[str, int] | list[tuple[str, float]]


class _Added(Extract, frozen=True):
    id: int
    content: str


class _File(Extract, frozen=True):
    """Of a tokenizer.json, which token each id stands for."""

    model: _Model
    added_tokens: list[_Added] | None = None


class Tokenizer:
    """A ``tokenizer.json``, with ids and text exactly as transformers' tokenizer of that folder gives them.

    ``tokenizer(text)["input_ids"]``, ``decode``, ``tokenize``, the special tokens and their ids are answered here.
    Whatever else is asked of it (tensors, padding, ``apply_chat_template``, ...) is transformers' own, which is
    loaded then (``full``).
    """

    def __init__(self, folder: Path, names: dict[str, str]) -> None:
        """names: of ``bos_token`` and its like, their text. Raises what the library raises for a broken file."""
        from tokenizers import Tokenizer as Backend

        self.folder = folder
        self._names = names
        self._backend = Backend.from_file(str(folder / "tokenizer.json"))
        self._backend.no_truncation()
        self._backend.no_padding()

    def __call__(
        self,
        text: str,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
        **others: Any,
    ) -> dict:
        """``input_ids`` of ``text``, and ``offset_mapping``, [first, end) in characters, when asked for."""
        if not isinstance(text, str) or others:
            asked = {"add_special_tokens": add_special_tokens, "verbose": verbose, **others}
            return self.full(text, return_offsets_mapping=return_offsets_mapping, **asked)
        encoded = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoded.ids} | ({"offset_mapping": encoded.offsets} if return_offsets_mapping else {})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self(text, add_special_tokens=add_special_tokens)["input_ids"]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of ids, a list or a tensor [T] of them."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return self._backend.decode([ids] if isinstance(ids, int) else ids, skip_special_tokens=skip_special_tokens)

    def tokenize(self, text: str) -> list[str]:
        return self._backend.encode(text, add_special_tokens=False).tokens

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    @cached_property
    def full(self) -> Any:
        """transformers' tokenizer of the same folder."""
        return _of_transformers(self.folder)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_names" not in self.__dict__:
            raise AttributeError(name)
        if name in _NAMED:
            return self._names.get(name)
        if (token := name.removesuffix("_id")) in _NAMED:
            return self._backend.token_to_id(self._names[token]) if token in self._names else None
        return getattr(self.full, name)


def load(folder: Path) -> Any:
    """The tokenizer of a folder: a ``Tokenizer`` where that gives what transformers gives, or else transformers' own.

    transformers is used for a folder

    - without ``tokenizer.json`` (``tokenizer.model``, ``vocab.json``);
    - whose ``tokenizer_config.json`` is missing or names a class of its own (``LlamaTokenizer``, ``GPT2Tokenizer``,
      ...), which builds its rules anew and takes little more than the vocabulary from ``tokenizer.json``;
    - whose model is no Llama: other types have corrections of their own;
    - with special tokens that ``tokenizer.json`` does not hold as such, or holds in another way: transformers adds
      them;
    - with a setting that is not known to change nothing (``split_special_tokens``, spaces cleaned up, ...).

    A GGUF file's own is written into a folder of its own first (``gguf_tokenizer``). Code that comes with the folder is
    never run. Raises UsageError when there is no tokenizer or it does not load.
    """
    name, by_file = folder, is_gguf(folder)
    if not by_file and not any((folder / file).exists() for file in FILES):
        raise UsageError(f"{folder}: no tokenizer ({', '.join(FILES)}); give token ids with --prompt-ids instead")
    for file in () if by_file else folder.iterdir():
        check_regular(file)
    with a_library(f"{name}: the tokenizer", _WITHOUT):
        folder = gguf_tokenizer.folder(folder) if by_file else folder
        names = _as_it_stands(folder)
        return _of_transformers(folder) if names is None else Tokenizer(folder, names)


def _of_transformers(folder: Path) -> Any:
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        _check_package(folder / "tokenizer.model")
    from transformers import AutoTokenizer  # takes seconds to import

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _check_package(path: Path) -> None:
    """Raises UsageError when the package that reads ``path`` is missing: transformers names another one."""
    is_tiktoken = re.match(rb"[A-Za-z0-9+/=]+ \d+\s", read(path, limits.TOKENIZER_BYTES)[:4096])
    package = "tiktoken" if is_tiktoken else "sentencepiece"
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"{path} needs the package {package!r}, which is not installed; run 'python -m pip install {package}', get "
            "the model's tokenizer.json, or give token ids with --prompt-ids instead"
        )


def _as_it_stands(folder: Path) -> dict[str, str] | None:
    """The named special tokens of a folder whose ``tokenizer.json`` transformers uses as it is; None of any other."""
    if not (folder / "tokenizer.json").exists() or (folder / "added_tokens.json").exists():
        return None
    model, config = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    if model.get("model_type") != "llama" or config.get("tokenizer_class") not in _GENERIC_CLASSES:
        return None
    content = _json(folder / "tokenizer.json")
    held = {token["id"]: {name: value for name, value in token.items() if name != "id"} for token in _added(content)}
    if "added_tokens_decoder" in config:
        if {int(id): flags for id, flags in config["added_tokens_decoder"].items()} != held:
            return None
    else:
        config = config | _json(folder / "special_tokens_map.json")
    special = {token["content"] for token in held.values() if token["special"]}
    given = {key: value for key, value in config.items() if key in _NAMED or key in _LISTED}
    tokens = [token for value in given.values() for token in (value if isinstance(value, list) else [value])]
    known = _HARMLESS | given.keys()
    if config.keys() - known or any(_text(token) not in special for token in tokens if token is not None):
        return None
    if config.get("clean_up_tokenization_spaces") and content["model"].get("type") != "BPE":
        return None  # of BPE transformers leaves the spaces alone, whatever is asked
    return {name: _text(given[name]) for name in _NAMED if given.get(name) is not None}


def _added(content: dict) -> list[dict]:
    return content.get("added_tokens") or []


def _text(token: Any) -> Any:
    """The text of a special token, which is written as a string or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict:
    """An object from a file; an empty one when there is no such file."""
    return read_json(path, most=limits.TOKENIZER_BYTES) if path.exists() else {}


def encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Raises UsageError where the tokenizer cannot make any of it: its rules are a file's."""
    with a_library("the tokenizer on this text", _WITHOUT):
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of ids, without special tokens. Raises UsageError as ``encode``."""
    with a_library("the tokenizer on these ids", _WITHOUT):
        return tokenizer.decode(ids, skip_special_tokens=True)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt. Where the tokenizer adds a first token, a prompt that begins with its text has it once."""
    ids = encode(tokenizer, prompt)
    bos = tokenizer.bos_token
    if not bos or not prompt.startswith(bos):
        return ids
    first = [tokenizer.bos_token_id]
    return ids[1:] if encode(tokenizer, "")[:1] == first and ids[:2] == first * 2 else ids


def render_chat(tokenizer: Any, messages: list[dict], tools: list[dict] | None = None, opens: bool = True) -> str:
    """A conversation as the tokenizer's chat template writes it, with what it says of ``tools``; opens: up to where the
    next answer begins.

    Raises UsageError when there is no template, or it refuses the messages.
    """
    if not has_chat_template(tokenizer):
        raise UsageError("the tokenizer has no chat template; ask without --chat (chat=, messages=), as text")
    with a_library("the chat template", "ask without --chat"):  # it is a program, and raises what it likes
        given = {} if tools is None else {"tools": tools}
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens, **given)


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """Token ids of what a template wrote, the special tokens with it."""
    return encode(tokenizer, text, add_special_tokens=False)


def check_ids(ids: list[int], vocab_size: int) -> list[int]:
    """Itself; raises UsageError for what is no id of the vocabulary."""
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise UsageError(f"token id {token!r} is not in the vocabulary; ids go from 0 to {vocab_size - 1}")
    return ids


def has_chat_template(tokenizer: Any) -> bool:
    """Whether it says how a conversation is written for its model."""
    if not isinstance(tokenizer, Tokenizer):
        return bool(tokenizer.chat_template)
    if (tokenizer.folder / "chat_template.jinja").exists():
        return True
    return bool(_json(tokenizer.folder / "tokenizer_config.json").get("chat_template"))


def digest(folder: Path) -> str | None:
    """SHA-256 of which token each id stands for; None of a folder or GGUF file without a tokenizer, or with one that
    the packages here cannot read.

    Two files of one model agree, whichever release wrote them, in whichever form, and whatever rules for splitting text
    they hold. Raises UsageError for a ``tokenizer.json`` that cannot be read.
    """
    if is_gguf(folder):
        return _hashed(gguf_tokenizer.vocabulary(folder))
    path = folder / "tokenizer.json"
    if not path.exists():
        try:
            return _hashed(load(folder).get_vocab())
        except UsageError:
            return None
    content = read_json(path, _File, limits.TOKENIZER_BYTES)
    vocabulary = content.model.vocab
    tokens = {row[0]: i for i, row in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
    return _hashed(tokens | {token.content: token.id for token in content.added_tokens or ()})


def _hashed(tokens: dict[str, int]) -> str | None:
    return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest() if tokens else None


def digest_of(tokenizer: Any) -> str | None:
    """``digest`` of the folder that a tokenizer was loaded from."""
    folder = tokenizer.folder if isinstance(tokenizer, Tokenizer) else Path(tokenizer.name_or_path)
    return digest(folder) if (folder / "tokenizer.json").exists() else _hashed(tokenizer.get_vocab())
