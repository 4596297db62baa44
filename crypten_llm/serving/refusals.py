"""What the endpoint says no to, in the shape of OpenAI's errors: one line, and the status that tells who has to act.

Owns the statuses. The client's own machine is all that hears these words, so a message may name what was asked.
"""

from __future__ import annotations

from typing import Any

from crypten_llm.errors import CryptenLLMError, LeftRange, PartyError, UsageError, last_words
from crypten_llm.session.grammar import NotFollowed

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(CryptenLLMError):
    """An answer other than what was asked for.

    status: of HTTP. code: a word for programs. retry_after: seconds after which asking again makes sense. more: fields
    beside the error, such as the price.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, retry_after: int | None = None, **more: Any
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after, self.more = status, code, retry_after, more

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}, **self.more}

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def of(error: BaseException, is_open: bool = True) -> Refusal:
    """What a caller is told of ``error``; is_open: whether the session goes on after it, so that the request is to
    blame.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, LeftRange):
        return Refusal(422, last_words(error), "left_range")
    if isinstance(error, NotFollowed):
        return Refusal(422, last_words(error), "schema_not_followed")
    if not is_open or isinstance(error, PartyError):
        return Refusal(503, last_words(error), "parties_failed")
    if isinstance(error, UsageError):
        return Refusal(400, last_words(error), "invalid_request")
    return Refusal(500, last_words(error), "internal_error")


def stopping() -> Refusal:
    """Of what had no answer when the endpoint was told to end."""
    return Refusal(503, "the endpoint is being stopped; ask again when it is back", "stopping")
