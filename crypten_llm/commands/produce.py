"""A producer: a dealer that deals blocks for a stock, ahead of requests, as long as this runs.

Owns the order of its work. It learns the weights' masks from the owner's keeper and what is wanted from the client's,
deals the emptiest shape first and delivers each party its own half. Any number of them may run, anywhere, each with a
key of its own; they need not know of each other.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crypten_llm.commands.show import say
from crypten_llm.commands.stock import Where, greeter, roles_of
from crypten_llm.errors import PartyError, UsageError, last_words, shown
from crypten_llm.links import rendezvous
from crypten_llm.links.transport import Transport
from crypten_llm.links.waiting import Wait
from crypten_llm.protocols.dealer.layout import BEGIN, path_in
from crypten_llm.protocols.dealer.manifest import NAMES, PARTIES
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.serving.stock_metrics import ProducerMetrics, expose, shape_of
from crypten_llm.session.delivery import PARTY, PRODUCER, Line, Refused
from crypten_llm.session.producing import Producer
from crypten_llm.units import size

if TYPE_CHECKING:
    from crypten_llm.session.plan import Plan
    from crypten_llm.session.series import Series

PAUSE_SECONDS = 1.0  # where nothing is wanted now, before it asks again
AGAIN_SECONDS = 5.0  # after a keeper was not reached, or said no


def place_of(text: str) -> tuple[str, int]:
    """HOST:PORT. Raises UsageError for what is none."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"{text!r} is no place of a keeper; give HOST:PORT")
    return host.strip("[]"), int(port)


class Work:
    """One producer's. places: of the owner's and the client's keeper. own: the role of its key. blocks: after so many
    it ends; 0 for never. scratch: where a block lies until it is delivered.
    """

    def __init__(
        self, places: Sequence[tuple[str, int]], where: Where, own: str, blocks: int, scratch: Path, device: Any
    ) -> None:
        self._places, self._where, self._own, self._blocks = places, where, own, blocks
        self._scratch, self._device = scratch, device
        self._producer: Producer | None = None
        self._signer: Any = None
        if where.tls:
            from crypten_llm.links.signatures import Signer

            self._signer = Signer.of_role(where.tls, own)
        self.metrics = ProducerMetrics()
        self.made = 0

    def run(self) -> None:
        """Until it has made its blocks, or for ever; links that end are made again."""
        while not self._is_done:
            try:
                with self._lines() as lines:
                    while not self._is_done:
                        if not self._turn(lines):
                            time.sleep(PAUSE_SECONDS)
            except PartyError as error:
                say(shown(f"{last_words(error)}; the producer tries again in {AGAIN_SECONDS:g} s"))
                time.sleep(AGAIN_SECONDS)

    @property
    def _is_done(self) -> bool:
        return bool(self._blocks) and self.made >= self._blocks

    @contextmanager
    def _lines(self) -> Iterator[list[Line]]:
        """A link to each keeper, the owner's first."""
        with ExitStack() as opened:
            made = []
            for party, place in zip(PARTIES, self._places, strict=True):
                own = greeter(party, PRODUCER, place[0], self._where, self._own)
                wait = Wait(min(self._where.timeout, 30.0))
                sock = rendezvous.dial(own, PARTY, place, wait, patient=True)
                transport = Transport(PRODUCER, roles_of(party), {PARTY: sock}, timeout=self._where.timeout)
                opened.callback(transport.close)
                made.append(Line(transport, party))
            yield made

    def _turn(self, lines: Sequence[Line]) -> bool:
        """One block, if any is wanted; whether it was made."""
        series = lines[OWNER].terms()
        if series is None:
            return False
        order = lines[CLIENT].order(series.name)
        self.metrics.ordered(order.missing, order.filled)
        if order.plan is None:
            return False
        try:
            self._make(lines, series, order.plan)
        except (Refused, UsageError) as error:
            self.metrics.failed()
            say(shown(f"no block: {last_words(error)}; the producer tries again in {AGAIN_SECONDS:g} s"))
            for line in lines:
                with suppress(Refused):
                    line.discard()
            time.sleep(AGAIN_SECONDS)
            return False
        return True

    def _make(self, lines: Sequence[Line], series: Series, plan: Plan) -> None:
        started, producer = time.perf_counter(), self._of(series)
        producer.check(plan)
        out = self._scratch / "block"
        block = producer.prepare(plan, out)
        name, sizes = block.manifest.id, [block.bytes(party) for party in PARTIES]
        for line, needed in zip(lines, sizes, strict=True):
            line.reserve(name, needed)
        try:
            producer.deal(plan, block)
            for line in lines:
                line.deliver(path_in(out, line.party))
        finally:
            _forget(out)
        for line in lines:  # what is left of a producer that was killed is of no block that anybody takes
            line.settle()
        self.made += 1
        seconds = time.perf_counter() - started
        self.metrics.made(shape_of(block.manifest.plan), sum(sizes), seconds)
        say(f"block {name}, {shape_of(block.manifest.plan)}: {size(sum(sizes))} in {seconds:.1f} s")

    def _of(self, series: Series) -> Producer:
        if self._producer is None or self._producer.series != series:
            self._producer = None  # first: two would take twice the memory
            self._producer = Producer(series, self._signer, self._device)
            say(f"dealing for {self._producer}")
        return self._producer


def _forget(out: Path) -> None:
    """Whoever deals a block forgets it: its keys are overwritten before its files are removed."""
    for party in PARTIES:
        with suppress(OSError), open(path_in(out, party), "r+b") as file:
            file.write(bytes(BEGIN.size))
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(out, ignore_errors=True)


def produce(
    owner: str, client: str, where: Where, own: str = "", blocks: int = 0, scratch: str = "", device: Any = "cpu"
) -> None:
    """Until Ctrl-C or SIGTERM, or after ``blocks``. Raises UsageError for what it cannot be started with."""
    if blocks < 0:
        raise UsageError(f"--blocks is {blocks}; give a number, or 0 for as long as it runs")
    places = [place_of(owner), place_of(client)]
    if where.tls and not own:
        raise UsageError("--tls takes --producer N as well: whose key this producer has, of keys 'producer N'")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="crypten-llm-producer-", dir=scratch or None) as folder:
            work = Work(places, where, own, blocks, Path(folder), device)
            if where.metrics_port:
                expose(work.metrics.registry, where.metrics_address, where.metrics_port)
            say(f"producer for {' and '.join(f'the {n} at {p[0]}:{p[1]}' for n, p in zip(NAMES, places, strict=True))}")
            work.run()
    except KeyboardInterrupt:
        return
    except OSError as error:
        raise UsageError(f"--scratch: cannot use {scratch or tempfile.gettempdir()} ({error.strerror})") from None
