"""Small tapes, for tests: a program that deals a few values, recorded and opened."""

import socket
import threading
from types import SimpleNamespace

import torch

from crypten_llm.errors import CryptenLLMError
from crypten_llm.links.meter import Meter
from crypten_llm.links.staging import Staging
from crypten_llm.links.transport import Transport
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.manifest import NAMES, make_manifest
from crypten_llm.protocols.dealer.recording import Recording, Sizes
from crypten_llm.protocols.dealer.roles import Dealer
from crypten_llm.protocols.dealer.tape import Tape
from crypten_llm.roles import DEALER

ENGINE = {"activation": 14}
CONFIG = {"hidden_size": 8}
PLAN = {"prompt_tokens": 5, "max_new_tokens": 4, "chunk": 128, "policy": "full"}
VALUE = torch.arange(12).view(3, 4)
KEYS = [((3, 5), torch.uint8), ((2,), torch.int64)]
SECTIONS = ("one", "two", "three")


def program(runtime, sections=SECTIONS):
    """What is dealt in each section: a masked value, keys of an odd size, and a value of 13 bits."""
    dealt = {}
    for label in sections:
        runtime.begin(label)
        mask = runtime.mask((3,))
        first = runtime.deal(VALUE.shape, lambda: VALUE)
        keys = runtime.deal_common(KEYS, lambda: [torch.full(shape, 7, dtype=dtype) for shape, dtype in KEYS])
        dealt[label] = (mask.held, first.held, keys, runtime.deal((1,), lambda: torch.tensor([-5]), 13).held)
        runtime.end()
    return dealt


def record(out, plan=PLAN, requests=2, progress=lambda count: None, program=program, signer=None):
    """A tape of ``program``; returns what the dealer knows."""
    sizes = Sizes()
    links = SimpleNamespace(rank=DEALER, meter=Meter())
    program(Counting(links, sizes))
    manifest = make_manifest(ENGINE, CONFIG, "generate", plan, requests)
    with Recording(out, manifest, sizes, progress, signer) as recording:
        return program(Dealer(links, recording.keys, recording))


def links_of(rank):
    return SimpleNamespace(
        rank=rank, meter=Meter(), staging=Staging(), name=lambda peer: f"rank {peer} ({NAMES[peer]})"
    )


def open_tape(path, party, is_local=True, signers=()):
    return Tape(path, party, links_of(party), is_local, signers)


def compared(owners, clients, engine=ENGINE):
    """What the two parties raise, the owner with the tape in one folder, the client with that in another."""
    ends, errors = socket.socketpair(), []
    links = [Transport(rank, NAMES, {1 - rank: ends[rank]}, timeout=5) for rank in (0, 1)]

    def compare(party, where):
        tape = Tape(where, party, links[party], is_local=True)
        try:
            tape.compare(engine)
        except CryptenLLMError as error:
            errors.append(error)
        finally:
            tape.close()

    threads = [threading.Thread(target=compare, args=pair) for pair in ((0, owners), (1, clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for link in links:
        link.close()
    return errors
