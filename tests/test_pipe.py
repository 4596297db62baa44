"""The pipe between two cards (``kernels.pipe``) on a machine without any: its order, its room, and who waits."""

import threading
import time
from functools import partial

import pytest
import torch

from crypten_llm.errors import PartyError
from crypten_llm.kernels import pipe
from crypten_llm.links.meter import Meter
from crypten_llm.protocols.dealer import peer
from crypten_llm.protocols.dealer.piped import Pouring, Tapped
from crypten_llm.roles import CLIENT

ROOM = 64 * 8  # bytes


class Memory:
    """Stands for ``OpenedMemory``: a handle is the memory itself."""

    def __init__(self, device, size):
        self.far, self.words = 0, torch.full(((size - Kernels.HEADER) // 8,), -1, dtype=torch.int64)
        self.handle = self

    def open(self, handle):
        return handle, self

    def word(self):
        return self.far


class Kernels:
    """Stands for ``triton_pipe``: what waits there waits here, in a thread of its own for each end."""

    WORD, ROOM, HEADER = 8, ROOM, 256

    def __init__(self):
        self.moved, self.waits, self.pauses = threading.Condition(), 0, 0

    def pause(self, seconds):
        assert seconds < 20, "waits for room that never comes"
        self.pauses += 1
        time.sleep(1e-5)

    def wait(self, addresses, failures, due, polls):
        with self.moved:
            self.waits += addresses[1].far < due
            assert self.moved.wait_for(lambda: addresses[1].far >= due, 20), "waits for what never comes"

    def tell(self, addresses, position):
        with self.moved:
            addresses[0].far = position
            self.moved.notify_all()

    def write(self, data, addresses, start):
        room = addresses[0].words
        places = (start + torch.arange(len(data))) % len(room)
        assert (room[places] == -1).all(), "written over what was not read"
        room[places] = data

    def read(self, count, addresses, start):
        places = (start + torch.arange(count)) % len(addresses[1].words)
        found = addresses[1].words[places]
        addresses[1].words[places] = -1
        return found


class Never:
    failures, polls = None, 0


@pytest.fixture
def ends(monkeypatch):
    kernels = Kernels()
    monkeypatch.setattr(pipe, "triton", lambda name: kernels)
    monkeypatch.setattr(pipe, "OpenedMemory", Memory)
    inlet, outlet = pipe.Inlet("cpu", kernels.pause), pipe.Outlet("cpu", Never)
    inlet.open(outlet.handle)
    outlet.open(inlet.handle)
    return inlet, outlet, kernels


def test_all_that_is_poured_is_tapped_in_its_order(ends, monkeypatch):
    """Pieces of any size, none of them and more than there is room for, gathered here and read there in others."""
    monkeypatch.setattr("crypten_llm.protocols.dealer.piped.GATHERED", 100)
    inlet, outlet, kernels = ends
    generator = torch.Generator().manual_seed(1)
    sizes = [*torch.randint(0, 90, (60,), generator=generator).tolist(), 5 * ROOM + 3, 0, ROOM, 8, 1]
    pieces = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
    poured = Pouring({CLIENT: inlet})

    def pour():
        for k, piece in enumerate(pieces):
            poured.write(CLIENT, piece)
            if k % 7 == 0:
                poured.flush(CLIENT)
        poured.end()

    meter = Meter()
    tapped = Tapped(outlet, meter, lambda: None)
    writer = threading.Thread(target=pour, daemon=True)
    writer.start()
    for piece in pieces:
        assert torch.equal(tapped.read(piece.numel()), piece)
    tapped.end()
    writer.join(20)
    assert not writer.is_alive() and kernels.waits and kernels.pauses, "each end waited for the other now and then"
    assert sum(row["dealer_bytes_received"] for row in meter.table()) == sum(sizes)


def test_what_never_came_is_said_where_a_section_ends(ends):
    def check():
        raise PartyError("the dealer wrote nothing")

    with pytest.raises(PartyError, match="wrote nothing"):
        Tapped(ends[1], Meter(), check).end()


def test_a_reader_that_stays_away_is_named(ends, monkeypatch):
    """Once it has read nothing for as long as the timeout, however much it had read before."""

    class Links:
        timeout, meter = 0.05, Meter()

        def check_open(self):
            pass

        def name(self, rank):
            return f"rank {rank} (client)"

    inlet, _, _ = ends
    inlet._pause = partial(peer._pause, Links(), CLIENT)
    started = time.perf_counter()
    with pytest.raises(PartyError, match=r"rank 1 \(client\) took nothing out of its card's memory for 0.05 s"):
        inlet.write(torch.zeros(ROOM + 8, dtype=torch.uint8))
    assert 0.05 < time.perf_counter() - started < 5
