"""CrypTen on this project's transport, randomness and dealer.

Owns the join between the two: CrypTen's own protocols run unchanged, while every byte they send goes through
``Transport`` (timeouts, counters, no pickle) and every random element comes from ``randomness``. The dealer keeps
CrypTen's trusted-third-party protocol (Appendix C.2 of arXiv 2109.00984): each party expands its shares from a
key it has in common with the dealer, and party 0 is sent the corrections.

On a GPU CrypTen wraps tensors of words (``CUDALongTensor``): torch has no products of such there, and CrypTen makes
them of products of doubles, by blocks of 16 or 22 bits. What is sent is unwrapped, what arrives is wrapped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from msgspec import Meta
from torch.distributed import ReduceOp

from crypten_llm import compat, limits, memory
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links.meter import DealersCounters, Meter, peak_bytes
from crypten_llm.protocols.dealer.randomness import KEY_BYTES, Stream, derive_key, fresh_key
from crypten_llm.records import Record

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport


crypten = compat.import_crypten()

from crypten.communicator import DistributedCommunicator  # noqa: E402
from crypten.cuda import CUDALongTensor  # noqa: E402
from crypten.mpc.provider.ttp_provider import TTPServer  # noqa: E402

DEALER = "dealer"
PROCESSOR = torch.device("cpu")
_Shape = Annotated[list[Annotated[int, Meta(ge=0, le=limits.PARAMETERS)]], Meta(max_length=8)]
_COMBINE: dict[Any, Callable[..., torch.Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.BXOR: torch.bitwise_xor,
}


def bare(tensor: Any) -> torch.Tensor:
    """Torch's own tensor of one of CrypTen's."""
    return tensor.tensor() if isinstance(tensor, CUDALongTensor) else tensor


def wrapped(tensor: torch.Tensor) -> Any:
    """A tensor as CrypTen keeps it: on a GPU within one of its own."""
    return CUDALongTensor(tensor) if tensor.is_cuda else tensor


def placed(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """What came over a link, where another tensor is."""
    return tensor.to(like.device)


class TransportCommunicator(DistributedCommunicator):
    """CrypTen's communicator over a ``Transport``. ``world_size`` counts compute parties, not the dealer."""

    instance: Any = None

    def __init__(self, transport: Transport, compute_parties: int) -> None:
        self.transport = transport
        self.rank = transport.rank
        self.world_size = compute_parties
        self.peers = [rank for rank in range(compute_parties) if rank != self.rank]
        self._name = f"rank{self.rank}"

    @classmethod
    def is_initialized(cls) -> bool:
        return cls.instance is not None

    def get_world_size(self) -> int:
        return self.world_size

    def get_rank(self) -> int:
        return self.rank

    def get_ttp_rank(self) -> int:
        return self.world_size

    def get_distributed_backend(self) -> str:
        return "crypten_llm.links.transport"

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        self.transport.send(dst, bare(tensor))

    def recv(self, tensor: torch.Tensor, src: int | None = None) -> torch.Tensor:
        assert src is not None, "CrypTen names whom it hears"
        return self._received(src, tensor)

    def _received(self, src: int, like: Any) -> Any:
        """What ``src`` sends next, of the shape and on the device of another tensor."""
        return wrapped(placed(self.transport.recv(src, like.shape, like.dtype), like))

    def all_reduce(self, input: Any, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        """Sum or xor over the compute parties, in one round; lists travel as one message."""
        tensors = [bare(tensor) for tensor in (input if batched else [input])]
        combine = _COMBINE[op]
        totals = list(tensors)
        for received in self.transport.all_exchange_many(self.peers, tensors).values():
            totals = [combine(total, placed(other, total)) for total, other in zip(totals, received, strict=True)]
        opened = [wrapped(total) for total in totals]
        return opened if batched else opened[0]

    def reduce(self, input: Any, dst: int, op: Any = ReduceOp.SUM, batched: bool = False) -> Any:
        tensors = [bare(tensor) for tensor in (input if batched else [input])]
        if self.rank != dst:
            for tensor in tensors:
                self.transport.send(dst, tensor)
            return None
        totals = [tensor.clone() for tensor in tensors]
        for peer in self.peers:
            for i, tensor in enumerate(tensors):
                totals[i] = _COMBINE[op](totals[i], bare(self._received(peer, tensor)))
        opened = [wrapped(total) for total in totals]
        return opened if batched else opened[0]

    def broadcast(self, input: Any, src: int, group: Any = None, batched: bool = False) -> Any:
        assert group is None, "only the main group exists here; the dealer is reached through DealerClient"
        for tensor in input if batched else [input]:
            if self.rank == src:
                for peer in self.peers:
                    self.transport.send(peer, bare(tensor))
            else:
                tensor.copy_(self._received(src, tensor))
        return input

    def gather(self, tensor: torch.Tensor, dst: int) -> Any:
        if self.rank != dst:
            self.transport.send(dst, bare(tensor))
            return [None]
        return [tensor if rank == dst else self._received(rank, tensor) for rank in range(self.world_size)]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        received = self.transport.all_exchange_many(self.peers, [bare(tensor)])
        theirs = {rank: wrapped(placed(found, tensor)) for rank, (found,) in received.items()}
        return [theirs.get(rank, tensor) for rank in range(self.world_size)]

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise PartyError(
            "CrypTen asked for an operation that this project does not send (a pickled object or an "
            "asynchronous message); use the additive protocol with tensors of public size"
        )

    send_obj = recv_obj = broadcast_obj = isend = irecv = scatter = barrier = _refuse


class Asked(Record, frozen=True):
    """What party 0 asks the dealer for: a function of CrypTen's and public shapes, or its counters, or its end."""

    function: Literal["additive", "square", "binary", "wraps", "B2A", "statistics", "stop"]
    args: Annotated[tuple[_Shape | Literal["mul", "matmul"], ...], Meta(max_length=3)] = ()


class DealerClient:
    """What CrypTen's TTP provider talks to on a compute party: a key in common with the dealer, and requests."""

    def __init__(self, transport: Transport, dealer: int, device: torch.device | str = "cpu") -> None:
        self.transport = transport
        self.dealer = dealer
        self.stream = Stream(_receive_key(transport, dealer), device)

    def get_generator(self, device: Any = None) -> Stream:
        return self.stream

    def ask_statistics(self) -> dict:
        """Party 0 only: the dealer's counters, which start again from zero."""
        self.transport.send_json(self.dealer, Asked("statistics"), channel=DEALER)
        return self.transport.recv_json(self.dealer, DealersCounters, channel=DEALER)

    def ask_stop(self) -> None:
        """Party 0 only: the dealer ends."""
        self.transport.send_json(self.dealer, Asked("stop"), channel=DEALER)

    def ttp_request(self, function: str, device: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Party 0 only: the correction for one correlation. The request holds public shapes alone."""
        assert not kwargs, f"{function} with {kwargs} is not used here"
        shape = _result_shape(function, args)
        name: Any = function
        self.transport.send_json(self.dealer, Asked(name, tuple(_plain(a) for a in args)), channel=DEALER)
        return wrapped(placed(self.transport.recv(self.dealer, shape, torch.int64, channel=DEALER), self.stream))


class Dealer(TTPServer):
    """CrypTen's trusted third party: sees public shapes and when to stop, never a share."""

    def __init__(self, transport: Transport, compute_parties: int, device: torch.device | str = "cpu") -> None:
        self.transport = transport
        self.device = torch.device(device)
        keys = [fresh_key() for _ in range(compute_parties)]
        for rank, key in enumerate(keys):
            _send_key(transport, rank, key)
        self.generators = [Stream(key, device) for key in keys]

    def _get_generators(self, device: Any = None) -> list[Stream]:
        return self.generators

    def serve(self) -> None:
        """Answers party 0 until it says stop."""
        while True:
            asked = self.transport.recv_json(0, Asked, channel=DEALER, timeout=math.inf)
            if asked.function == "stop":
                return
            if asked.function == "statistics":
                counted = {"table": self.transport.meter.counts(), "peak_bytes": peak_bytes()}
                self.transport.send_json(0, {"rank": self.transport.rank, **counted}, channel=DEALER)
                self.transport.meter = Meter()
                continue
            self.transport.send(0, bare(self._make(asked)), channel=DEALER)

    def _make(self, asked: Asked) -> torch.Tensor:
        """The correction. Raises PartyError for shapes that do not fit together, or not into this machine."""
        args = [torch.Size(a) if isinstance(a, list) else a for a in asked.args]
        try:
            needed = 8 * math.prod(_result_shape(asked.function, tuple(args)))
            memory.check(needed, "the correlation", self.device)
        except (UsageError, ValueError) as error:
            raise PartyError(
                f"{self.transport.name(0)} asked the dealer for {asked.function} of {list(asked.args)}: {error}"
            ) from None
        return getattr(self, asked.function)(*args)


def start(
    transport: Transport, compute_parties: int, precision_bits: int, device: torch.device | str = "cpu"
) -> DealerClient:
    """Turns this process into CrypTen's rank ``transport.rank``; the dealer calls ``start_dealer`` instead."""
    if transport.rank >= compute_parties:
        raise AssertionError("the dealer holds no shares; call start_dealer")
    crypten.cfg.encoder.precision_bits = precision_bits
    crypten.CrypTensor.set_grad_enabled(False)
    compat.install_communicator(TransportCommunicator, TransportCommunicator(transport, compute_parties))
    dealer = DealerClient(transport, compute_parties, device)
    compat.install_ttp_client(dealer)
    streams = agree_on_streams(transport, compute_parties, device)
    compat.install_generators(ring_element, kbit_tensor, streams)
    return dealer


def start_dealer(transport: Transport, compute_parties: int, device: torch.device | str = "cpu") -> Dealer:
    """The dealer's end of ``start``."""
    compat.install_generators(ring_element, kbit_tensor, {})
    return Dealer(transport, compute_parties, device)


def is_started(transport: Transport | None = None) -> bool:
    """Whether this process is one of CrypTen's parties: over ``transport``, when one is given."""
    running = TransportCommunicator.instance
    return running is not None and (transport is None or running.transport is transport)


def stop() -> None:
    """Forgets keys, streams and links, so that the process can start again."""
    compat.install_communicator(TransportCommunicator, None)
    compat.install_ttp_client(None)


def ring_element(
    size: Sequence[int], ring_size: int = 2**64, generator: Stream | None = None, device: Any = None
) -> torch.Tensor:
    """Replaces ``crypten.common.rng.generate_random_ring_element``."""
    assert ring_size == 2**64, "CrypTen's shares live in Z_2^64"
    return wrapped(_stream(generator, device).ring(size))


def kbit_tensor(
    size: Sequence[int], bitlength: int | None = None, generator: Stream | None = None, device: Any = None
) -> torch.Tensor:
    """Replaces ``crypten.common.rng.generate_kbit_random_tensor``."""
    return wrapped(_stream(generator, device).bits(size, bitlength or 64))


def _stream(generator: Stream | None, device: Any) -> Stream:
    return generator or crypten.generators["local"][torch.device(device or PROCESSOR)]


def agree_on_streams(transport: Transport, parties: int, device: torch.device | str = "cpu") -> dict:
    """CrypTen's four streams. ``next`` and ``prev`` are shared with the neighbours, so that zero is shared freely.

    Each is there on the processor too, under a key of its own: CrypTen begins some tensors there, of no number.
    """
    rank, following, preceding = transport.rank, (transport.rank + 1) % parties, (transport.rank - 1) % parties
    next_key = fresh_key()
    _send_key(transport, following, next_key)
    prev_key = _receive_key(transport, preceding)
    if rank == 0:
        global_key = fresh_key()
        for peer in range(1, parties):
            _send_key(transport, peer, global_key)
    else:
        global_key = _receive_key(transport, 0)
    keys = {"prev": prev_key, "next": next_key, "local": fresh_key(), "global": global_key}
    there = torch.device(device)
    streams = {name: {PROCESSOR: Stream(derive_key(key, "processor"))} for name, key in keys.items()}
    for name, key in keys.items():
        streams[name][there] = Stream(key, there)
    return streams


def _send_key(transport: Transport, dst: int, key: bytes) -> None:
    transport.send(dst, torch.frombuffer(bytearray(key), dtype=torch.uint8))


def _receive_key(transport: Transport, src: int) -> bytes:
    return bytes(transport.recv(src, (KEY_BYTES,), torch.uint8).tolist())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (torch.Size, tuple)) else value


def _result_shape(function: str, args: tuple) -> tuple[int, ...]:
    """Raises ValueError for arguments that the function does not take."""
    # numpy's broadcast_shapes: torch's imports sympy on first use
    shapes = [shape for shape in args if not isinstance(shape, str)]
    match function, list(args[2:]):
        case "additive", ["mul"] if len(shapes) == 2:
            return np.broadcast_shapes(*shapes)
        case "additive", ["matmul"] if len(shapes) == 2:
            left, right = shapes
            if min(len(left), len(right)) < 2 or left[-1] != right[-2]:
                raise ValueError(f"no product of {list(left)} and {list(right)}")
            return (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])
        case "binary", [] if len(shapes) == 2:
            return np.broadcast_shapes(*shapes)
        case "square" | "wraps" | "B2A", [] if len(args) == len(shapes) == 1:
            return tuple(shapes[0])
    raise ValueError("it takes other arguments")
