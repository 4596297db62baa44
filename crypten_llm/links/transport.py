"""The links between the parties: every byte that leaves or enters a process passes here.

Owns the sockets once the rendezvous has connected them, timeouts, and the calls to `Meter.count`. The format of frames
is that of `frames`; `faults` says what went wrong. It knows nothing of shares, masks or models and must stay so.

**Links are plain TCP unless the sockets came under TLS (see `tls`).** What travels is masked, but whoever reads both
links of a party, or alters one, breaks the protocol: between hosts, use TLS, a trusted network or a tunnel.

Not for two threads on the same direction of the same link; different links are independent.
"""

import math
import os
import select
import socket
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from crypten_llm import records
from crypten_llm.errors import PartyError
from crypten_llm.limits import MESSAGE_BYTES
from crypten_llm.links import faults, frames
from crypten_llm.links.frames import ABORT, BOUNDED, DTYPES, HEADER, JSON, MAGIC, MAX_ABORT_BYTES, MIXED, STREAM, TENSOR
from crypten_llm.links.meter import Cells, Meter
from crypten_llm.links.sockets import set_up
from crypten_llm.process import Owned

MAX_BUFFERS = 512  # of one system call; Linux allows 1024
TLS_RECORD = 16384  # bytes at most; smaller buffers are joined to one
AWAKE = 3e-4
"""Seconds in which a wait asks again and again and offers its core to others in between. Who sends to a process that
sleeps has to wake it first, which takes longer than the message: on one machine a quarter of a decode step."""
Specs = Sequence[tuple[Sequence[int], torch.dtype]]  # shapes and dtypes of tensors that must come
Sockets = Mapping[int, socket.socket]  # by the rank at their other end
WAITS = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError


class _Link:
    """One connected socket and what is known of its two directions."""

    def __init__(self, rank: int, name: str, sock: socket.socket) -> None:
        self.rank, self.name, self.sock, self.fd = rank, name, sock, sock.fileno()
        self.sent = self.received = 0  # frames, the sequence numbers
        self.mid_frame = False  # a frame is half sent: nothing else may follow on this link
        self.line_free = 0  # emulation: when the incoming line has passed on all earlier frames, in ns
        self.owned = Owned()
        set_up(sock)

    def send(self, views: list[memoryview]) -> int:
        """Bytes of these that the kernel took; raises one of ``WAITS`` where it takes none now."""
        self.owned.check(f"the link to {self.name}")
        if not isinstance(self.sock, ssl.SSLSocket):
            return self.sock.sendmsg(views[:MAX_BUFFERS])
        count, size = 0, 0
        while count < len(views) and size + views[count].nbytes <= TLS_RECORD:
            size += views[count].nbytes
            count += 1
        return self.sock.send(b"".join(views[:count]) if count > 1 else views[0])

    def receive_into(self, views: list[memoryview]) -> int:
        """Bytes read into the first of these; 0 at the end, raises one of ``WAITS`` where there are none yet."""
        self.owned.check(f"the link to {self.name}")
        if len(views) == 1 or isinstance(self.sock, ssl.SSLSocket):
            return self.sock.recv_into(views[0])
        return self.sock.recvmsg_into(views[:MAX_BUFFERS])[0]


@dataclass(slots=True, eq=False)
class _Outgoing:
    """A frame on its way out."""

    link: _Link
    views: list[memoryview]  # what is still to be sent
    size: int  # bytes on the socket
    broken: bool = False  # the link takes no more; the reason may still be in its input


@dataclass(slots=True, eq=False)
class _Incoming:
    """A frame that must come: what is due, and the state of reading it."""

    link: _Link
    kind: int
    dtype: int
    nbytes: int  # exact for tensors, the most accepted for JSON and streams
    specs: Specs = ()  # of tensors: (shape, dtype)
    header: Any = field(default_factory=lambda: bytearray(HEADER.size))  # None once it was checked
    views: list[memoryview] = field(init=False)  # what is still to be filled
    size: int = 0  # payload bytes that the header announced
    sent_at: int = 0  # send time that it announced
    payload: Any = None  # tensors or text, made when the header was found right

    def __post_init__(self) -> None:
        self.views = [memoryview(self.header)]


class Transport:
    """A party's links to all others.

    rank: this party. roles: one name per rank ("owner", "client", ..., "dealer"); their number is `world`.
    sockets: {rank: connected stream socket} of the peers; the transport owns them from now on.
    timeout: seconds without a single byte of progress after which a wait fails.
    network: a `Network` to emulate, for parties on one machine; every party must be given the same.

    Every method raises PartyError, naming the peer and the step in progress, when a peer stops, stays silent or
    sends something else than what is due. After that the links are of no use: `abort`, or `close`.
    """

    def __init__(self, rank: int, roles: Sequence[str], sockets: Sockets, *, timeout=60.0, meter=None, network=None):
        assert set(sockets) == set(range(len(roles))) - {rank}, f"rank {rank} of {roles} with links to {set(sockets)}"
        self.rank, self.world, self.roles = rank, len(roles), tuple(roles)
        self.timeout, self.network = timeout, network
        self.meter = meter if meter is not None else Meter()
        self._links = {peer: _Link(peer, self.name(peer), sock) for peer, sock in sockets.items()}
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
        link = self._link(peer)
        outgoing = [self._frame(link, TENSOR, DTYPES[torch.uint8], [bytes_of(data)])] if data.numel() else []
        frames = [_Incoming(link, TENSOR, DTYPES[torch.uint8], count, [((count,), torch.uint8)])] if count else []
        if outgoing or frames:
            self._transfer(outgoing, frames, "online", cells=cells)
        return frames[0].payload[0] if frames else torch.empty(0, dtype=torch.uint8)

    # The control plane: public facts only.

    def send_json(self, dst: int, obj: object, channel: str = "online") -> None:
        """Send a record, or what JSON knows. Public facts only: nothing that depends on a secret may be in it."""
        self._transfer([self._frame(self._link(dst), JSON, MIXED, [memoryview(encode_json(obj))])], [], channel)

    def recv_json(self, src: int, kind: Any = Any, max_bytes=MESSAGE_BYTES, channel="online", timeout=None) -> Any:
        """What `src` sends next, a `kind` (see `records`); another is refused, and one above `max_bytes`.
        timeout: seconds instead of the transport's, for a wait on a person; `math.inf` waits for ever.
        """
        frame = _Incoming(self._link(src), JSON, MIXED, max_bytes)
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

    def stream_from(self, src: int, max_bytes: int, channel: str = "online") -> "StreamReader":
        """What reads the stream that `src` sends in pieces of at most `max_bytes`."""
        return StreamReader(self, self._link(src), max_bytes, channel)

    def abort(self, message: str) -> None:
        """Tell every peer why this party stops, then close. Best effort, never raises for a link that is gone.

        The peers show `message` to their users: it must hold nothing secret.
        """
        for link in self._links.values():
            faults.say_goodbye(link, message)
        self.close()

    def close(self) -> None:
        """Close all links; what was sent before still arrives. Closing twice is harmless."""
        for link in self._links.values():
            link.sock.close()
        self._links = {}

    # How a transfer works.

    def _link(self, peer: int) -> _Link:
        if peer not in self._links:
            raise PartyError(f"rank {self.rank} has no open link to rank {peer}; start all parties again")
        return self._links[peer]

    def _outgoing(self, dst: int, tensors: list[Tensor]) -> _Outgoing:
        views = [bytes_of(tensor.detach().cpu().contiguous()) for tensor in tensors]
        return self._frame(self._link(dst), TENSOR, frames.dtype_code([tensor.dtype for tensor in tensors]), views)

    def _frame(self, link: _Link, kind: int, dtype: int, views: list[memoryview]) -> _Outgoing:
        size = sum([view.nbytes for view in views])
        sent_at = time.monotonic_ns() if self.network else 0
        header = HEADER.pack(MAGIC, kind, dtype, link.sent & 0xFFFFFFFF, size, sent_at)
        return _Outgoing(link, [memoryview(header), *views], HEADER.size + size)

    def _incoming(self, src: int, specs: Specs) -> _Incoming:
        size = sum([math.prod(shape) * dtype.itemsize for shape, dtype in specs])
        return _Incoming(self._link(src), TENSOR, frames.dtype_code([dtype for _, dtype in specs]), size, specs)

    def _transfer(self, outgoing, incoming, channel: str, timeout: float | None = None, cells: Cells | None = None):
        """Send and receive all these frames at once, each link as fast as it goes, and count them."""
        started = progress_at = time.perf_counter()
        timeout = self.timeout if timeout is None else timeout
        for out in outgoing:
            out.link.mid_frame = True
        sending, receiving = outgoing, incoming
        while True:
            progress = False
            for out in sending:
                progress |= self._push(out)
            for frame in receiving:
                progress |= self._pull(frame)
            sending = [out for out in sending if out.views]
            receiving = [frame for frame in receiving if frame.views]
            for out in outgoing:
                if out.broken and not any(frame.link is out.link for frame in receiving):
                    raise faults.gone(out.link, self.meter.where)
            if not (sending or receiving):
                break
            now = time.perf_counter()
            progress_at = now if progress else progress_at
            if now - progress_at < AWAKE:
                os.sched_yield()
                continue
            self._poll(sending, receiving, progress_at + timeout - now, timeout)
        sent = received = 0
        for out in outgoing:
            out.link.mid_frame = False
            out.link.sent += 1
            sent += out.size
        for frame in incoming:
            frame.link.received += 1
            received += HEADER.size + frame.size
        if self.network and incoming:
            self.network.hold_back(incoming, HEADER.size)
        seconds = time.perf_counter() - started
        self.meter.count(channel, 1 if incoming else 0, len(outgoing), sent, received, seconds, cells)

    def _push(self, out: _Outgoing) -> bool:
        """Send what the kernel takes now; True when that was something."""
        progress = False
        while out.views:
            try:
                sent = out.link.send(out.views)
            except WAITS:
                break
            except OSError:
                out.broken, out.views = True, []
                break
            out.views = _after(out.views, sent)
            progress = True
        return progress

    def _pull(self, frame: _Incoming) -> bool:
        """Read what has arrived; True when that was something."""
        progress = False
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
            frame.views = _after(frame.views, received)
            if frame.header is not None and not frame.views:
                self._open(frame)
            if frame.kind == ABORT and not frame.views:
                raise faults.stopped(frame.link.name, frame.payload)
            progress = True
        return progress

    def _open(self, frame: _Incoming) -> None:
        """Check a complete header against what is due, and only then make room for the payload."""
        header, frame.header = HEADER.unpack(frame.header), None
        magic, kind, dtype, sequence, frame.size, frame.sent_at = header
        due = frame.kind, frame.dtype, frame.link.received & 0xFFFFFFFF
        fits = frame.size <= frame.nbytes if kind in BOUNDED else frame.size == frame.nbytes
        if magic == MAGIC and kind == ABORT and frame.size <= MAX_ABORT_BYTES:
            frame.kind = ABORT
        elif magic != MAGIC or (kind, dtype, sequence) != due or not fits:
            raise faults.another_frame(frame, header, self.meter.where)
        elif bool(frame.sent_at) != bool(self.network):
            raise faults.emulated_by_one(frame.link.name)
        if frame.kind == TENSOR:
            frame.payload = [torch.empty(shape, dtype=dtype) for shape, dtype in frame.specs]
            frame.views = [view for view in map(bytes_of, frame.payload) if view.nbytes]
        else:
            frame.payload = bytearray(frame.size)
            frame.views = [memoryview(frame.payload)] if frame.size else []

    def _poll(self, sending: list[_Outgoing], receiving: list[_Incoming], seconds: float, timeout: float) -> None:
        """Wait until a link can go on; PartyError when none can for `seconds`."""
        events = dict.fromkeys((frame.link.fd for frame in receiving), select.POLLIN)
        for out in sending:
            events[out.link.fd] = events.get(out.link.fd, 0) | select.POLLOUT
        poller = select.poll()
        for fd, mask in events.items():
            poller.register(fd, mask)
        if poller.poll(None if seconds == math.inf else min(max(0.0, seconds * 1000), 2**31 - 1)):
            return
        idle = [frame.link.name for frame in receiving or sending[:1]]
        raise faults.silent(idle, not receiving, timeout, self.meter.where)


class StreamReader:
    """A stream as its reader wants it: any number of bytes at a time, in sections that end where a message does."""

    def __init__(self, transport: Transport, link: _Link, max_bytes: int, channel: str) -> None:
        self._transport, self._link, self._max_bytes, self._channel = transport, link, max_bytes, channel
        self._left = memoryview(b"")  # of the last message

    def begin(self, label: str) -> None:
        """The next section, whatever its label: it is what comes next."""

    def read(self, count: int) -> Tensor:
        """The next `count` bytes, a uint8 tensor."""
        out, filled = torch.empty(count, dtype=torch.uint8), 0
        target = out.numpy().data
        while filled < count:
            if not self._left:
                frame = _Incoming(self._link, STREAM, MIXED, self._max_bytes)
                self._transport._transfer([], [frame], self._channel)
                self._left = memoryview(frame.payload)
            take = min(count - filled, len(self._left))
            target[filled : filled + take] = self._left[:take]
            self._left = self._left[take:]
            filled += take
        return out

    def end(self) -> None:
        if self._left:
            raise PartyError(f"{self._link.name} sent more than this section needs: {faults.SAME_PROGRAM}")


def encode_json(obj: object) -> bytes:
    """The payload of a JSON frame."""
    return records.encode(obj)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on a processor as writable bytes, no copy."""
    return tensor.numpy().data.cast("B") if tensor.numel() else memoryview(b"")


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` when their first `count` bytes are done; views without bytes go at once."""
    for i, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[i + 1 :]]
        count -= view.nbytes
    return []
