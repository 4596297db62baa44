"""The links between the parties: every byte that leaves or enters a process passes here.

Owns the sockets once the rendezvous has connected them, timeouts, and the calls to `Meter.count`. The format of frames
is that of `frames`; `faults` says what went wrong. It knows nothing of shares, masks or models and must stay so.

**Links are plain TCP unless the sockets came under TLS (see `tls`).** What travels is masked, but whoever reads one
link of the dealer's, or alters any, breaks the protocol: between hosts, use TLS or a tunnel.

Not for two threads on the same direction of the same link; different links are independent.
"""

import math
import os
import select
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crypten_llm import records
from crypten_llm.errors import PartyError
from crypten_llm.limits import MESSAGE_BYTES
from crypten_llm.links import faults, frames
from crypten_llm.links.frames import (
    ABORT,
    BEAT,
    BOUNDED,
    DTYPES,
    HEADER,
    JSON,
    MAGIC,
    MAX_ABORT_BYTES,
    MIXED,
    STREAM,
    TENSOR,
)
from crypten_llm.links.link import BEAT_SECONDS, WAITS, Incoming, Link, Outgoing, Pulse, Specs, after, poll
from crypten_llm.links.meter import Cells, Meter
from crypten_llm.links.staging import Staging
from crypten_llm.links.stream import StreamReader
from crypten_llm.links.transcript import Seen

AWAKE = 3e-4
"""Seconds in which a wait asks again and again and offers its core to others in between. Who sends to a process that
sleeps has to wake it first, which takes longer than the message: on one machine a quarter of a decode step."""
PROGRESS = 1 << 16  # bytes within a timeout, where no frame is done in it
TURN_SECONDS = 1.0  # of a wait, at most
Sockets = Mapping[int, socket.socket]  # by the rank at their other end


class Transport:
    """A party's links to all others.

    rank: this party. roles: one name per rank ("owner", "client", ..., "dealer"); their number is `world`.
    sockets: {rank: connected stream socket} of the peers; the transport owns them from now on.
    timeout: seconds without progress after which a wait fails; a byte now and then is none.
    network: a `Network` to emulate, for parties on one machine; every party must be given the same.
    staging: where what `swap` and `stream_from` take and give is: the processor's memory, unless another is put there.

    Every method raises PartyError, naming the peer and the step in progress, when a peer stops, stays silent or
    sends something else than what is due. After that the links are of no use: `abort`, or `close`.
    """

    def __init__(self, rank: int, roles: Sequence[str], sockets: Sockets, *, timeout=60.0, meter=None, network=None):
        assert set(sockets) == set(range(len(roles))) - {rank}, f"rank {rank} of {roles} with links to {set(sockets)}"
        self.rank, self.world, self.roles = rank, len(roles), tuple(roles)
        self.timeout, self.network = timeout, network
        self.meter = meter if meter is not None else Meter()
        self._links = {peer: Link(peer, self.name(peer), sock) for peer, sock in sockets.items()}
        self._pulse: Pulse | None = None
        self.staging = Staging()
        if network:
            network.check(self._links.values())

    def name(self, rank: int) -> str:
        """How messages call a party: "rank 1 (client)"."""
        return f"rank {rank} ({self.roles[rank]})"

    # Tensors. Whatever their device and strides, they travel as contiguous CPU memory.

    def send(self, dst: int, tensor: Tensor, channel: str = "online") -> None:
        """Send a tensor of any shape; returns when the kernel has taken all of it.
        Two parties that `send` to each other more than the socket buffers hold wait for each other: `exchange`.
        """
        self._transfer([self._outgoing(dst, [tensor])], [], channel)

    def recv(self, src: int, shape: Sequence[int], dtype: torch.dtype, channel: str = "online") -> Tensor:
        """The tensor that `src` sends next, on the CPU. It must have this dtype and number of elements."""
        frame = self._incoming(src, [(shape, dtype)])
        self._transfer([], [frame], channel)
        return frame.payload[0]

    def exchange(self, peer: int, tensor: Tensor, channel: str = "online") -> Tensor:
        """Send `tensor` and return the peer's of the same shape and dtype, both at once, at any size."""
        return self.all_exchange([peer], tensor, channel)[peer]

    def all_exchange(self, peers: Iterable[int], tensor: Tensor, channel: str = "online") -> dict[int, Tensor]:
        """Send `tensor` to all `peers` and return {peer: its tensor} of the same shape and dtype: one round."""
        received = self.all_exchange_many(peers, [tensor], channel)
        return {peer: tensors[0] for peer, tensors in received.items()}

    def all_exchange_many(
        self, peers: Iterable[int], tensors: list[Tensor], channel: str = "online"
    ) -> dict[int, list]:
        """`all_exchange` of several tensors in one message to each peer: one round. Returns {peer: list}."""
        specs = [(tensor.shape, tensor.dtype) for tensor in tensors]
        frames = [self._incoming(peer, specs) for peer in peers]
        self._transfer([self._outgoing(peer, tensors) for peer in peers], frames, channel)
        return {
            frame.link.rank: [theirs.to(ours.device) for theirs, ours in zip(frame.payload, tensors, strict=True)]
            for frame in frames
        }

    def swap(self, peer: int, data: Tensor, count: int, cells: Cells | None = None) -> Tensor:
        """Send uint8 `data` and return `count` bytes of the peer's, both at once: one message each way where there is
        something to send, a round where there is something to receive. cells: see `Meter.count`.
        """
        return self.staging.to_device(self.swap_here(peer, self.staging.to_host(data), count, cells))

    def swap_here(
        self, peer: int, data: Tensor, count: int, cells: Cells | None = None, room: Tensor | None = None
    ) -> Tensor:
        """`swap` of what is in the processor's memory, to it. room: `count` bytes of it, new ones if not given."""
        link = self._link(peer)
        outgoing = [self._frame(link, TENSOR, DTYPES[torch.uint8], [bytes_of(data)])] if data.numel() else []
        frames = [Incoming(link, TENSOR, DTYPES[torch.uint8], count, [((count,), torch.uint8)])] if count else []
        for frame in frames:
            frame.room = room
        if outgoing or frames:
            self._transfer(outgoing, frames, "online", cells=cells)
        return frames[0].payload[0] if frames else torch.empty(0, dtype=torch.uint8)

    def count_swap(self, sent: int, received: int, cells: Cells | None = None) -> None:
        """Count a `swap` of as many bytes each way that went another way."""
        out, back = (count and HEADER.size + count for count in (sent, received))
        self.meter.count("online", bool(received), bool(sent), out, back, 0.0, cells)

    # The control plane: public facts only.

    def send_json(self, dst: int, obj: object, channel: str = "online") -> None:
        """Send a record, or what JSON knows. Public facts only: nothing that depends on a secret may be in it."""
        self._transfer([self._frame(self._link(dst), JSON, MIXED, [memoryview(encode_json(obj))])], [], channel)

    def recv_json(self, src: int, kind: Any = Any, max_bytes=MESSAGE_BYTES, channel="online", timeout=None) -> Any:
        """What `src` sends next, a `kind` (see `records`); another is refused, and one above `max_bytes`.
        timeout: seconds instead of the transport's; `math.inf`, for a wait on a person, lasts as long as `src` lives,
        by the signs that its `beat` sends.
        """
        frame = Incoming(self._link(src), JSON, MIXED, max_bytes)
        self._transfer([], [frame], channel, timeout)
        try:
            return records.decode(frame.payload, kind)
        except records.Malformed as error:
            raise self.unexpected(src, f"what is due ({error})") from None

    def announce(self, source: int, peers: Iterable[int], message: Any, kind: Any = dict, timeout=None) -> Any:
        """A public message of `source`, a `kind`, at it and its `peers`, who all call this. timeout: of `recv_json`."""
        if self.rank == source:
            for peer in peers:
                self.send_json(peer, message)
            return message
        return self.recv_json(source, kind, timeout=timeout)

    def unexpected(self, source: int, due: str) -> PartyError:
        """The error for a message of `source` that says something else than what is `due`, in words."""
        return faults.unexpected(self.name(source), due, self.meter.where)

    # Streams: bytes whose boundaries mean nothing, cut into messages as it suits the sender.

    def send_stream(self, dst: int, data: Tensor, channel: str = "online") -> None:
        """Send a uint8 tensor as the next piece of a stream."""
        self._transfer([self._frame(self._link(dst), STREAM, MIXED, [bytes_of(data)])], [], channel)

    def stream_from(self, src: int, max_bytes: int, channel: str = "online") -> StreamReader:
        """What reads the stream that `src` sends in pieces of at most `max_bytes`."""

        def next_piece() -> memoryview:
            frame = Incoming(self._link(src), STREAM, MIXED, max_bytes)
            self._transfer([], [frame], channel)
            return memoryview(frame.payload)

        return StreamReader(next_piece, lambda: self._link(src).is_speaking, self.name(src), self.staging)

    # Signs of life, for those who wait for this party without end.

    def beat(self, peers: Iterable[int]) -> None:
        """From now on these hear every second that this process lives, until it closes the links."""
        self._pulse = Pulse([self._link(peer) for peer in peers], min(BEAT_SECONDS, self.timeout / 4))

    def check_open(self) -> None:
        """Raises PartyError where a peer has closed its link, in its own words if it left any; reads nothing else."""
        poller = select.poll()
        by_fd = {link.fd: link for link in self._links.values()}
        for fd in by_fd:
            poller.register(fd, getattr(select, "POLLRDHUP", 0))  # POLLHUP and POLLERR are always told
        for fd, _ in poller.poll(0):
            raise faults.gone(by_fd[fd], self.meter.where)

    def seen(self) -> dict[int, tuple[Seen, Seen]]:
        """By peer, what was sent to it and received from it so far; for when no other thread uses the links."""
        return {peer: (link.sent.seen(), link.received.seen()) for peer, link in self._links.items()}

    def abort(self, message: str) -> None:
        """Tell every peer why this party stops, then close. Best effort, never raises for a link that is gone.

        The peers show `message` to their users: it must hold nothing secret.
        """
        self._still()
        for link in self._links.values():
            faults.say_goodbye(link, message)
        self.close()

    def close(self) -> None:
        """Close all links; what was sent before still arrives. Closing twice is harmless."""
        self._still()
        for link in self._links.values():
            link.sock.close()
        self._links = {}

    def _still(self) -> None:
        if self._pulse:
            self._pulse.stop()
            self._pulse = None

    # How a transfer works.

    def _link(self, peer: int) -> Link:
        if peer not in self._links:
            raise PartyError(f"rank {self.rank} has no open link to rank {peer}; start all parties again")
        return self._links[peer]

    def _outgoing(self, dst: int, tensors: list[Tensor]) -> Outgoing:
        views = [bytes_of(tensor.detach().cpu().contiguous()) for tensor in tensors]
        return self._frame(self._link(dst), TENSOR, frames.dtype_code([tensor.dtype for tensor in tensors]), views)

    def _frame(self, link: Link, kind: int, dtype: int, views: list[memoryview]) -> Outgoing:
        size = sum([view.nbytes for view in views])
        sent_at = time.monotonic_ns() if self.network else 0
        header = HEADER.pack(MAGIC, kind, dtype, link.sent.frames & 0xFFFFFFFF, size, sent_at)
        whole = (memoryview(header), *views)
        return Outgoing(link, list(whole), HEADER.size + size, whole)

    def _incoming(self, src: int, specs: Specs) -> Incoming:
        size = sum([math.prod(shape) * dtype.itemsize for shape, dtype in specs])
        return Incoming(self._link(src), TENSOR, frames.dtype_code([dtype for _, dtype in specs]), size, specs)

    def _transfer(self, outgoing, incoming, channel: str, timeout: float | None = None, cells: Cells | None = None):
        """Send and receive all these frames at once, each link as fast as it goes, and count them."""
        started = time.perf_counter()
        for out in outgoing:
            out.link.take()
        try:
            self._move(outgoing, incoming, self.timeout if timeout is None else timeout)
        finally:
            for out in outgoing:
                out.link.sending.release()
        sent = received = 0
        for out in outgoing:
            out.note()
            out.link.mid_frame = False
            sent += out.size
        for frame in incoming:
            frame.link.received.add(frame.whole, HEADER.size + frame.size, frame.kind in BOUNDED)
            received += HEADER.size + frame.size
        if self.network and incoming:
            self.network.hold_back(incoming, HEADER.size)
        seconds = time.perf_counter() - started
        self.meter.count(channel, 1 if incoming else 0, len(outgoing), sent, received, seconds, cells)

    def _move(self, outgoing: list[Outgoing], incoming: list[Incoming], timeout: float) -> None:
        """Raises PartyError when in `timeout` seconds neither a frame is done nor `PROGRESS` bytes have moved.

        Of a wait without end the transport's timeout holds, and then a sign of life is progress too. No turn counts for
        more than it may last: a process that was stopped meanwhile has not waited for anybody.
        """
        endless = timeout == math.inf
        timeout = self.timeout if endless else timeout
        sending, receiving, moved, waited = outgoing, incoming, 0, 0.0
        turned = progress_at = time.perf_counter()
        while True:
            before = len(sending), len(receiving), moved
            for out in sending:
                moved += self._push(out)
            for frame in receiving:
                moved += self._pull(frame)
            sending = [out for out in sending if out.views]
            receiving = [frame for frame in receiving if frame.views]
            for out in outgoing:
                if out.broken and not any([frame.link is out.link for frame in receiving]):
                    raise faults.gone(out.link, self.meter.where)
            if not (sending or receiving):
                return
            for out in outgoing:
                if not out.views:
                    out.note(is_its_own=True)  # as long as this call lasts, and that is long enough
                    out.link.sent.catch_up()  # while others compute
            for frame in receiving:
                frame.link.received.catch_up()
            now = time.perf_counter()
            waited, turned = waited + min(now - turned, TURN_SECONDS), now
            progress_at = now if moved > before[2] else progress_at
            alive = endless and any([frame.link.heard() for frame in receiving])
            if alive or moved >= PROGRESS or (len(sending), len(receiving)) != before[:2]:
                moved, waited = 0, 0.0
            if waited >= timeout:
                idle = [frame.link.name for frame in receiving or sending[:1]]
                raise faults.silent(idle, "sent" if receiving else "took", timeout, self.meter.where, endless)
            if now - progress_at < AWAKE:
                os.sched_yield()
            else:
                poll(sending, receiving, min(TURN_SECONDS, timeout - waited))

    def _push(self, out: Outgoing) -> int:
        """Send what the kernel takes now; how many bytes that was."""
        moved = 0
        while out.views:
            try:
                sent = out.link.send(out.views)
            except WAITS:
                break
            except OSError:
                out.broken, out.views = True, []
                break
            out.views = after(out.views, sent)
            moved += sent
        return moved

    def _pull(self, frame: Incoming) -> int:
        """Read what has arrived; how many bytes that was, but for signs of life."""
        moved = 0
        while frame.views:
            try:
                received = frame.link.receive_into(frame.views)
            except WAITS:
                break
            except ssl.SSLError as error:
                raise faults.altered(frame.link.name, error.reason, self.meter.where) from None
            except OSError:
                received = 0
            if received == 0:
                raise faults.gone(frame.link, self.meter.where)
            frame.views = after(frame.views, received)
            moved += received
            if frame.header is not None and not frame.views and self._open(frame):
                return moved - HEADER.size  # a storm of them must not keep this from counting its time
            if frame.kind == ABORT and not frame.views:
                raise faults.stopped(frame.link.name, frame.payload)
        return moved

    def _open(self, frame: Incoming) -> bool:
        """Check a complete header against what is due, and only then make room for the payload.

        True for a sign of life: it was not due, and the header is still to come.
        """
        raw, header = frame.header, HEADER.unpack(frame.header)
        frame.header = None
        magic, kind, dtype, sequence, frame.size, frame.sent_at = header
        if (magic, kind, frame.size) == (MAGIC, BEAT, 0):
            frame.link.beats += 1
            frame.await_header()
            return True
        due = frame.kind, frame.dtype, frame.link.received.frames & 0xFFFFFFFF
        fits = frame.size <= frame.nbytes if kind in BOUNDED else frame.size == frame.nbytes
        if magic == MAGIC and kind == ABORT and frame.size <= MAX_ABORT_BYTES:
            frame.kind = ABORT
        elif magic != MAGIC or (kind, dtype, sequence) != due or not fits:
            raise faults.another_frame(frame, header, self.meter.where)
        elif bool(frame.sent_at) != bool(self.network):
            raise faults.emulated_by_one(frame.link.name)
        if frame.kind == TENSOR:
            new = frame.room is None
            frame.payload = [self.staging.empty(*spec) for spec in frame.specs] if new else [frame.room]
            frame.views = [bytes_of(tensor) for tensor in frame.payload if tensor.numel()]
        else:
            frame.payload = bytearray(frame.size)
            frame.views = [memoryview(frame.payload)] if frame.size else []
        frame.whole = (raw, *frame.views)
        return False


def encode_json(obj: object) -> bytes:
    """The payload of a JSON frame."""
    return records.encode(obj)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on a processor as writable bytes, no copy."""
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")
