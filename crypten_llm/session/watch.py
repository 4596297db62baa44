"""Whether the other parties are still there while nothing is asked of them.

Owns that look: a party that dies between two requests is found out before the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crypten_llm.session.api import PrivateLlama


def check(llama: PrivateLlama) -> None:
    """Between two requests of the session. Raises what ended it, which ends all its parties, where a link is closed."""
    transport = llama.party.transport
    if transport is not None and llama.is_open:
        with llama._guarded():
            transport.check_open()
