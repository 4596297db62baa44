"""Who may ask: API keys, and without any the pages and names of this machine alone.

Owns the check before a request is read. With keys, a request brings one. Without, whoever may connect may ask, and that
is any page that a browser on this machine has open: so a request that a page of another origin sent is refused, and one
for a host name that is not this machine's, which a page reaches by changing where its own name leads.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from crypten_llm import files
from crypten_llm.errors import UsageError
from crypten_llm.serving.refusals import Refusal

VARIABLE = "CRYPTEN_LLM_API_KEY"
LEAST_CHARACTERS = 16
OPEN = ("/", "/health")  # say nothing of anybody's requests
LOCAL = ("localhost", "127.0.0.1", "::1")


def read_keys(path: str = "", env: Mapping[str, str] = os.environ) -> list[str]:
    """Keys from a file, one a line, and from the environment; none where neither is given.

    Raises UsageError for one that could be guessed, and for a file that others can read.
    """
    found = [("the environment", env[VARIABLE].strip())] if env.get(VARIABLE, "").strip() else []
    if path:
        text = files.read(path)
        if os.stat(path).st_mode & 0o077:
            raise UsageError(f"--api-keys: others than its owner can use {path}; take that from them (chmod 600)")
        lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
        own = [(path, line) for line in lines if line and not line.startswith("#")]
        found += own
        if not own:
            raise UsageError(f"--api-keys: {path} holds no key; give one a line")
    for where, key in found:
        if len(key) < LEAST_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError(
                f"an API key in {where} has {len(key)} characters or some that no header takes; give "
                f"{LEAST_CHARACTERS} ASCII letters and digits or more, such as those of 'openssl rand -hex 32'"
            )
    return list(dict.fromkeys(key for _, key in found))


class Guard:
    """keys: that may ask; none for everybody. hosts: names of this endpoint, beside those of the machine itself."""

    def __init__(self, keys: Sequence[str] = (), hosts: Sequence[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]
        self._hosts = {*LOCAL, *hosts}

    def check(self, request: HTTPConnection) -> str:
        """The name of the request's key, "" where there are none: a few digits of its digest. Raises Refusal."""
        if request.url.path in OPEN:
            return ""
        if self._digests:
            return self._key(request)
        host = _name(request.headers.get("host", ""))
        if host not in self._hosts:
            raise Refusal(
                403, f"{host[:80]!r} is no name of this endpoint; ask {LOCAL[1]}, or start it with an API key"
            )
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise Refusal(
                403, f"a page of {origin[:80]!r} may not ask this endpoint; start it with an API key for that"
            )
        return ""

    def _key(self, request: HTTPConnection) -> str:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        mine = _digest(given.strip())
        # All are compared, each in constant time: how long it takes tells nothing of any key.
        matches = [hmac.compare_digest(mine, each) for each in self._digests]
        if kind.lower() != "bearer" or not any(matches):
            raise Refusal(
                401, "no API key of this endpoint came with the request; send one as Bearer", "invalid_api_key"
            )
        return mine.hex()[:8]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _name(host: str) -> str:
    """Of a Host header, without its port."""
    return (urlsplit(f"//{host}").hostname or "") if host else ""
