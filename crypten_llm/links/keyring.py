"""The secret by which parties on plain links know each other: where it is kept, and who may read it.

Owns a variable of the environment and one file of this user. Parties that are started together are handed a secret of
their own (see ``session.launch``). Parties started by hand or by torchrun are given one in ``CRYPTEN_LLM_LINK_SECRET``;
on one host they need not be: there they share a file that is made at the first start, random and readable by this user
alone, so that another user's process is a stranger. It never stands on a command line.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from crypten_llm.errors import UsageError
from crypten_llm.links.sockets import is_loopback, reason_of

VARIABLE = "CRYPTEN_LLM_LINK_SECRET"
SECRET_BYTES = 32
LEAST_CHARACTERS = 32  # of a secret that a person gives: what is shorter could be guessed from one greeting


def fresh() -> str:
    """A new secret, for parties that are started together."""
    return secrets.token_hex(SECRET_BYTES)


def find(hosts: Iterable[str], tls: str, is_insecure: bool, env: Mapping[str, str] = os.environ) -> bytes:
    """What a party proves itself with to others that it was not started with, by way of these hosts; empty for nothing.

    tls: the folder of keys under which the links are, if any. is_insecure: whether plain ones between hosts are wanted.
    Raises UsageError for links that nothing protects.
    """
    outside = [host for host in hosts if not is_loopback(host)]
    if outside and not (tls or is_insecure):
        raise UsageError(
            f"links by way of {outside[-1]} would be plain TCP, where whoever is between reads weights and prompt; "
            "give --tls DIR (see keys), or --insecure-links where a tunnel protects them"
        )
    secret = given(env)
    return secret if secret or outside or tls else of_this_user(env)


def given(env: Mapping[str, str] = os.environ) -> bytes:
    """The secret that the environment gives; empty when it gives none. Raises UsageError for one that is too short."""
    text = env.get(VARIABLE, "").strip()
    if text and len(text) < LEAST_CHARACTERS:
        raise UsageError(
            f"{VARIABLE} has {len(text)} characters and could be guessed; give every party the same random text of "
            f"{LEAST_CHARACTERS} or more, such as that of 'openssl rand -hex 32'"
        )
    return text.encode()


def of_this_user(env: Mapping[str, str] = os.environ) -> bytes:
    """The secret that all processes of this user on this machine share; made when there is none.

    Raises UsageError for a file that cannot be made, or that others could have read or written.
    """
    path = Path(env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "crypten_llm" / "link.secret"
    try:
        if not path.exists():
            _make(path)
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            if not mine or stat.S_IMODE(found.st_mode) & 0o077:
                raise UsageError(f"{path} is not this user's alone; remove it, and a new one is made at the next start")
            text = file.read(2 * SECRET_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"cannot keep the links' secret in {path} ({reason_of(error)}); give all parties the same {VARIABLE}"
        ) from None
    if len(text) != 2 * SECRET_BYTES:
        raise UsageError(f"{path} holds no secret of {SECRET_BYTES} bytes; remove it, and a new one is made")
    return text


def _make(path: Path) -> None:
    """Writes the file as a whole, or leaves the one that another process has made meanwhile."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(fresh())
    try:
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        new.unlink()
