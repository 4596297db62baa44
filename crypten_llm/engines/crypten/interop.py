"""CrypTen beside engine ``wire``, in one run: MPCTensors from its secrets, and secrets from MPCTensors.

Owns the two conversions, and what CrypTen's protocols need for that. Both keep additive shares modulo 2^64, so a
conversion is local wherever the share is valid there and has no more fractional bits than CrypTen's. In between CrypTen
runs unchanged, over the parties' link (see ``bridge``), with correlations from the wire engine's dealer.

That dealer answers no requests: it runs the same program, CrypTen's code included, on shares of zero that stand for
their shapes. So it makes each correlation when its turn comes, live or for a tape, and hears nothing from the
parties. CrypTen's protocols take the same steps whatever their shares hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from crypten.common.util import count_wraps  # noqa: E402, I001  (importable once ``bridge`` has been imported)
from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor  # noqa: E402
from crypten.mpc.provider.provider import TupleProvider  # noqa: E402

from crypten_llm import compat
from crypten_llm.engines.crypten import bridge
from crypten_llm.engines.crypten.bridge import TransportCommunicator, crypten
from crypten_llm.engines.wire.handles import value
from crypten_llm.errors import UsageError
from crypten_llm.kernels.ring import broadcast
from crypten_llm.protocols.dealer.runtime import Piece
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Overflow, Secret, as_secret
from crypten_llm.roles import DEALER, OWNER
from eviction.operations import Handle

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.protocols.dealer.runtime import Runtime


PARTIES = 2
MPCTensor = crypten.mpc.MPCTensor
Pair = tuple[ArithmeticSharedTensor, ArithmeticSharedTensor | BinarySharedTensor]  # of a correlation
Triple = tuple[Any, Any, Any]  # both factors and their product


class CryptenBeside:
    """CrypTen on this role of a ``WireEngine``. Use as a context that owner, client and dealer enter together.

    CrypTen keeps its rank and its streams in its modules, so one role a process: where all three are threads of one
    process, or with engine ``crypten`` running, this raises UsageError.

    Cost: 2 rounds and 3 messages of 32 bytes between the parties, for the keys of CrypTen's zero shares.
    """

    def __init__(self, engine: WireEngine, precision_bits: int = 15) -> None:
        """precision_bits: fractional bits of every MPCTensor here; a product of two may not exceed 2^(62 - 2f)."""
        if not 1 <= precision_bits <= 30:
            raise UsageError(f"precision_bits is {precision_bits}; CrypTen multiplies with 1 to 30")
        self.engine, self.precision_bits = engine, precision_bits

    def __enter__(self) -> Self:
        if bridge.is_started():
            raise UsageError("CrypTen already runs in this process; give owner, client and dealer a process each")
        engine = self.engine
        if engine.runtime.device.type != "cpu":
            raise UsageError("CrypTen runs beside engine 'wire' on the processor alone; leave --device out")
        crypten.cfg.encoder.precision_bits = self.precision_bits
        crypten.CrypTensor.set_grad_enabled(False)
        if engine.rank == DEALER:
            communicator = _FollowingCommunicator(engine)
            streams: dict[str, dict] = {name: {bridge.PROCESSOR: None} for name in ("prev", "next", "local", "global")}
            compat.install_generators(_zeros, _zeros, streams)
            for sender in (None, OWNER):  # the parties agree on their keys
                communicator.pass_by(bridge.KEY_BYTES, sender)
        else:
            communicator = TransportCommunicator(engine.transport, PARTIES)
            streams = bridge.agree_on_streams(engine.transport, PARTIES)
            compat.install_generators(bridge.ring_element, bridge.kbit_tensor, streams)
        compat.install_communicator(TransportCommunicator, communicator)
        compat.install_provider(WireProvider(engine.runtime))
        return self

    def __exit__(self, *_: Any) -> None:
        bridge.stop()
        compat.install_provider(None)
        compat.install_generators(_refuse, _refuse, {})  # until CrypTen is started again: the dealer's were zeros

    def to_crypten(self, *handles: Any) -> list:
        """MPCTensors of the wire engine's ``handles``, all in one go.

        Shapes: those of the handles, which are results of its operations: no cached rows, weights or norms.
        Reveals: nothing where it is local; else x + r for a fresh uniform mask r, to both (``protocols.opening``).
        Error: none for a handle with at most ``precision_bits`` fractional bits, else a unit of those.
        Cost: local for a share that is valid modulo 2^64 and has at most ``precision_bits`` fractional bits. All
        others: 1 round together, an element each way the bits of its width less the fractional bits above
        ``precision_bits``, packed; dealer twice what these are short of 64.
        Raises: Overflow where |x| < 2^bits, as declared, leaves CrypTen's 62 bits; UsageError for another handle.
        """
        f = self.precision_bits
        secrets = [self._secret(handle) for handle in handles]
        for secret in secrets:
            _check(secret.bits, f, "an MPCTensor")
        moved = [secret for secret in secrets if secret.width < 64 or secret.scale > f]
        if moved:
            openings = [Opening(secret, truncate=max(0, secret.scale - f), lifted=64) for secret in moved]
            wires = self.engine.rounds.open(*openings)
            exact = {id(s): as_secret(self.engine.runtime, w) for s, w in zip(moved, wires, strict=True)}
            secrets = [exact.get(id(secret), secret) for secret in secrets]
        return [self._mpc_tensor(secret) for secret in secrets]

    def to_wire(self, tensor: Handle, bits: int | None = None) -> Secret:
        """A handle of the wire engine for an MPCTensor; local.

        Shapes: the tensor's. bits: |x| < 2^bits, by the caller's word, as no share says how large it is; that of a
        linear layer's result by default. Where it is wrong, what the wire engine makes of the value is wrong too.
        Reveals: nothing. Error: none. Cost: nothing.
        Raises: UsageError for a tensor of bits, or whose scale is no power of two; Overflow where 2^bits does not fit.
        """
        if not isinstance(tensor, MPCTensor) or tensor.ptype != crypten.mpc.arithmetic:
            kind = tensor.ptype if isinstance(tensor, MPCTensor) else type(tensor).__name__
            raise UsageError(f"{kind} is no arithmetic MPCTensor; convert it first: x.to(crypten.mpc.arithmetic)")
        units = tensor.encoder.scale
        scale = units.bit_length() - 1
        if units != 1 << scale:
            raise UsageError(f"an MPCTensor at scale {units} has no whole number of fractional bits; re-encode it")
        bits = self.engine.config.hidden_bits if bits is None else bits
        _check(bits, scale, "a secret")
        share = tensor.share.clone()  # CrypTen changes some of its tensors in place
        return Secret(self.engine.runtime.share(share.shape, lambda: share), scale, 64, bits)

    def _secret(self, handle: Handle) -> Secret:
        if isinstance(handle, Secret):
            return self.engine.rounds.run(value(self.engine, handle))
        raise UsageError(
            f"{type(handle).__name__} is no plain value of engine 'wire'; convert the result of an operation instead"
        )

    def _mpc_tensor(self, secret: Secret) -> Handle:
        share = secret.share << (self.precision_bits - secret.scale)
        share = torch.zeros(secret.shape, dtype=torch.int64) if self.engine.rank == DEALER else share
        return MPCTensor.from_shares(share, precision=self.precision_bits)


def _check(bits: int, scale: int, what: str) -> None:
    if bits + scale > 62:
        raise Overflow(f"{what}: |x| < 2^{bits} with {scale} fractional bits does not fit 62 bits; use fewer of them")


class WireProvider(TupleProvider):
    """CrypTen's correlations from the wire engine's masks and dealer (``Runtime.mask``, ``deal``, ``deal_common``).

    It serves all of CrypTen's protocols for two parties: products, squares, comparisons, and the conversions between
    arithmetic and binary shares. Cost: dealer 8 bytes an element of the result to party 1; for binary triples 8
    bytes to each party.
    """

    NAME = "wire"

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def generate_additive_triple(
        self, size0: Sequence[int], size1: Sequence[int], op: Any, device: Any = None, *args: Any, **kwargs: Any
    ) -> Triple:
        function = getattr(torch, op)
        (left, a), (right, b) = self._mask(size0), self._mask(size1)
        shapes = (torch.empty(size, device="meta") for size in (size0, size1))
        size = function(*shapes, *args, **kwargs).shape
        c = self._deal(size, lambda: function(sum(left), sum(right), *args, **kwargs))
        return _arithmetic(a), _arithmetic(b), _arithmetic(c)

    def square(self, size: Sequence[int], device: Any = None) -> Pair:
        parts, r = self._mask(size)
        return _arithmetic(r), _arithmetic(self._deal(size, lambda: (parts[0] + parts[1]) * (parts[0] + parts[1])))

    def generate_binary_triple(self, size0: Sequence[int], size1: Sequence[int], device: Any = None) -> Triple:
        (left, a), (right, b) = self._mask(size0), self._mask(size1)
        size = broadcast(size0, size1)
        own, c = self._mask(size)

        def correction() -> list[torch.Tensor]:
            """Between uniform shares of the triple's third part and the right ones; each party lacks the other's."""
            return [(left[0] ^ left[1]) & (right[0] ^ right[1]) ^ own[0] ^ own[1]]

        dealt = self._runtime.deal_common([(tuple(size), torch.int64)], correction)
        if self._runtime.role == OWNER:
            c = c ^ dealt[0]
        return _binary(a), _binary(b), _binary(c)

    def wrap_rng(self, size: Sequence[int], device: Any = None) -> Pair:
        parts, r = self._mask(size)
        return _arithmetic(r), _arithmetic(self._deal(size, lambda: count_wraps(list(parts))))

    def B2A_rng(self, size: Sequence[int], device: Any = None) -> Pair:
        parts, r = self._mask(size)
        return _arithmetic(self._deal(size, lambda: (parts[0] ^ parts[1]) & 1)), _binary(r & 1)

    def _mask(self, size: Sequence[int]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Both parts of a fresh mask, at the dealer alone, and this role's part; the dealer's is zero."""
        mask = self._runtime.mask(tuple(size))
        if mask.client is None:
            return (), mask.held
        return (mask.held - mask.client, mask.client), _zeros(size)

    def _deal(self, size: Sequence[int], value: Callable[[], torch.Tensor]) -> torch.Tensor:
        dealt = self._runtime.deal(tuple(size), value)
        return dealt.held if dealt.client is None else _zeros(size)


class _FollowingCommunicator(TransportCommunicator):
    """At the dealer, in the place of party 0: nothing is sent or heard, what would arrive is zero."""

    def __init__(self, engine: WireEngine) -> None:
        super().__init__(engine.transport, PARTIES)
        self.rank, self._runtime = OWNER, engine.runtime

    def _overhear(self, tensors: list[torch.Tensor], sender: int | None = None) -> None:
        self.pass_by(sum(tensor.numel() * tensor.element_size() for tensor in tensors), sender)

    def pass_by(self, count: int, sender: int | None = None) -> None:
        """``count`` bytes from ``sender`` to the other party, or from each to the other."""
        self._runtime.exchange([Piece((count,), 8, self.transport.meter.cell, sender=sender)])

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        self._overhear([tensor], self.rank)

    def recv(self, tensor: torch.Tensor, src: int | None = None) -> torch.Tensor:
        self._overhear([tensor], src)
        return torch.zeros_like(tensor)

    def all_reduce(self, input: Any, op: Any = None, batched: bool = False) -> Any:
        self._overhear(input if batched else [input])
        return input

    def reduce(self, input: Any, dst: int, op: Any = None, batched: bool = False) -> Any:
        for tensor in input if batched else [input]:
            self._overhear([tensor], 1 - dst)
        return input if dst == self.rank else None

    def broadcast(self, input: Any, src: int, group: Any = None, batched: bool = False) -> Any:
        for tensor in input if batched else [input]:
            self._overhear([tensor], src)
        return input

    def gather(self, tensor: torch.Tensor, dst: int) -> Any:
        self._overhear([tensor], 1 - dst)
        return [tensor, torch.zeros_like(tensor)] if dst == self.rank else [None]

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._overhear([tensor])
        return [tensor, torch.zeros_like(tensor)]


def _zeros(size: Sequence[int], *_: Any, **__: Any) -> torch.Tensor:
    """The dealer's share of anything; in the place of CrypTen's random functions, too."""
    return torch.zeros(size, dtype=torch.int64)


def _refuse(*_: Any, **__: Any) -> None:
    raise UsageError("CrypTen was stopped and draws no shares; use MPCTensors within the CryptenBeside they come from")


def _arithmetic(share: torch.Tensor) -> ArithmeticSharedTensor:
    return ArithmeticSharedTensor.from_shares(share, precision=0)


def _binary(share: torch.Tensor) -> BinarySharedTensor:
    return BinarySharedTensor.from_shares(share)
