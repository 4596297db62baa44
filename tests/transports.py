"""What tests of transports share: sockets on loopback, one thread per party, the header of a frame, an error's text."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from crypten_llm.errors import PartyError
from crypten_llm.links.frames import DTYPES, HEADER, MAGIC, TENSOR

ROLES = ("owner", "client", "dealer")


def socket_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


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
