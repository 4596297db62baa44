"""What the digests of a receipt add to a token: SHA-256 over all that a party sends and receives.

    python -m experiments.measure.transcripts --steps 20

Decode steps of SmolLM2's sizes after 256 tokens on engine ``wire``, all parties on this machine, with a tape and with a
live dealer. Prints milliseconds a token: its time, and the client's processor's on the digests of its links, the timer
with it. ``at once`` delays the token; ``waiting`` is what is done while the party waits for another one.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import thread_time
from typing import Any
from unittest.mock import patch

from crypten_llm.commands.deal import deal
from crypten_llm.links.transcript import Chain
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from crypten_llm.session.settings import split
from experiments.measure.compare_engines import SHAPES
from experiments.tools.command import command
from experiments.tools.tables import print_table


class Clock:
    """Seconds in which a chain is added to, and in which it catches up; bytes; of the steps after those to warm up."""

    def __init__(self, llama: PrivateLlama) -> None:
        self._llama, self._meter = llama, None
        self.seconds = {"add": 0.0, "catch_up": 0.0}
        self.bytes = 0

    def timed(self, name: str) -> Callable[..., None]:
        method = getattr(Chain, name)

        def run(chain: Chain, *given: Any) -> None:
            meter: Any = self._llama.party.engine.meter
            if meter.cell[0] != "decode":
                return method(chain, *given)
            if meter is not self._meter:
                self._meter, self.bytes, self.seconds = meter, 0, {"add": 0.0, "catch_up": 0.0}
            before, started = chain.bytes, thread_time()
            method(chain, *given)
            self.seconds[name] += thread_time() - started
            self.bytes += chain.bytes - before

        return run


def measure(shape: Shape, with_tape: bool, timeout: float) -> dict:
    """Milliseconds and bytes a token at the client."""
    settings: dict = {"engine": "wire", "timeout": timeout}
    with tempfile.TemporaryDirectory(prefix="transcripts-") as folder:
        if with_tape:
            settings["tape"] = str(Path(folder) / "tape")
            deal(shape, settings["tape"], say=lambda line: None)
        with PrivateLlama(*split(settings)) as llama:
            clock = Clock(llama)
            with patch.multiple(Chain, add=clock.timed("add"), catch_up=clock.timed("catch_up")):
                figures, _ = llama.bench(shape)
    token, at_once, waiting = figures["seconds_per_step"], *(each / shape.steps for each in clock.seconds.values())
    return {
        "dealer": "tape" if with_tape else "live",
        "token": round(1e3 * token, 2),
        "at once": round(1e3 * at_once, 2),
        "waiting": round(1e3 * waiting, 2),
        "part at once": f"{100 * at_once / token:.2f} %",
        "MB": round(clock.bytes / shape.steps / 1e6, 2),
    }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="decode steps (default: 20)")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of every wait (default: 300)")
    arguments = parser.parse_args()
    shape = replace(SHAPES["SmolLM2"], steps=arguments.steps)
    print_table([measure(shape, with_tape, arguments.timeout) for with_tape in (True, False)])


if __name__ == "__main__":
    sys.exit(main())
