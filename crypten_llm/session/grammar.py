"""Which tokens an answer may go on with, so that its text follows a JSON schema or a grammar; at the client alone.

Owns grammars: how one is written, compiled within limits, and followed token by token. Masks are llguidance's (its
parser is Earley's over a lexer of derivatives of regular expressions). Nothing of this is told to another party: a
grammar changes which token the client draws, and what others see of that is when the answer ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from crypten_llm import limits
from crypten_llm.errors import UsageError, one_line
from crypten_llm.models.tokenizer import Tokenizer, decode
from crypten_llm.session import grammar_trial

KEPT = 32  # compiled grammars of a session
TRIAL_SECONDS = 30.0  # of a process that may compute for grammar_trial.CPU_SECONDS, on a busy machine
# As ``json.dumps`` writes it, and no other space: it would be the client's to pay for. Nothing that the library cannot
# hold an answer to is passed over.
_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


_trying = threading.Lock()  # one process at a time: hostile grammars have one core between them


class NotFollowed(UsageError):
    """No token that the client may choose goes on within its grammar. Of this answer alone: the session goes on."""


def of_schema(schema: Any) -> str:
    """A grammar of the JSON texts that are valid by ``schema``. Raises UsageError for what is no schema."""
    return f"start: {json_rule(schema)}"


def json_rule(schema: Any) -> str:
    """The same, to stand in a rule of a grammar."""
    if not isinstance(schema, dict):
        raise UsageError(f"a JSON schema is {str(schema)[:60]!r}; it must be an object such as {{'type': 'object'}}")
    try:
        return f"%json {json.dumps({**schema, 'x-guidance': _STYLE}, allow_nan=False)}"
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a JSON schema holds what JSON has not ({error}); repair it") from None


def text_of(schema: Any, grammar: Any, has_stops: bool) -> str | None:
    """The grammar of an answer that is to follow either, None of any other; has_stops: whether a text ends it.

    Raises UsageError for both, for what is neither, and for what is too long to be tried.
    """
    if schema is None and grammar is None:
        return None
    if schema is not None and grammar is not None:
        raise UsageError("json_schema and grammar both say what the answer is; give one of them")
    if has_stops:
        raise UsageError("stop would cut an answer that follows a schema, a grammar or tools; leave it out")
    text = of_schema(schema) if grammar is None else grammar
    if not isinstance(text, str):
        raise UsageError(f'grammar is {str(text)[:60]!r}; it must be a text such as \'start: "yes" | "no"\'')
    if len(text) > limits.GRAMMAR:
        raise UsageError(
            f"the schemas and tools of a request have {len(text):,} characters as a grammar; {limits.GRAMMAR:,} is the "
            "most"
        )
    return text


class Grammars:
    """Of one tokenizer: compiles, and keeps what was compiled last. May be asked by several threads."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises UsageError for a tokenizer whose tokens have no known bytes."""
        from llguidance import LLTokenizer

        backend = tokenizer._backend if isinstance(tokenizer, Tokenizer) else _backend_of(tokenizer)
        self._tokenizer = tokenizer
        special = [token for token, added in backend.get_added_tokens_decoder().items() if added.special]
        if not special:
            raise UsageError(
                "the tokenizer has no special token, so none could end a JSON answer; ask without a schema"
            )
        # The library has a token of its own that ends a text; which one it is makes no difference (``Guide.mask``).
        self._own = special[0]
        try:
            self._tokens = LLTokenizer(backend.to_str(), eos_token=self._own)
        except ValueError as error:
            raise UsageError(f"the tokenizer cannot be held to a grammar ({one_line(str(error))[:200]})") from None
        self._kept: dict[str, Any] = {}
        self._lock = threading.Lock()

    def compiled(self, grammar: str) -> Grammar:
        """Raises UsageError for what is no grammar, or one that is too large to be compiled or followed."""
        with self._lock:
            if (found := self._kept.pop(grammar, None)) is not None:
                self._kept[grammar] = found
        if found is None:
            _try(grammar)
            found, wrong = grammar_trial.fault(self._tokens, grammar)
            _check(wrong)
            with self._lock:
                self._kept[grammar] = found
                while len(self._kept) > KEPT:
                    del self._kept[next(iter(self._kept))]
        return Grammar(self, found)

    def is_silent(self, token: int) -> bool:
        """Whether it adds nothing to a text."""
        return decode(self._tokenizer, [token]) == ""

    @property
    def own(self) -> int:
        """The token that ends a text to the library."""
        return self._own


class Grammar:
    """One that is compiled, for any number of answers."""

    def __init__(self, grammars: Grammars, matcher: Any) -> None:
        self._grammars, self._matcher = grammars, matcher

    def guide(self, stop_ids: Sequence[int]) -> Guide:
        """For one answer; stop_ids: what ends it, of which those that are no text end it where the grammar lets it."""
        ends = [token for token in stop_ids if self._grammars.is_silent(token)]
        return Guide(self._matcher.deep_copy(), ends, [*stop_ids, self._grammars.own])


class Guide:
    """One answer within a grammar. is_complete: whether its text is whole, and ends here."""

    def __init__(self, matcher: Any, ends: Sequence[int], never: Sequence[int]) -> None:
        self._matcher, self._ends, self._never = matcher, list(ends), list(never)
        self.is_complete = False

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [V] of which those of tokens that may not come next are -inf.

        Raises NotFollowed where all are. Takes as long for a complete answer as before its last token.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        count = len(scores)
        allowed = torch.zeros(count, dtype=torch.bool)
        found = torch.from_numpy(np.unpackbits(bits, count=min(count, 8 * len(bits)), bitorder="little").astype(bool))
        allowed[: len(found)] = found
        allowed[[token for token in self._never if token < count]] = False
        if self._matcher.is_accepting():
            allowed[[token for token in self._ends if token < count]] = True
        masked = scores.masked_fill(~allowed, -torch.inf)
        if not (masked > -torch.inf).any():
            shown = int((scores > -torch.inf).sum())
            raise NotFollowed(
                f"none of the {shown} tokens that the client was shown goes on within the schema; ask again, for less "
                "strict a schema, or use --reveal logits"
            )
        return masked

    def take(self, token: int) -> None:
        """The token that was drawn. Raises NotFollowed where the library gives up on what follows it."""
        if self.is_complete:
            return
        if token in self._ends:
            self.is_complete = True
            return
        self._matcher.consume_token(token)
        self._check()
        if self._matcher.is_stopped():  # nothing can follow
            self.is_complete = True
            self._matcher.rollback(1)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise NotFollowed(
                f"the schema is too large to be followed ({_words(self._matcher.get_error())}); ask for a simpler one"
            )


def _backend_of(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise UsageError(
            "answers are held to a schema with a tokenizer.json, and this tokenizer has none; get the model's, or ask "
            "without a schema"
        )
    return backend


def _try(grammar: str) -> None:
    """Raises UsageError for a grammar that does not compile in a process that is bounded, or fails there."""
    command = [sys.executable, "-P", grammar_trial.__file__]
    try:
        with _trying:
            ended = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        ended = None
    if ended is None or ended.returncode:
        raise UsageError(
            f"the schema takes more than {grammar_trial.CPU_SECONDS} s or {grammar_trial.MEMORY_BYTES >> 30} GiB to "
            "compile, or is nested too deeply; ask for a simpler one"
        )
    _check(ended.stdout.decode(errors="replace"))


def _check(wrong: str) -> None:
    if wrong:
        raise UsageError(f"the schema cannot be followed ({_words(wrong)}); see docs/serving.md for what can")


def _words(wrong: str) -> str:
    """The library's, without the lines of the grammar that it quotes."""
    said = wrong.partition("<non-verbose/>")[0].strip()
    said = (said.splitlines() or ["unknown"])[0]
    head, _, rest = said.partition(": ")
    return (rest if head.startswith("at ") and rest else said)[:300]
