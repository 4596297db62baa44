"""The links between the parties: every byte that leaves or enters a process passes here.

Owns the sockets once the rendezvous has connected them, the frame format, timeouts, the messages about a peer
that stopped, and the calls to `Meter.count`. It knows nothing of shares, masks or models and must stay so.

**Links are plain TCP unless the sockets came under TLS (see `tls`).** What the parties send each other is masked data,
but whoever reads both links of a party, or alters one, breaks the protocol's assumptions: between hosts, use TLS, a
trusted network or a tunnel.

A frame is a 24-byte header and a payload of raw little-endian elements, UTF-8 JSON or one line of text. The
receiver knows what must come next and compares kind, dtype, sequence number and size before it allocates
anything. No pickle is ever read.

Rounds: a transfer that waits for peers counts one round, however many peers take part: `exchange`,
`all_exchange` and `all_exchange_many` one round for each participant, `recv` and `recv_json` one round for the
receiver. `send` and `send_json` count a message and no round. Bytes are those of frames, headers included, counted
when the transfer is complete; the rendezvous handshake and what TLS adds (22 bytes for 16 KiB) are not counted.

Not for two threads on the same direction of the same link; different links are independent.
"""

import ipaddress
import json
import math
import select
import socket
import ssl
import struct
import sys
import time

import torch

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links.meter import Meter

HEADER = struct.Struct("<2sBBIQQ")  # magic, kind, dtype, sequence number, payload bytes, send time (emulation)
MAGIC = b"cL"
TENSOR, JSON, ABORT, STREAM = 1, 2, 3, 4
KIND_NAMES = {TENSOR: "tensor", JSON: "JSON", ABORT: "abort", STREAM: "stream"}
BOUNDED = (JSON, STREAM)  # of a length that the receiver knows only a bound of
MIXED = 0  # dtype code of a frame that carries tensors of several dtypes, and of frames without tensors
DTYPES = {
    torch.int64: 1,
    torch.int32: 2,
    torch.int16: 3,
    torch.uint8: 4,
    torch.float32: 5,
    torch.bool: 6,
}
DTYPE_NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()} | {MIXED: "mixed"}
MAX_BUFFERS = 512  # of one system call; Linux allows 1024
TLS_RECORD = 16384  # bytes at most; smaller buffers are joined to one
WAITS = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
MAX_ABORT_BYTES = 4096
LAST_WORDS_SECONDS = 1.0  # how long to look for a peer's abort frame after its link broke
# Small frames leave at once; a machine that vanished is noticed within a minute even by a wait without end. Buffer
# sizes are left to the kernel: fixing them turns its tuning to the link off, and gained nothing on loopback.
TCP_OPTIONS = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
assert sys.byteorder == "little", "frames carry raw little-endian elements"


class _Link:
    """One connected socket and what is known of its two directions."""

    __slots__ = ("rank", "name", "sock", "fd", "sent", "received", "mid_frame", "line_free")

    def __init__(self, rank, name, sock):
        self.rank, self.name, self.sock, self.fd = rank, name, sock, sock.fileno()
        self.sent = self.received = 0  # frames, the sequence numbers
        self.mid_frame = False  # a frame is half sent: nothing else may follow on this link
        self.line_free = 0  # emulation: when the incoming line has passed on all earlier frames, in ns
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in TCP_OPTIONS.items():
                if hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, views):
        """Bytes of these that the kernel took; raises one of ``WAITS`` where it takes none now."""
        if not isinstance(self.sock, ssl.SSLSocket):
            return self.sock.sendmsg(views[:MAX_BUFFERS])
        count, size = 0, 0
        while count < len(views) and size + views[count].nbytes <= TLS_RECORD:
            size += views[count].nbytes
            count += 1
        return self.sock.send(b"".join(views[:count]) if count > 1 else views[0])

    def receive_into(self, views):
        """Bytes read into the first of these; 0 at the end, raises one of ``WAITS`` where there are none yet."""
        if len(views) == 1 or isinstance(self.sock, ssl.SSLSocket):
            return self.sock.recv_into(views[0])
        return self.sock.recvmsg_into(views[:MAX_BUFFERS])[0]

    @property
    def is_local(self):
        if self.sock.family == socket.AF_UNIX:
            return True
        here, there = self.sock.getsockname()[0], self.sock.getpeername()[0]
        return here == there or ipaddress.ip_address(there).is_loopback


class _Outgoing:
    """A frame on its way out."""

    __slots__ = ("link", "views", "size", "broken")

    def __init__(self, link, views, size):
        self.link = link
        self.views = views  # what is still to be sent
        self.size = size  # bytes on the socket
        self.broken = False  # the link takes no more; the reason may still be in its input


class _Incoming:
    """A frame that must come: what is due, and the state of reading it."""

    __slots__ = ("link", "kind", "dtype", "nbytes", "specs", "header", "views", "size", "sent_at", "payload")

    def __init__(self, link, kind, dtype, nbytes, specs=()):
        self.link, self.kind, self.dtype = link, kind, dtype
        self.nbytes = nbytes  # exact for tensors, the most accepted for JSON and streams
        self.specs = specs  # of tensors: (shape, dtype)
        self.header = bytearray(HEADER.size)  # None once it was checked
        self.views = [memoryview(self.header)]  # what is still to be filled
        self.size = self.sent_at = 0  # payload bytes and send time that the header announced
        self.payload = None  # tensors or text, made when the header was found right


class Transport:
    """A party's links to all others.

    rank: this party. roles: one name per rank ("owner", "client", ..., "dealer"); their number is `world`.
    sockets: {rank: connected stream socket} of the peers; the transport owns them from now on.
    timeout: seconds without a single byte of progress after which a wait fails.
    network: a `Network` to emulate, for parties on one machine; every party must be given the same.

    Every method raises PartyError, naming the peer and the step in progress, when a peer stops, stays silent or
    sends something else than what is due. After that the links are of no use: `abort`, or `close`.
    """

    def __init__(self, rank, roles, sockets, *, timeout=60.0, meter=None, network=None):
        assert set(sockets) == set(range(len(roles))) - {rank}, f"rank {rank} of {roles} with links to {set(sockets)}"
        self.rank, self.world, self.roles = rank, len(roles), tuple(roles)
        self.timeout, self.network = timeout, network
        self.meter = meter if meter is not None else Meter()
        self._links = {peer: _Link(peer, self.name(peer), sock) for peer, sock in sockets.items()}
        for link in self._links.values() if network else ():
            if not link.is_local:
                raise UsageError(
                    f"cannot emulate a network to {link.name} on another machine: drop the network setting, or run "
                    "every party on one machine"
                )

    def name(self, rank):
        """How messages call a party: "rank 1 (client)"."""
        return f"rank {rank} ({self.roles[rank]})"

    # Tensors. Whatever their device and strides, they travel as contiguous CPU memory.

    def send(self, dst, tensor, channel="online"):
        """Send a tensor of any shape; returns when the kernel has taken all of it.

        Two parties that `send` to each other more than the socket buffers hold wait for each other: `exchange`.
        """
        self._transfer([self._outgoing(dst, [tensor])], [], channel)

    def recv(self, src, shape, dtype, channel="online"):
        """The tensor that `src` sends next, on the CPU. It must have this dtype and number of elements."""
        frame = self._incoming(src, [(shape, dtype)])
        self._transfer([], [frame], channel)
        return frame.payload[0]

    def exchange(self, peer, tensor, channel="online"):
        """Send `tensor` and return the peer's of the same shape and dtype, both at once, at any size."""
        return self.all_exchange([peer], tensor, channel)[peer]

    def all_exchange(self, peers, tensor, channel="online"):
        """Send `tensor` to all `peers` and return {peer: its tensor} of the same shape and dtype: one round."""
        received = self.all_exchange_many(peers, [tensor], channel)
        return {peer: tensors[0] for peer, tensors in received.items()}

    def all_exchange_many(self, peers, tensors, channel="online"):
        """`all_exchange` of several tensors in one message to each peer: one round. Returns {peer: list}."""
        specs = [(tensor.shape, tensor.dtype) for tensor in tensors]
        frames = [self._incoming(peer, specs) for peer in peers]
        self._transfer([self._outgoing(peer, tensors) for peer in peers], frames, channel)
        return {
            frame.link.rank: [theirs.to(ours.device) for theirs, ours in zip(frame.payload, tensors, strict=True)]
            for frame in frames
        }

    def swap(self, peer, data, count, cells=None, channel="online"):
        """Send uint8 `data` and return `count` bytes of the peer's, both at once: one message each way where there is
        something to send, a round where there is something to receive. cells: see `Meter.count`.
        """
        outgoing = [self._outgoing(peer, [data])] if data.numel() else []
        frames = [self._incoming(peer, [((count,), torch.uint8)])] if count else []
        if outgoing or frames:
            self._transfer(outgoing, frames, channel, cells=cells)
        return frames[0].payload[0] if frames else torch.empty(0, dtype=torch.uint8)

    # The control plane: public facts only.

    def send_json(self, dst, obj, channel="online"):
        """Send a JSON-able object. Public facts only: nothing that depends on a secret may be in it."""
        text = memoryview(encode_json(obj))
        self._transfer([self._frame(self._link(dst), JSON, MIXED, [text])], [], channel)

    def recv_json(self, src, max_bytes=16 << 20, channel="online", timeout=None):
        """The object that `src` sends next, refused above `max_bytes`.

        timeout: seconds instead of the transport's, for a wait on a person; `math.inf` waits for ever.
        """
        frame = _Incoming(self._link(src), JSON, MIXED, max_bytes)
        self._transfer([], [frame], channel, timeout)
        try:
            return json.loads(frame.payload)
        except (ValueError, RecursionError):
            raise PartyError(
                f"{frame.link.name} sent a message that is not JSON during {self.meter.where}: start every party with "
                "the same version"
            ) from None

    # Streams: bytes whose boundaries mean nothing, cut into messages as it suits the sender.

    def send_stream(self, dst, data, channel="online"):
        """Send a uint8 tensor as the next piece of a stream."""
        self._transfer([self._frame(self._link(dst), STREAM, MIXED, [_bytes_of(data)])], [], channel)

    def recv_stream(self, src, max_bytes, channel="online"):
        """The next piece of the stream that `src` sends, a bytearray of at most `max_bytes`."""
        frame = _Incoming(self._link(src), STREAM, MIXED, max_bytes)
        self._transfer([], [frame], channel)
        return frame.payload

    # The end.

    def abort(self, message):
        """Tell every peer why this party stops, then close. Best effort, never raises for a link that is gone.

        The peers show `message` to their users: it must hold nothing secret.
        """
        text = message.encode()[:MAX_ABORT_BYTES]
        for link in self._links.values():
            try:
                if not link.mid_frame:
                    link.sock.settimeout(LAST_WORDS_SECONDS)
                    link.sock.sendall(HEADER.pack(MAGIC, ABORT, MIXED, 0, len(text), 0) + text)
                # Closing with unread input resets the connection, which could destroy what was just sent.
                link.sock.shutdown(socket.SHUT_WR)
                link.sock.setblocking(False)
                deadline = time.monotonic() + LAST_WORDS_SECONDS
                while link.sock.recv(1 << 20) and time.monotonic() < deadline:
                    pass
            except OSError:
                pass
        self.close()

    def close(self):
        """Close all links; what was sent before still arrives. Closing twice is harmless."""
        for link in self._links.values():
            link.sock.close()
        self._links = {}

    # How a transfer works.

    def _link(self, peer):
        assert peer in self._links, f"rank {self.rank} has no open link to rank {peer}"
        return self._links[peer]

    def _outgoing(self, dst, tensors):
        views = [_bytes_of(tensor.detach().cpu().contiguous()) for tensor in tensors]
        return self._frame(self._link(dst), TENSOR, _dtype_code([tensor.dtype for tensor in tensors]), views)

    def _frame(self, link, kind, dtype, views):
        size = sum([view.nbytes for view in views])
        sent_at = time.monotonic_ns() if self.network else 0
        header = HEADER.pack(MAGIC, kind, dtype, link.sent & 0xFFFFFFFF, size, sent_at)
        return _Outgoing(link, [memoryview(header), *views], HEADER.size + size)

    def _incoming(self, src, specs):
        size = sum([math.prod(shape) * dtype.itemsize for shape, dtype in specs])
        return _Incoming(self._link(src), TENSOR, _dtype_code([dtype for _, dtype in specs]), size, specs)

    def _transfer(self, outgoing, incoming, channel, timeout=None, cells=None):
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
                    raise self._gone(out.link)
            if not (sending or receiving):
                break
            now = time.perf_counter()
            if progress:
                progress_at = now
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
            self._hold_back(incoming)
        seconds = time.perf_counter() - started
        self.meter.count(channel, 1 if incoming else 0, len(outgoing), sent, received, seconds, cells)

    def _push(self, out):
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

    def _pull(self, frame):
        """Read what has arrived; True when that was something."""
        progress = False
        while frame.views:
            try:
                received = frame.link.receive_into(frame.views)
            except WAITS:
                break
            except ssl.SSLError as error:
                raise PartyError(
                    f"what came from {frame.link.name} during {self.meter.where} is not as it was sent "
                    f"({error.reason}): something between the two changes it; look at that party's own output too"
                ) from None
            except OSError:
                received = 0
            if received == 0:
                raise self._gone(frame.link)
            frame.views = _after(frame.views, received)
            if frame.header is not None and not frame.views:
                self._open(frame)
            elif frame.kind == ABORT and not frame.views:
                raise self._stopped(frame.link, frame.payload)
            progress = True
        return progress

    def _open(self, frame):
        """Check a complete header against what is due, and only then make room for the payload."""
        magic, kind, dtype, sequence, frame.size, frame.sent_at = HEADER.unpack(frame.header)
        frame.header = None
        link, due = frame.link, frame.link.received & 0xFFFFFFFF
        if magic == MAGIC and kind == ABORT and frame.size <= MAX_ABORT_BYTES:
            frame.kind = ABORT
        elif (
            magic != MAGIC
            or (kind, dtype, sequence) != (frame.kind, frame.dtype, due)
            or (frame.size > frame.nbytes if kind in BOUNDED else frame.size != frame.nbytes)
        ):
            came = "bytes of another protocol"
            if magic == MAGIC:
                came = _describe(kind, dtype, sequence, f"{frame.size} bytes")
            size = f"{'at most ' if frame.kind in BOUNDED else ''}{frame.nbytes} bytes"
            expected = _describe(frame.kind, frame.dtype, due, size, frame.specs)
            raise PartyError(
                f"{link.name} sent {came} during {self.meter.where}, expected {expected}: the parties run different "
                "programs; start all of them with the same version and the same settings"
            )
        elif bool(frame.sent_at) != bool(self.network):
            raise PartyError(
                f"only one of this party and {link.name} emulates a network: give every party the same network setting"
            )
        if frame.kind == TENSOR:
            frame.payload = [torch.empty(shape, dtype=dtype) for shape, dtype in frame.specs]
            frame.views = [view for view in map(_bytes_of, frame.payload) if view.nbytes]
        else:
            frame.payload = bytearray(frame.size)
            frame.views = [memoryview(frame.payload)] if frame.size else []
            if frame.kind == ABORT and not frame.size:
                raise self._stopped(link, b"")

    def _poll(self, sending, receiving, seconds, timeout):
        """Wait until a link can go on; PartyError when none can for `seconds`."""
        events = dict.fromkeys((frame.link.fd for frame in receiving), select.POLLIN)
        for out in sending:
            events[out.link.fd] = events.get(out.link.fd, 0) | select.POLLOUT
        # No spinning before the poll: on one machine it would take the core that another party computes on.
        poller = select.poll()
        for fd, mask in events.items():
            poller.register(fd, mask)
        if poller.poll(None if seconds == math.inf else min(max(0.0, seconds * 1000), 2**31 - 1)):
            return
        idle = " and ".join(frame.link.name for frame in receiving) or sending[0].link.name
        raise PartyError(
            f"{idle} {'sent' if receiving else 'took'} nothing for {timeout:g} s during {self.meter.where}: look at "
            "that party's own output, and raise the timeout if it only needs longer"
        )

    def _hold_back(self, incoming):
        """Emulation: sleep until the emulated network would have delivered all these frames."""
        ready = 0
        for frame in incoming:
            link, size = frame.link, HEADER.size + frame.size
            link.line_free = max(link.line_free, frame.sent_at) + int(size * 8e3 / self.network.mbit)
            ready = max(ready, link.line_free + int(self.network.rtt_ms * 5e5))
        while (left := ready - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)

    # What to say about a peer that is gone.

    def _gone(self, link):
        """The error for a broken link: the peer's own message when one is still in the input."""
        text = _last_words(link.sock)
        if text is not None:
            return self._stopped(link, text)
        return PartyError(
            f"{link.name} closed the connection during {self.meter.where}: its own output says why it stopped"
        )

    def _stopped(self, link, text):
        # A peer's text goes to a terminal: one line, nothing that could steer it.
        line = "".join(c if c.isprintable() else " " for c in bytes(text).decode(errors="replace")).strip()
        return PartyError(f"{link.name} stopped: {line or 'no reason given'}")


def encode_json(obj) -> bytes:
    """The payload of a JSON frame."""
    return json.dumps(obj, separators=(",", ":")).encode()


def _dtype_code(dtypes):
    codes = {DTYPES.get(dtype) for dtype in dtypes}
    assert None not in codes, f"{dtypes} do not travel: convert to one of {', '.join(map(str, DTYPES))}"
    return codes.pop() if len(codes) == 1 else MIXED


def _bytes_of(tensor):
    """The memory of a contiguous CPU tensor as writable bytes, no copy."""
    return memoryview(tensor.numpy()).cast("B") if tensor.numel() else memoryview(b"")


def _after(views, count):
    """What is left of `views` when their first `count` bytes are done; views without bytes go at once."""
    for i, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[i + 1 :]]
        count -= view.nbytes
    return []


def _describe(kind, dtype, sequence, size, specs=()):
    """A frame in words: "int64 tensor message number 5 of 64 bytes, shape (2, 4)"."""
    name = KIND_NAMES.get(kind, f"unknown kind {kind}")
    if kind == TENSOR:
        name = f"{DTYPE_NAMES.get(dtype, f'dtype {dtype}')} {name}"
    shapes = f", shape {' and '.join(str(tuple(shape)) for shape, _ in specs)}" if specs else ""
    return f"{name} message number {sequence} of {size}{shapes}"


def _last_words(sock):
    """The text of an abort frame that waits behind unread frames in the input of a broken link, or None.

    Called when sending failed: the peer may have said why before it closed.
    """
    try:
        sock.settimeout(LAST_WORDS_SECONDS)
        stream = sock.makefile("rb")
        while len(header := stream.read(HEADER.size)) == HEADER.size:
            magic, kind, _, _, size, _ = HEADER.unpack(header)
            if magic != MAGIC:
                return None
            if kind == ABORT:
                return stream.read(min(size, MAX_ABORT_BYTES))
            while size and (chunk := stream.read(min(size, 1 << 20))):
                size -= len(chunk)
    except OSError:
        pass
    return None
