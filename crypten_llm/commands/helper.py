"""A helper at a terminal: stderr says where thin clients come in, and who has gone."""

from __future__ import annotations

from typing import Any

from crypten_llm.commands.show import say, say_outside, who
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.helper import Helper
from crypten_llm.session.local_helper import places_said
from crypten_llm.session.settings import split


def serve(model: str, **settings: Any) -> None:
    """Until Ctrl-C, or until another party ends; settings as for ``from_pretrained``."""
    protocol, _ = split(settings)
    say(who(protocol))
    with PrivateLlama.from_pretrained(model, **settings) as llama:
        say(f"model shared in {llama.load_seconds:.1f} s")
        say_outside(llama)
        helper = Helper(llama, say)
        say(f"{places_said(*helper.places)}; one client after another; Ctrl-C ends it and the parties")
        try:
            helper.serve()
        finally:
            helper.close()
