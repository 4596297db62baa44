"""Transports over loopback sockets, for tests: one thread per party, or a bare socket in the test's hands."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from crypten_llm.errors import PartyError
from crypten_llm.links.frames import DTYPES, HEADER, MAGIC, TENSOR
from crypten_llm.links.transport import Transport

ROLES = ("owner", "client", "dealer")


def socket_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


@contextlib.contextmanager
def meshes():
    """What makes the connected transports of `world` parties; closes them afterwards."""
    made = []

    def make(world=2, timeout=5.0, **options):
        sockets = [{} for _ in range(world)]
        for low in range(world):
            for high in range(low + 1, world):
                sockets[low][high], sockets[high][low] = socket_pair()
        made.extend(Transport(rank, ROLES[:world], sockets[rank], timeout=timeout, **options) for rank in range(world))
        return made[-world:]

    yield make
    for transport in made:
        transport.close()


@contextlib.contextmanager
def one_against_raw():
    """A party (rank 0, owner) whose peer is a bare socket in the test's hands."""
    ours, theirs = socket_pair()
    transport = Transport(0, ROLES[:2], {1: ours}, timeout=0.5)
    yield transport, theirs
    transport.close()
    theirs.close()


def together(*jobs):
    """Run one job per party at once; returns their results, raises the first failure."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=30) for future in [pool.submit(job) for job in jobs]]


def error_of(job):
    with pytest.raises(PartyError) as caught:
        job()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header(kind=TENSOR, dtype=DTYPES[torch.int64], sequence=0, size=16, magic=MAGIC):
    return HEADER.pack(magic, kind, dtype, sequence, size, 0)
