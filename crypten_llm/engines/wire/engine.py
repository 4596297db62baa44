"""Engine ``wire``: two parties and a dealer, every secret of a layer opened at most once.

Owns one role of it: its runtime, its rounds, and what goes in and comes out. The operations are entered into a table
from the files of their topics (``operations``); a method of the engine runs one to its end.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.base import HELD, Engine, Held
from crypten_llm.engines.domain import Calibration
from crypten_llm.engines.passing import Pad, Padded
from crypten_llm.engines.wire import arithmetic, attention, choosing, domain, drawing, gathering, keeping, layers  # noqa: F401
from crypten_llm.engines.wire.captured import Repeated
from crypten_llm.engines.wire.handles import Handle, OneHot, Rows, Weight, value
from crypten_llm.engines.wire.known import known_rows
from crypten_llm.engines.wire.numbers import EMBEDDING, WireConfig
from crypten_llm.engines.wire.operations import OPERATIONS, Operation
from crypten_llm.engines.wire.padding import PaddedRows, Places
from crypten_llm.errors import LeftRange, OneTimeError, UsageError
from crypten_llm.kernels import ring
from crypten_llm.protocols import embedding, products
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.flags import Flags
from crypten_llm.protocols.opening import Message
from crypten_llm.protocols.points import Points
from crypten_llm.protocols.rounds import Protocol, Rounds
from crypten_llm.protocols.secret import Overflow, Secret
from crypten_llm.protocols.sketch import Sketches
from crypten_llm.roles import CLIENT, DEALER, OWNER

if TYPE_CHECKING:
    from crypten_llm.links.meter import Meter
    from crypten_llm.links.transport import Transport
    from crypten_llm.protocols.dealer.runtime import Runtime
    from crypten_llm.protocols.dealer.tape import Tape
    from crypten_llm.session.calibration import Ranges
    from eviction.policy import Policy


LAYER_ERROR, LAYER_ERROR_QUANTISED = 0.01, 1.0  # of a layer of random weights, whose results are a few
LEFT_DOMAIN = (
    "attention scores or hidden states left the range in which engine 'wire' is right, so the answer ends here; tokens "
    "before this one are right, and 'debug-compare' shows the owner where it happens on a prompt of its own"
)


class WireEngine(Engine):
    """One role over a connected transport: two parties and a dealer, or two parties with a tape each."""

    name = "wire"
    is_private = pads = True
    tells_range = True
    shown_dtype = torch.float32  # of values that are opened
    shown_bits: int | None = None  # fractional bits of them, unless ``config.shown``

    def __init__(
        self,
        transport: Transport,
        config: WireConfig | None = None,
        material: Any = None,
        runtime: Runtime | None = None,
        device: torch.device | str = "cpu",
        peer_memory: bool = False,
    ) -> None:
        """config: the defaults unless given. peer_memory: whether what two parties on GPUs of one host repeat goes from
        card to card (``peer``).

        material: a ``Tape``, or where a dealer that runs alone writes; ``None`` where a dealer runs along. runtime:
        made from transport and material, on ``device``, unless given.
        """
        self.transport = transport
        self.rank = transport.rank
        self.config = config or WireConfig()
        self.balances = self.config.balanced
        self.layer_error = LAYER_ERROR_QUANTISED if self.config.short else LAYER_ERROR
        self.softmax_base = 2.0 ** (self.config.exponent / 256)
        self.dealer_follows = material is None
        self._material = material
        self.runtime = runtime or roles.make(transport, material, device)
        self.device = self.runtime.device
        if peer_memory:
            self.runtime.open_memory()
        self.rounds = Rounds(self.runtime)
        self.checks = Flags(self.runtime, self.rounds)
        self.sketches = Sketches(self.runtime, self.rounds)

    @property
    def meter(self) -> Meter:
        return self.transport.meter

    @contextmanager
    def section(self, label: str) -> Iterator[None]:
        if self.rounds.is_shared:  # programs side by side are in one section
            yield
            return
        self.runtime.begin(label)
        yield
        self.runtime.end()  # not after an error, which leaves a section half done

    def holds(self, rank: int) -> Held:
        """The owner's weights are integers of 32 bits, others have words, or half of one in a preset's narrow rings; of
        a cached number parties have what was opened and the part of its mask, the dealer the mask.
        """
        weight = 4 if self.config.balanced else HELD.weight
        return {OWNER: Held(4, HELD.cached), DEALER: Held(weight, 8)}.get(rank, Held(weight, HELD.cached))

    @contextmanager
    def supplied(self, block: Tape) -> Iterator[None]:
        """A with block in which all material comes from one that was dealt before, and no dealer follows."""
        self.dealer_follows = False
        try:
            with self.runtime.lent(block.keys, block):
                yield
        finally:
            self.dealer_follows = True

    def own_norm(self, weight: Weight, size: int) -> None:
        """Masks the weight of a norm of heads of that size, which else is done where it is first needed."""
        self.rounds.run(self.matrix(weight, scale=size**0.5))

    def masking_weights(self, key: bytes | None) -> AbstractContextManager[None]:
        """See ``Runtime.masking_weights``."""
        return self.runtime.masking_weights(key)

    def repeated(self, program: Callable[..., Secret]) -> Callable[..., Secret]:
        return program if self.runtime.device.type == "cpu" else Repeated(self, program)

    def places(self, size: int) -> Places:
        return Places(self.runtime, size)

    def padded(self, rows: Rows, places: Places, room: PaddedRows | None = None) -> PaddedRows:
        self.rounds.run(attention.settled(rows))
        made = PaddedRows(places, rows.shape, rows.values) if room is None else room
        made.fill(rows.operand)
        return made

    def unpadded(self, rows: PaddedRows, count: int) -> Rows:
        return Rows.opened(rows.taken(count), rows.values)

    def turning(self, table: torch.Tensor) -> torch.Tensor:
        return attention.turned_by(self, table).clone()

    def check_policy(self, policy: Policy) -> None:
        """Raises UsageError also for a policy that acts, with numbers of the quantised preset: scores and values there
        are others than those that policies' thresholds and trained weights were made for."""
        super().check_policy(policy)
        if self.config.balanced and policy.acts:
            raise UsageError(
                f"policy {policy.name} computes with scores and values of the default precision; use --policy full, or "
                "leave --precision out"
            )

    def expect(self, verb: str, facts: dict, request: int) -> None:
        if self._material is not None:
            self._material.expect(verb, facts, request)

    # What goes in.

    def calibrate(self, measure: Callable[[], Ranges]) -> Calibration:
        return domain.calibrate(self.config, measure())

    def parameter(self, value: torch.Tensor | None, shape: Sequence[int]) -> Weight:
        return Weight(self.runtime.held_by(OWNER, value), shape)

    def prepare(self, weight: Weight, norm: Weight | None = None, name: str = "", bias: Weight | None = None) -> None:
        """Raises UsageError, at the owner, for a linear layer behind a norm whose result could leave its range."""
        weight.name = name
        if norm is not None:
            norm.width = max(norm.width, self.config.width_of(name))
            self._check_reach(weight, norm, bias)
        if name == EMBEDDING:
            self.rounds.run(self.table(weight))
        else:
            self.rounds.run(self.matrix(weight, norm))
            weight.value = None  # a linear layer has one input, and takes integers from now on

    def matrix(
        self, weight: Weight, gamma: Weight | None = None, scale: float | None = None
    ) -> Protocol[products.OwnedMatrix]:
        """A protocol: the owner's weight as an operand, made once: W, or W * diag(gamma) * sqrt(H) after a norm.

        scale: multiplied in, in the place of sqrt(H).
        """
        if gamma not in weight.matrices:
            if self.runtime.is_lent:
                raise OneTimeError(f"{weight.name or 'a weight'} is masked within a block, which serves one request")
            c, after = self.config, gamma is not None or scale is not None
            factors: float | torch.Tensor = weight.shape[-1] ** 0.5 if scale is None and after else scale or 1.0
            if weight.value is not None and gamma is not None:
                assert gamma.value is not None, "the owner has all weights"
                factors = gamma.value.double() * factors
            width = c.width_of(weight.name) if after else c.input_of(weight.name)[1]
            fraction = c.weight_of(weight.name, after)
            made = yield from products.own(self.runtime, weight.value, weight.shape, fraction, width, factors)
            weight.matrices[gamma] = made
        return weight.matrices[gamma]

    def _check_reach(self, weight: Weight, norm: Weight, bias: Weight | None) -> None:
        """A norm's output, before its weight, is no longer than sqrt(H), so no product with a row of the weight is
        larger than that times the row's length.
        """
        reach = self.config.reach_of(weight.name)
        if reach is None or weight.value is None or norm.value is None:
            return
        most = products.row_lengths(weight.value, norm.value) * weight.shape[1] ** 0.5
        if bias is not None and bias.value is not None:
            most = most + bias.value.abs()
        what, limit = reach
        if not most.max().item() < limit:
            raise UsageError(
                f"{what} of this model may leave the range of engine 'wire', {limit:.3g}: a row of {weight.name}, with "
                "its norm's weight, is longer than that; use engine 'crypten'"
            )

    def table(self, weight: Weight) -> Protocol[embedding.OwnedTable]:
        """A protocol: the owner's embedding table, made once."""
        if weight.table is None:
            weight.table = yield from embedding.own_table(
                self.runtime,
                weight.value,
                (weight.shape[0], weight.shape[1]),
                self.config.hidden,
                self.config.embedding_bits,
            )
        return weight.table

    def tokens(self, ids: torch.Tensor | None, count: int, vocab_size: int) -> OneHot:
        mine = self.runtime.held_by(CLIENT, ids)
        bits = None if mine is None else self.runtime.moved(embedding.one_hot(mine, count, vocab_size))
        return OneHot(mine, bits, count, vocab_size)

    def tokens_of(self, points: Points, count: int, vocab_size: int) -> OneHot:
        """One-hot rows [count, V] of tokens that no party here knows."""
        bits = None if points.part is None else self.runtime.moved(points.part)
        return OneHot(None, bits, count, vocab_size, points)

    def secret(self, value: torch.Tensor | None, shape: Sequence[int], source: int) -> Secret:
        scale = self.config.hidden

        def words() -> torch.Tensor:
            assert value is not None, "its source has the value"
            return self.runtime.moved((value.double() * 2**scale).round().long())

        share = self.runtime.input(source, shape, words)
        return Secret(share, scale, 64, self.config.hidden_bits)

    def known_rows(self, value: torch.Tensor | None, shape: Sequence[int], values: bool = False) -> Rows:
        return known_rows(self, value, shape, values)

    def matmul(self, x: Any, y: Any) -> Any:
        raise Overflow("engine wire multiplies through scores and mix, whose operands it keeps as wires")

    # What comes out.

    def open_to(self, x: Handle | tuple[Handle, ...], rank: int) -> Any:
        """The other party sends its share without the bits below the ``shown``th: they would show how the value
        was computed, such as a factor that all logits have in common.

        Reveals: to ``rank``, x rounded to ``shown`` fractional bits; to both parties, whether any number since the
        last time left its range. Error: half a unit of ``shown`` bits.
        Cost: 1 round of 16 bytes each way, and 1 of l - d bits an element one way, for a ring of l bits and d bits
        dropped; of several handles together.
        Raises: LeftRange, at both parties, instead of opening what is wrong; PartyError as ``Sketches.checked``.
        """
        return self.rounds.run(self._show(x, rank))

    def pass_on(self, x: Handle | tuple[Handle, ...], rank: int, pad: Pad | None) -> list[Padded]:
        """``open_to`` for somebody who is no party here: at ``rank`` the value behind ``pad``, to be given to who knows
        it; at all how it looks. pad: at the other party alone, uniform words, new each time.

        Reveals, cost, raises: as ``open_to``, but that the value itself is nobody's. Error: a unit of ``shown_bits``.
        """
        return self.rounds.run(self._pass_on(x, rank, pad))

    def _pass_on(self, x: Handle | tuple[Handle, ...], rank: int, pad: Pad | None) -> Protocol[list[Padded]]:
        several = yield from self._checked(x)
        cuts, sender = self._cuts(several), OWNER + CLIENT - rank
        messages = []
        for each, cut in zip(several, cuts, strict=True):
            shape, bits = tuple(each.shape), each.width - cut
            pads = 0 if pad is None else self.runtime.moved(pad(shape, bits))
            messages.append(Message(sender, shape, bits, (each.share >> cut) + pads))
        others = yield [*messages]
        found = []
        for each, cut, other, message in zip(several, cuts, others, messages, strict=True):
            words = None
            if other is not None:
                mine = ring.low_bits(each.share + (1 << cut) - 1, each.width) >> cut
                words = ring.low_bits(mine + other, message.bits).cpu()
            found.append(Padded(words, message.shape, message.bits, each.scale - cut))
        return found

    def _checked(self, x: Handle | tuple[Handle, ...]) -> Protocol[list[Secret]]:
        """The shares of what is shown, once no number has left its range and each token was one."""
        several = []
        for handle in x if isinstance(x, tuple) else (x,):
            several.append((yield from value(self, handle)))
        if self.tells_range:
            self.rounds.start(self.sketches.checked())
            if (yield from self.checks.any_set()):
                raise LeftRange(LEFT_DOMAIN)
        return several

    def _cuts(self, several: list[Secret]) -> list[int]:
        """Bits of each that are dropped before it is shown."""
        shown = self.config.shown if self.shown_bits is None else self.shown_bits
        return [max(0, each.scale - shown) for each in several]

    def _show(self, x: Handle | tuple[Handle, ...], rank: int) -> Protocol[Any]:
        several = yield from self._checked(x)
        cuts, sender = self._cuts(several), OWNER + CLIENT - rank
        pieces = zip(several, cuts, strict=True)
        others = yield [Message(sender, tuple(x.shape), x.width - cut, x.share >> cut) for x, cut in pieces]
        if others[0] is None:
            return None
        found = []
        for part, other, cut in zip(several, others, cuts, strict=True):
            words = self._shown(part.share, other, cut, part.width)
            found.append(words.double().div(2.0**part.scale).to(self.shown_dtype).cpu())
        return tuple(found) if isinstance(x, tuple) else found[0]

    def _shown(self, share: torch.Tensor, other: torch.Tensor, cut: int, width: int) -> torch.Tensor:
        """The signed integers behind both shares, the other of which came without its ``cut`` low bits."""
        words = ring.low_bits(share + (other << cut) + ((1 << cut) >> 1), width)
        return words if width == 64 else words - (ring.top_bit(words, width) << width)


def _method(operation: Operation) -> Callable:
    """An operation as a method, which runs it to its end."""
    if operation.is_local:
        return operation.protocol

    @functools.wraps(operation.protocol)
    def run(self: WireEngine, *arguments: Any, **options: Any) -> Any:
        return self.rounds.run(operation.protocol(self, *arguments, **options))

    return run


for _name, _operation in OPERATIONS.items():
    setattr(WireEngine, _name, _method(_operation))
abc.update_abstractmethods(WireEngine)
