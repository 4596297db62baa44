"""Parties that meet on loopback, for tests."""

from concurrent.futures import ThreadPoolExecutor

import torch

from crypten_llm.errors import CryptenLLMError
from crypten_llm.links.rendezvous import connect

ROLES = ("owner", "client", "dealer")


SECRET = b"thirty-two characters or more....."


def meet(port, ranks=(0, 1, 2), world=3, timeout=5.0, secret=SECRET, **options):
    """Connect these ranks at once; a Transport or the error for each. secret: also by rank, a dict."""

    def of(rank):
        return secret[rank] if isinstance(secret, dict) else secret

    def job(rank):
        try:
            return connect(rank, world, ROLES[:world], "127.0.0.1", port, timeout, secret=of(rank), **options)
        except CryptenLLMError as error:
            assert "\n" not in str(error)
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(job, ranks))


def close(parties):
    for party in parties:
        party.close()


def assert_connected(parties):
    """Every pair exchanges its ranks."""

    def job(party):
        others = [rank for rank in range(party.world) if rank != party.rank]
        return party.all_exchange(others, torch.tensor(party.rank))

    with ThreadPoolExecutor(len(parties)) as pool:
        for received in pool.map(job, parties):
            assert all(rank == tensor.item() for rank, tensor in received.items())
    close(parties)
