"""A party's stock: where producers deliver, as long as this runs.

Owns the listener and what is put together; the stock's files outlive it, and sessions take from them as they like.
"""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crypten_llm import files
from crypten_llm.commands.show import say
from crypten_llm.errors import CryptenLLMError, UsageError, last_words, shown
from crypten_llm.links import keyring, sockets
from crypten_llm.links.greeting import Greeter
from crypten_llm.links.meeting import Door
from crypten_llm.links.transport import Transport
from crypten_llm.links.waiting import Wait
from crypten_llm.protocols.dealer.manifest import NAMES
from crypten_llm.protocols.dealer.stock import Stock
from crypten_llm.session.delivery import PARTY, PRODUCER, Keeper, Level
from crypten_llm.session.settings import DEFAULT_TIMEOUT
from crypten_llm.units import size

if TYPE_CHECKING:
    import socket

    from crypten_llm.links.tls import Links

RUN = "stock"  # of greetings: these links are no run's
DEALER = "dealer"
_FOREVER = 3600.0


@dataclass(frozen=True)
class Where:
    """tls, insecure_links, timeout: as of a run (``settings``). metrics_port: 0 for none."""

    tls: str = ""
    insecure_links: bool = False
    timeout: float = DEFAULT_TIMEOUT
    metrics_port: int = 0
    metrics_address: str = "127.0.0.1"


def roles_of(party: int) -> tuple[str, str]:
    """On a link between a party's keeper and a producer, which is a dealer."""
    return NAMES[party], DEALER


def greeter(party: int, rank: int, host: str, where: Where, own: str = "") -> Greeter:
    """own: at a producer, the role whose key it has."""
    secret = keyring.find((host,), where.tls, where.insecure_links)
    return Greeter(rank, roles_of(party), RUN, secret, _links(party, rank, where, own))


def _links(party: int, rank: int, where: Where, own: str) -> Links | None:
    if not where.tls:
        return None
    from crypten_llm.links import tls  # plain links need no X.509

    roles = [own] if own else tls.producers(where.tls)
    if not roles:
        raise UsageError(
            f"--tls: {where.tls} has the certificate of no producer; pin it: python -m crypten_llm keys 'producer 1' "
            "--pin FILE"
        )
    return tls.Links(where.tls, roles_of(party), rank, {PRODUCER: roles})


def read_levels(path: str) -> list[Level]:
    """Raises UsageError for a file that is none of levels."""
    levels: list[Level] = files.read_json(path, list[Level])
    shapes = Counter(level.plan() for level in levels)
    if not levels or max(shapes.values()) > 1:
        raise UsageError(f"--levels: {path} names no shape, or one twice; give each shape once")
    return levels


class Shop:
    """A listener at which producers come to one keeper, each in a thread of its own."""

    def __init__(self, keeper: Keeper, listener: socket.socket, greeter: Greeter, timeout: float) -> None:
        self._keeper, self._listener, self._greeter, self._timeout = keeper, listener, greeter, timeout

    def run(self) -> None:
        """Until an exception: Ctrl-C, SIGTERM."""
        with Door(self._listener, lambda sock, wait: self._greeter.answer(sock, {PRODUCER}, wait)) as door:
            while True:
                try:
                    came = door.next(Wait(_FOREVER))
                except TimeoutError:
                    continue
                except CryptenLLMError as error:
                    say(shown(f"a producer was turned away: {last_words(error)}"))
                    continue
                assert came is not None, "nobody is watched here"
                threading.Thread(target=self._follow, args=(came[1],), daemon=True).start()

    def _follow(self, sock: socket.socket) -> None:
        transport = Transport(PARTY, self._greeter.roles, {PRODUCER: sock}, timeout=self._timeout)
        try:
            self._keeper.follow(transport)
        except CryptenLLMError as error:
            say(shown(f"a producer has left: {last_words(error)}"))
            transport.abort("the keeper goes on without this link")


def keep(
    role: str, folder: str, address: str, port: int, levels: str = "", gigabytes: float = 0.0, where: Where = Where()
) -> None:
    """Until Ctrl-C or SIGTERM; levels: a file, at the client. Raises UsageError for what cannot be kept."""
    if role not in NAMES:
        raise UsageError(f"a stock is the {' or the '.join(NAMES)}'s, not of {role!r}")
    party = NAMES.index(role)
    if bool(levels) != (role == "client"):
        raise UsageError("--levels says what is wanted, at the client's stock and there alone")
    if not gigabytes > 0:
        raise UsageError(f"--most-gigabytes is {gigabytes:g}; it must be above 0")
    is_local = sockets.is_loopback(address) and not where.tls
    signers: Sequence[str] = ()
    if where.tls:
        from crypten_llm.links.signatures import public_keys
        from crypten_llm.links.tls import producers

        signers = [key for role in producers(where.tls) for key in public_keys(where.tls, role)]
    stock = Stock(folder, party, is_local)
    wanted = read_levels(levels) if levels else []
    own = greeter(party, PARTY, address, where)
    keeper = Keeper(stock, wanted, gigabytes * 1e9, signers, lambda name, taken: metrics.settled(name, taken))
    metrics: Any = _metrics(keeper)
    with sockets.listen(address, port) as listener:
        if where.metrics_port:
            from crypten_llm.serving.stock_metrics import expose

            expose(metrics.registry, where.metrics_address, where.metrics_port)
        here = listener.getsockname()
        halves = stock.halves()
        say(
            f"stock of the {role} in {stock.folder}: {len(halves)} halves, {size(sum(h.size for h in halves))}; "
            f"producers deliver at {here[0]}:{here[1]}"
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            Shop(keeper, listener, own, where.timeout).run()
        except KeyboardInterrupt:
            return


def _metrics(keeper: Keeper) -> Any:
    from crypten_llm.serving.stock_metrics import KeeperMetrics, shape_of

    def have() -> dict[str, int]:
        return dict(Counter(shape_of(half.plan) for half in keeper.stock.halves()))

    def wanted() -> dict[str, int]:
        return {shape_of(plan.facts()): level.blocks for level, plan in keeper.levels}

    return KeeperMetrics(have, wanted, lambda: keeper.producers)


def show(role: str, folder: str) -> None:
    """What is in stock, as a JSON object a line."""
    stock = Stock(folder, NAMES.index(role), is_local=True)
    for half in stock.halves():
        print(json.dumps({"id": half.id, "series": half.series, "bytes": half.size, "plan": half.plan}))
