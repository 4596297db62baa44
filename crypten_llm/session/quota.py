"""How many tokens an owner answers with: in a session, and in a day over all sessions with its model.

Owns the count. What a step shows a client tells it something of the weights, all logits much and an id little; how
often it may ask is the owner's to say. A request's longest answer is taken before it starts, and what it did not need
is given back, so that a process that is killed has counted too many and never too few.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from crypten_llm.errors import UsageError, unheard

LARGEST = 1 << 16  # bytes of a file that is a count


class Quota:
    """session, day: most tokens, 0 for no limit. The days are those of UTC.

    The day's count is a file for each model, by the path of its folder: ``count_file``.
    """

    def __init__(self, session: int = 0, day: int = 0) -> None:
        self.session, self.day = session, day
        self._model: str | Path = ""
        self._taken = self._open = 0  # tokens of the session; of the request that runs

    def begin(self, model: str | Path) -> None:
        """A session in which that model is shared."""
        self._model = model

    @contextmanager
    def taken(self, answers: Sequence[int], shown: Callable[[], int]) -> Iterator[None]:
        """Around a request whose answers may have as many tokens, each; shown: how many it has shown in all.

        Raises: as ``more``.
        """
        self._open = 0
        self.more(answers)
        try:
            yield
        finally:
            unused = self._open - shown()
            self._taken -= unused
            if self.day and unused:
                self._add(-unused, self.day)

    def more(self, answers: Sequence[int]) -> None:
        """Takes them beside those of the request that runs.

        Raises UsageError, which all parties may read, where that is more than is left, or no number of tokens; nothing
        has happened then.
        """
        for asked in answers:
            if type(asked) is not int or asked < 1:
                raise UsageError(f"an answer of {str(asked)[:20]} tokens is asked for; it must be 1 or more")
        tokens = sum(answers)
        if self.session and self._taken + tokens > self.session:
            raise UsageError(
                f"this owner answers with {self.session} tokens a session, of which {self.session - self._taken} are "
                f"left, and {tokens} are asked for; ask for fewer (--max-new-tokens)"
            )
        if self.day and not self._add(tokens, self.day):
            raise UsageError(
                f"this owner answers with {self.day} tokens a day (UTC), of which fewer than the {tokens} that are "
                "asked for are left; ask for fewer (--max-new-tokens), or tomorrow"
            )
        self._taken += tokens
        self._open += tokens

    def _add(self, tokens: int, most: int) -> bool:
        """Counts them, unless the day's count would pass ``most``; whether it has."""
        with unheard():
            path, today = count_file(self._model), datetime.now(UTC).date().isoformat()
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # other sessions count in the same file
                    day, count = _read(path, file.read(LARGEST))
                    count = max(0, (count if day == today else 0) + tokens)
                    if count > most:
                        return False
                    file.seek(0)
                    file.truncate()
                    json.dump({"day": today, "tokens": count}, file)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise UsageError(
                    f"cannot count the day's tokens in {path}: {error.strerror}; make it writable, name another folder "
                    "with XDG_STATE_HOME, or leave --day-tokens out"
                ) from None
        return True


def count_file(model: str | Path) -> Path:
    """Where the tokens of a day with that model are counted: crypten-llm/ in $XDG_STATE_HOME or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    name = hashlib.sha256(os.fsencode(Path(model).resolve())).hexdigest()[:16]
    return Path(state) / "crypten-llm" / f"tokens-{name}.json"


def _read(path: Path, text: str) -> tuple[str, int]:
    """The day and its count. Raises UsageError for what is no count: to begin anew is the owner's to say."""
    if not text:
        return "", 0
    try:
        found = json.loads(text)
        day, tokens = found["day"], found["tokens"]
        if not isinstance(day, str) or type(tokens) is not int or tokens < 0:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UsageError(f"{path} is no count of a day's tokens; remove it to count from zero") from None
    return day, tokens
