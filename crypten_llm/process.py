"""Which process this is: after a fork there are two of everything that may be used once.

Owns the mark that streams of masks, tapes and links carry. A child that drew from a stream of its parent would draw the
parent's masks, and a link under TLS would send two messages under one nonce.
"""

import os

from crypten_llm.errors import OneTimeError

_forks = 0  # between this process and the one that imported this module


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


class Owned:
    """Belongs to the process that made it, and to no child of that."""

    __slots__ = ("_forks",)

    def __init__(self) -> None:
        self._forks = _forks

    @property
    def is_here(self) -> bool:
        """Whether this is the process that made it."""
        return self._forks == _forks

    def check(self, what: str) -> None:
        """Raises OneTimeError, which names ``what`` this is, in a child of the process that made it."""
        if self._forks != _forks:
            raise OneTimeError(
                f"{what} belongs to the process that was forked, which would use the same once more; start a session "
                "of this process's own after the fork"
            )
