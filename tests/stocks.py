"""Small stocks, for tests: blocks of a few values, and keepers with their producers in this process."""

import threading
from contextlib import contextmanager, suppress
from types import SimpleNamespace

from tapes import CONFIG, ENGINE, links_of, program
from transports import socket_pair

from crypten_llm.errors import CryptenLLMError
from crypten_llm.links.meter import Meter
from crypten_llm.links.transport import Transport
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.layout import path_in
from crypten_llm.protocols.dealer.manifest import NAMES, PARTIES, make_manifest
from crypten_llm.protocols.dealer.recording import Recording, Sizes
from crypten_llm.protocols.dealer.roles import Dealer
from crypten_llm.protocols.dealer.stock import Stock
from crypten_llm.roles import DEALER
from crypten_llm.session.delivery import PARTY, PRODUCER, Keeper, Level, Line

SERIES = "0123456789abcdef"
LEVELS = [Level(8, 4, 2), Level(16, 4, 1)]


def dealt(out, plan=None, series=SERIES):
    """A block, as two files in ``out``; its manifest."""
    sizes, links = Sizes(), SimpleNamespace(rank=DEALER, meter=Meter())
    program(Counting(links, sizes))
    facts = (plan or LEVELS[0].plan()).facts()
    with Recording(out, make_manifest(ENGINE, CONFIG, "generate", facts, 1, series), sizes) as recording:
        program(Dealer(links, recording.keys, recording))
    return recording.manifest


def put(stocks, out, plan=None, series=SERIES):
    """A block into these; its id."""
    name = dealt(out, plan, series).id
    for stock in stocks:
        path_in(out, stock.party).rename(stock.arriving(name))
        stock.settle(name)
    return name


def put_all(producer, folder, plan, out):
    """A real block into both halves of a stock on this machine; its id."""
    block = producer.prepare(plan, out)
    producer.deal(plan, block)
    for party in PARTIES:
        stock = Stock(folder, party, is_local=True)
        assert path_in(out, party).stat().st_size == block.bytes(party)
        path_in(out, party).rename(stock.arriving(block.manifest.id))
        stock.settle(block.manifest.id)
    return block.manifest.id


def take(stock, half):
    return stock.take(half, links_of(stock.party), ENGINE)


@contextmanager
def lines(*keepers, timeout=5.0):
    """A producer's links to these; ``sockets`` of each are its own."""
    opened, threads = [], []
    for keeper in keepers:
        ours, theirs = socket_pair()
        roles = (NAMES[keeper.stock.party], "dealer")
        there = Transport(PARTY, roles, {PRODUCER: theirs}, timeout=timeout)
        here = Transport(PRODUCER, roles, {PARTY: ours}, timeout=timeout)

        def follow(keeper=keeper, there=there):
            with suppress(CryptenLLMError):
                keeper.follow(there)
            there.close()

        threads.append(threading.Thread(target=follow))
        threads[-1].start()
        opened.append(Line(here, keeper.stock.party))
    try:
        yield opened
    finally:
        for line in opened:
            line.transport.close()
        for thread in threads:
            thread.join(5)


def keepers(folder, **options):
    """The owner's and the client's, on this machine."""
    made = [Stock(folder, party, is_local=True) for party in PARTIES]
    return [Keeper(stock, LEVELS if stock.party else (), **options) for stock in made]
