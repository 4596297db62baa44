"""One link: its socket, the frames that are on their way over it, and the signs of life in between.

Owns what a thread may do with one direction of a link while another has the other one, and the heartbeat: a frame of
nothing but its header, which tells a peer that waits without end that this process lives. It is sent by a thread that
does nothing else, at fixed times and whatever is computed, between the frames of others.
"""

import math
import select
import socket
import ssl
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from crypten_llm.links.frames import BEAT, HEADER, MAGIC, MIXED
from crypten_llm.links.sockets import set_up
from crypten_llm.links.transcript import Chain, Frame
from crypten_llm.process import Owned

MAX_BUFFERS = 512  # of one system call; Linux allows 1024
TLS_RECORD = 16384  # bytes at most; smaller buffers are joined to one
BEAT_SECONDS = 1.0  # at most, between two signs of life
Specs = Sequence[tuple[Sequence[int], torch.dtype]]  # shapes and dtypes of tensors that must come
WAITS = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
HEARTBEAT = HEADER.pack(MAGIC, BEAT, MIXED, 0, 0, 0)


class Link:
    """One connected socket and what is known of its two directions."""

    def __init__(self, rank: int, name: str, sock: socket.socket) -> None:
        self.rank, self.name, self.fd = rank, name, sock.fileno()
        self.sock: Any = sock
        self.sent, self.received = Chain(), Chain()  # whose numbers of frames are the sequence numbers
        self.mid_frame = False  # a frame is half sent: nothing else may follow on this link
        self.beats = 0  # signs of life that came
        self.owed = b""  # the rest of a sign of life that the kernel took a part of: it goes before all else
        self.sending = threading.Lock()  # of whoever sends: a frame, or a sign of life
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._using = threading.Lock()  # under TLS, whose state both directions share
        self.line_free = 0  # emulation: when the incoming line has passed on all earlier frames, in ns
        self.owned = Owned()
        set_up(sock)

    def take(self) -> None:
        """For a frame of which all must be sent before anything else is; `sending` is released by who called this."""
        self._check()
        self.sending.acquire()
        self.mid_frame = True

    def _check(self) -> None:
        if not self.owned.is_here:
            self.owned.check(f"the link to {self.name}")

    def hush(self) -> None:
        """For a link that is broken: nothing is sent any more."""
        if not self.mid_frame and self.owned.is_here:
            self.take()

    def send(self, views: list[memoryview]) -> int:
        """Bytes of these that the kernel took; raises one of ``WAITS`` where it takes none now."""
        while self.owed:
            self.owed = self.owed[self._send([memoryview(self.owed)]) :]
        return self._send(views)

    def beat(self) -> None:
        """Sends a sign of life, unless a frame is under way or the kernel takes none: nothing waits for it."""
        if not self.sending.acquire(blocking=False):
            return
        try:
            if not self.mid_frame:
                self.owed = self.owed or HEARTBEAT
                self.owed = self.owed[self._send([memoryview(self.owed)]) :]
        except OSError:  # it is full, which is no matter, or gone, which the next frame will find out
            pass
        finally:
            self.sending.release()

    def heard(self) -> bool:
        """Whether a sign of life has come since this was asked last."""
        beats, self.beats = self.beats, 0
        return bool(beats)

    @property
    def is_speaking(self) -> bool:
        """Whether anything that the peer sent can be read now."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        return bool(poller.poll(0)) or (self._tls and self.sock.pending() > 0)

    def _send(self, views: list[memoryview]) -> int:
        if not self._tls:
            return self.sock.sendmsg(views[:MAX_BUFFERS])
        count, size = 0, 0
        while count < len(views) and size + views[count].nbytes <= TLS_RECORD:
            size += views[count].nbytes
            count += 1
        with self._using:
            return self.sock.send(b"".join(views[:count]) if count > 1 else views[0])

    def receive_into(self, views: list[memoryview]) -> int:
        """Bytes read into the first of these; 0 at the end, raises one of ``WAITS`` where there are none yet."""
        self._check()
        if self._tls:
            with self._using:
                return self.sock.recv_into(views[0])
        if len(views) == 1:
            return self.sock.recv_into(views[0])
        return self.sock.recvmsg_into(views[:MAX_BUFFERS])[0]


@dataclass(slots=True, eq=False)
class Outgoing:
    """A frame on its way out."""

    link: Link
    views: list[memoryview]  # what is still to be sent
    size: int  # bytes on the socket
    whole: Frame  # all of it, until it is in the transcript
    broken: bool = False  # the link takes no more; the reason may still be in its input

    def note(self, is_its_own: bool = False) -> None:
        """Puts it into the transcript, once; see ``Chain.add``."""
        if self.whole:
            self.link.sent.add(self.whole, self.size, is_its_own)
            self.whole = ()


@dataclass(slots=True, eq=False)
class Incoming:
    """A frame that must come: what is due, and the state of reading it."""

    link: Link
    kind: int
    dtype: int
    nbytes: int  # exact for tensors, the most accepted for JSON and streams
    specs: Specs = ()  # of tensors: (shape, dtype)
    header: Any = field(init=False)  # None once it was checked
    views: list[memoryview] = field(init=False)  # what is still to be filled
    size: int = 0  # payload bytes that the header announced
    sent_at: int = 0  # send time that it announced
    room: torch.Tensor | None = None  # for the only tensor that is due; it gets memory of its own if not given
    payload: Any = None  # tensors or text, made when the header was found right
    whole: Frame = ()  # all of it, once its header was found right

    def __post_init__(self) -> None:
        self.await_header()

    def await_header(self) -> None:
        """At the beginning, and where what came was no part of this frame."""
        self.header = bytearray(HEADER.size)
        self.views = [memoryview(self.header)]


def poll(sending: list[Outgoing], receiving: list[Incoming], seconds: float) -> None:
    """Wait until a link can go on, so many seconds at most."""
    events = dict.fromkeys((frame.link.fd for frame in receiving), select.POLLIN)
    for out in sending:
        events[out.link.fd] = events.get(out.link.fd, 0) | select.POLLOUT
    poller = select.poll()
    for fd, mask in events.items():
        poller.register(fd, mask)
    poller.poll(math.ceil(seconds * 1000))


def after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` when their first `count` bytes are done; views without bytes go at once."""
    if len(views) == 1 and count == views[0].nbytes:
        return []
    for i, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[i + 1 :]]
        count -= view.nbytes
    return []


class Pulse:
    """A thread that sends a sign of life over each of these links, every ``seconds``, until it is stopped."""

    def __init__(self, links: Iterable[Link], seconds: float) -> None:
        self._links, self._seconds, self._ended, self._owned = tuple(links), seconds, threading.Event(), Owned()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            for link in self._links:
                link.beat()

    def stop(self) -> None:
        """Returns when nothing of it uses the links any more; it does not wait for them."""
        if self._owned.is_here:  # a child that was forked has no such thread
            self._ended.set()
            self._thread.join()
