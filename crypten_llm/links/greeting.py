"""How two parties greet each other on a new connection, and how each knows that the other is who it says.

Owns the greeting's format and its proofs. Each side sends a hello with its place and a nonce, the side that answers
with a proof, and the side that dialled gives its own: HMAC-SHA256 under the parties' secret of who proves, of both
hellos (ranks, roles, world size, run and nonces) and, on plain links of one machine, of the connection's own two
addresses, so that a program in between cannot pass the proofs on. Under TLS (see ``tls``) each side shows its role's
key as well. Whoever does not prove it is a stranger, and is dropped. Where the secret is empty, the proofs keep out
accidents alone.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import ssl
import struct
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crypten_llm import records
from crypten_llm.errors import UsageError
from crypten_llm.links import sockets
from crypten_llm.links.sockets import reason_of
from crypten_llm.links.waiting import Wait

if TYPE_CHECKING:
    from crypten_llm.links.tls import Links

PROTOCOL_VERSION = 3  # of the greeting and the frames: change it when either changes
HELLO = struct.Struct("<8sHHHB16s16s32s")  # magic, version, rank, world size, TLS, role, run, nonce
MAGIC = b"cryptllm"
NONCE_BYTES = PROOF_BYTES = 32
FACTS = struct.Struct("<H")  # bytes of the JSON that follows
LINKS = "plain TCP", "TLS (--tls)"


class Stranger(OSError):
    """The other side of a connection is no party of this run; the text says why, in this side's words."""


@dataclass(frozen=True)
class Greeter:
    """This party's side of greetings.

    rank, roles: its place, and one name per rank. run: separates runs that could meet by accident. secret: the
    parties' own, see ``keyring``. links: ``tls.Links`` that put each connection under TLS, or None.
    """

    rank: int
    roles: Sequence[str]
    run: str
    secret: bytes
    links: Links | None = None

    def name(self, rank: int) -> str:
        """How messages call a party: "rank 1 (client)"."""
        return f"rank {rank} ({self.roles[rank]})" if rank < len(self.roles) else f"rank {rank}"

    def dial(self, sock: socket.socket, peer: int, wait: Wait) -> socket.socket:
        """Greets ``peer``, who was dialled; the link to it.

        Raises Stranger where another program answers, UsageError where the parties were started differently, and
        OSError where the connection ends.
        """
        try:
            if links := self.links:
                plain = sock
                sock = wait.in_thread(lambda: links.secure(plain, peer))
            mine = self._hello()
            sock.sendall(mine)
            theirs = wait.read_exactly(sock, HELLO.size)
            self._compare(theirs, peer)
            if not self._is_proof(wait.read_exactly(sock, PROOF_BYTES), b"answer", sock, mine, theirs):
                raise Stranger("it does not know this run's secret")
            sock.sendall(self._proof(b"dial", sock, mine, theirs))
            self._same_size(peer, HELLO.unpack(theirs)[3])
            return sock
        except ssl.SSLError as error:
            sock.close()
            if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                raise self._other_links(peer, 0) from None
            raise Stranger(reason_of(error)) from None
        except BaseException:
            sock.close()
            raise

    def answer(self, sock: socket.socket, expected: Container[int], wait: Wait) -> tuple[int, socket.socket]:
        """Greets whoever has connected: (its rank, the link to it).

        Raises OSError, Stranger among them, and UsageError for a party that was started for another world size.
        """
        try:
            lead = wait.on(sock, sock.recv, 1, socket.MSG_PEEK)
            if (lead == MAGIC[:1]) == bool(self.links):
                if self.links:
                    wait.read_exactly(sock, HELLO.size)
                sock.sendall(self._hello())  # says what links there are here, also to who cannot read it as TLS
                raise Stranger(f"it wants {LINKS[not self.links]} links")
            sock.settimeout(max(0.01, wait.left))  # of the handshake as a whole
            sock = self.links.secure(sock) if self.links else sock
            theirs, mine = wait.read_exactly(sock, HELLO.size), self._hello()
            magic, version, peer, world, _, role, run, _ = HELLO.unpack(theirs)
            if magic != MAGIC:
                raise Stranger("it speaks another protocol")
            if version != PROTOCOL_VERSION or run != self._run():
                sock.sendall(mine)  # by which it sees why
                raise Stranger("it is of another run or version")
            if world == len(self.roles) and (peer not in expected or role != _field(self.roles[peer])):
                raise Stranger(f"nobody waits here for rank {peer}")
            if self.links and peer < len(self.roles) and not self.links.is_of(sock, peer):
                raise Stranger(f"it does not hold the key of {self.name(peer)}")
            sock.sendall(mine + self._proof(b"answer", sock, theirs, mine))
            if not self._is_proof(wait.read_exactly(sock, PROOF_BYTES), b"dial", sock, theirs, mine):
                raise Stranger("it does not know this run's secret")
            self._same_size(peer, world)
            return peer, sock
        except BaseException:
            sock.close()
            raise

    def _hello(self) -> bytes:
        place = MAGIC, PROTOCOL_VERSION, self.rank, len(self.roles), bool(self.links), _field(self.roles[self.rank])
        return HELLO.pack(*place, self._run(), secrets.token_bytes(NONCE_BYTES))

    def _run(self) -> bytes:
        return hashlib.sha256(self.run.encode()).digest()[:16]

    def _compare(self, theirs: bytes, peer: int) -> None:
        """Raises for the hello of who was dialled, where that is not ``peer`` of a run like this one."""
        magic, version, rank, world, tls, role, run, _ = HELLO.unpack(theirs)
        if magic != MAGIC:
            raise Stranger("another program answered")
        if version != PROTOCOL_VERSION:
            raise self._differs("protocol version", PROTOCOL_VERSION, peer, version)
        if bool(tls) != bool(self.links):
            raise self._other_links(peer, tls)
        if run != self._run():
            raise Stranger("it is of another run")
        if world == len(self.roles) and (rank != peer or role != _field(self.roles[peer])):
            raise self._differs("roles", " ".join(self.roles), peer, f"rank {rank} in that place")

    def _same_size(self, peer: int, world: int) -> None:
        """Of a party that has proved itself: then both may stop for it."""
        if world != len(self.roles):
            raise self._differs("world size", len(self.roles), peer, world)

    def _other_links(self, peer: int, tls: int) -> UsageError:
        return self._differs("links", LINKS[bool(self.links)], peer, LINKS[bool(tls)])

    def _differs(self, fact: str, mine: object, peer: int, theirs: object) -> UsageError:
        return UsageError(
            f"the parties disagree on the {fact}: {self.name(self.rank)} was started with {mine}, {self.name(peer)} "
            f"with {theirs}; start every party with the same command and version"
        )

    def _proof(self, who: bytes, sock: socket.socket, dialled: bytes, answered: bytes) -> bytes:
        place = b"" if self.links else sockets.places(sock)
        return hmac.digest(self.secret, b"|".join([who, dialled, answered, place]), "sha256")

    def _is_proof(self, shown: bytes, who: bytes, sock: socket.socket, dialled: bytes, answered: bytes) -> bool:
        return hmac.compare_digest(shown, self._proof(who, sock, dialled, answered))


def _field(role: str) -> bytes:
    """A role's name as a hello has it."""
    return role.encode()[:16].ljust(16, b"\0")


def send_facts(sock: socket.socket, facts: object, wait: Wait) -> None:
    """Public facts, after the greeting."""
    data = records.encode(facts)
    sock.settimeout(max(0.1, wait.left))
    sock.sendall(FACTS.pack(len(data)) + data)


def read_facts(sock: socket.socket, kind: Any, wait: Wait) -> Any:
    """What ``send_facts`` sent, a ``kind`` (see ``records``). Raises OSError where it is none, or too late."""
    data = wait.read_exactly(sock, FACTS.unpack(wait.read_exactly(sock, FACTS.size))[0])
    try:
        return records.decode(data, kind)
    except records.Malformed as error:
        raise Stranger(f"what it says next is {error}") from None
