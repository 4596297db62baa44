"""Small tapes, for tests: a program that deals a few values, recorded and opened."""

from types import SimpleNamespace

import torch

from crypten_llm.links.meter import Meter
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
    return SimpleNamespace(rank=rank, meter=Meter(), name=lambda peer: f"rank {peer} ({NAMES[peer]})")


def open_tape(path, party, is_local=True, signer=""):
    return Tape(path, party, links_of(party), is_local, signer)
