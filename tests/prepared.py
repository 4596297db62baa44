"""What the server of forks does once, so that no fork does it again: imports, and reading compiled loops from disk.

A party that starts by itself imports Numba and the engines when it needs them, and each of its loops is compiled, or
read, when it is called first. That is most of what a run of a tiny model costs. Here three roles in one process take a
token of each kind of cache; they end before anything is forked, and what they drew is theirs alone.
"""

import gc

import torch

from crypten_llm.engines.crypten import engine as crypten_engine  # noqa: F401
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.session import api, bench  # noqa: F401
from crypten_llm.session.party import Party

SHAPE = bench.Shape(hidden=32, heads=4, kv_heads=2, ffn=64, kv_len=16, steps=1, vocab=64)


def _play(transport) -> None:
    party = Party(WireEngine(transport), transport, compute_parties=2)
    if party.is_client:
        party.request_bench(SHAPE)
        party.close()
    else:
        party.serve()


torch.set_num_threads(1)
run_roles(_play)
gc.freeze()  # what forks share: looking through it would copy it
