"""The client's own copy of a model's public files: its tokenizer, and what ends its answers.

Owns when they are looked for, which is once in a session, and the comparison with what the owner announced.
"""

from __future__ import annotations

from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.models import checkpoint
from crypten_llm.models import tokenizer as tokenizers
from crypten_llm.session.defaults import Defaults
from crypten_llm.session.grammar import Grammar, Grammars


class ClientFolder:
    """Named as for ``checkpoint.resolve_model``; a hub may have to be asked for it, but never for weights.

    is_guess: that of the client's --model, where the owner has its own: right only if the owner says so.
    """

    def __init__(self, source: str, offline: bool, tokenizer: Any = None, is_guess: bool = False) -> None:
        self.source, self.offline, self.is_guess = source, offline, is_guess
        self._tokenizer = tokenizer
        self._has_none = False
        self._compared: str | None = None
        self._defaults: Defaults | None = None
        self._grammars: Grammars | None = None

    def tokenizer(self, theirs: str | None) -> Any:
        """theirs: digest of the owner's vocabulary. Raises UsageError when there is none, or it is another one's."""
        if self._tokenizer is None:
            self._tokenizer = checkpoint.load_tokenizer(self.source, self.offline)
        self._compare(theirs)
        return self._tokenizer

    def has_tokenizer(self, theirs: str | None) -> bool:
        """Whether there is one. Raises UsageError for another model's."""
        if self.is_guess and theirs is None:
            return False
        if self._tokenizer is None and not self._has_none:
            try:
                self._tokenizer = checkpoint.load_tokenizer(self.source, self.offline)
            except UsageError:
                self._has_none = True
        if self._tokenizer is not None:
            self._compare(theirs)
        return self._tokenizer is not None

    def defaults(self, theirs: str | None) -> Defaults:
        """What its files say of answers; nothing where there are none. Raises UsageError for one that is broken."""
        if self._defaults is None:
            tokenizer = self._tokenizer if self.has_tokenizer(theirs) else None
            try:
                folder = checkpoint.resolve_tokenizer(self.source, self.offline)
            except UsageError:
                self._defaults = Defaults()  # nothing ends an answer early, which ``Result.stop_ids`` tells
            else:
                self._defaults = Defaults.of_folder(folder, tokenizer)
        return self._defaults

    def grammar(self, text: str | None, theirs: str | None) -> Grammar | None:
        """``text`` compiled for its tokenizer. Raises UsageError without one, and for a grammar that cannot be used."""
        if text is None:
            return None
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer(theirs))
        return self._grammars.compiled(text)

    def _compare(self, theirs: str | None) -> None:
        """Raises UsageError when the client's ids stand for other tokens than the owner's, where both are known."""
        if theirs is None and self.is_guess:
            raise UsageError(
                "the owner's model comes without a tokenizer, so nothing says which one it takes; give that model's "
                "tokenizer with --tokenizer (tokenizer=), or token ids"
            )
        if theirs is None or theirs == self._compared:
            return
        if tokenizers.digest_of(self._tokenizer) not in (None, theirs):
            raise UsageError(
                f"the tokenizer of {str(self.source)!r} is not the owner's model's: the same ids stand for "
                "other tokens; give that model's tokenizer with --tokenizer (tokenizer=), or token ids and a folder "
                "without a tokenizer"
            )
        self._compared = theirs
