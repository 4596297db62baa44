"""What the client's own copy of a model's public files says of its answers: what ends them, and how they are sampled.

Owns the reading of generation_config.json at the client. Nothing here comes from another party: what ends an answer
decides how many logits are opened, and that is for the client to decide. As in transformers, generation_config.json
gives the defaults that a request does not; of what it holds beyond the settings of ``sampling``, the names are told.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.files import read_json
from crypten_llm.models.fields import is_integer, short
from crypten_llm.session.sampling import FILTERS, SamplingConfig

FILE = "generation_config.json"
_TOP_K = 50  # transformers' own, where a model's file asks for sampling and does not say
# Fields that change which token is chosen, with the values that change nothing, and that nothing here follows.
_NOT_FOLLOWED: dict[str, tuple] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "penalty_alpha": (0, 0.0),
    "guidance_scale": (1, 1.0),
}


@dataclass(frozen=True)
class Defaults:
    """stop_ids: tokens that end an answer. stop_source: the file that says so, "" where none does. sampling: of the
    fields of ``SamplingConfig``, those that the model's file sets. max_new_tokens: its own, if any. not_followed: what
    it asks for and does not get.
    """

    stop_ids: tuple[int, ...] = ()
    stop_source: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    not_followed: tuple[str, ...] = ()

    @classmethod
    def of_folder(cls, folder: Path, tokenizer: Any = None) -> Defaults:
        """From the client's own ``folder``: generation_config.json, or else config.json for what ends an answer, and
        with either the end-of-sequence token of its ``tokenizer``.

        Raises UsageError for a file that cannot be used.
        """
        generation = _read(folder / FILE)
        names = (FILE, "config.json")
        found = {name: _ids(folder / name, (generation if name == FILE else _read(folder / name))) for name in names}
        source = next((name for name in names if found[name]), "")
        ids = dict.fromkeys(found[source] if source else ())
        own = getattr(tokenizer, "eos_token_id", None)
        if isinstance(own, int) and own not in ids:
            ids[own] = None
            source = f"{source} and the tokenizer" if source else "the tokenizer"
        return cls(
            tuple(ids),
            source,
            _sampling(folder / FILE, generation),
            _positive(folder / FILE, generation, "max_new_tokens"),
            tuple(name for name, none in _NOT_FOLLOWED.items() if generation.get(name) not in (None, [], *none)),
        )


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def _ids(path: Path, content: dict) -> tuple[int, ...]:
    given = content.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for token in ids:
        if not is_integer(token):
            raise UsageError(
                f"{path}: eos_token_id is {short(given)}; it must be a token id (an integer), or a list of ids"
            )
    return tuple(ids)


def _positive(path: Path, content: dict, name: str) -> int | None:
    value = content.get(name)
    if value is not None and (not is_integer(value) or value < 1):
        raise UsageError(f"{path}: {name} is {short(value)}; it must be 1 or more")
    return value


def _sampling(path: Path, content: dict) -> dict[str, Any]:
    """As transformers reads them: what greedy decoding does not use counts only where the file asks for sampling."""
    samples = content.get("do_sample") is True
    names = ("repetition_penalty", *(FILTERS if samples else ()))
    found = {name: content[name] for name in names if content.get(name) is not None}
    if samples:
        found = {"do_sample": True, "top_k": _TOP_K} | found
    try:
        SamplingConfig(**found)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return found
