"""Numbers of engine ``wire``: fractional bits, declared bounds, and how many bits a value needs.

Owns the configuration that all parties agree on, the plan's fixed scales, and the arithmetic of widths. Nothing here
sees a share's contents or sends anything.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from crypten_llm.kernels.ring import broadcast
from crypten_llm.precisions import DEFAULT
from crypten_llm.protocols.activation import SILU, SILU_SHORT, Activation
from crypten_llm.protocols.ladder import FINE
from crypten_llm.protocols.secret import Overflow
from crypten_llm.protocols.softmax import Exponents

PRECISION = 20  # bits of what is compared, with one for a difference; scores below 2^6 keep 13 fractional bits
KEEPING = 24  # the same for ``top``, which cuts among the many rows of a prompt that draw next to nothing
DRAWN = 24  # fractional bits of the attention that a row drew
FACTOR = 16  # fractional bits of public factors that are no multiples of a larger unit
ENOUGH = 10  # the least of them for which a ring without room is left as it is
ROOM = 16  # fractional bits that are left of a value whose ring became too small
WORD = 64  # bits of a share
EMBEDDING = "embed_tokens"  # what the table's layer is called
LOGITS = "lm_head"  # the layer that gives logits, whose weight may be the table
RANGE = 8  # bits of a score before the point: its ring


@dataclass(frozen=True)
class WireConfig:
    """Fractional bits and rings; all parties must agree on them.

    Rings are planned backwards: dropping low bits costs as many bits of the ring, so what is opened needs the ring of
    what will be made of it and the bits that are dropped on the way.

    Fractional bits: hidden, of hidden states; row, of rows that a norm has divided by their length; weight, of the
    weights that these meet; even_weight, of W_v and W_up; other_weight, down_weight, of W_o and W_down; rope, of its
    tables; key, of queries and keys; score; value; attention, of softmax weights; mixed, of what they mix before it is
    divided by their sum; inverse, of 1 / sum; attended, of W_o's input; silu; up; product, of silu(gate) * up;
    activation, of policies' values; shown, of what is revealed.

    balanced: W_v and W_up come with rows of equal length (``models.balance``), so that values and up are below 1.
    short: gates are opened in fewer bits (``SILU_SHORT``).

    Bounds: hidden_bits, |x| < 2^hidden_bits of hidden states and of what is added to them; key_bits, of queries, keys
    and values as eviction policies compute with them, while the model itself needs no bound on these; mixed_bits;
    up_bits; logit_bits, and beside it logit_room of their ring for what is added; embedding_bits; gates, how many
    intervals tell a gate's size. exponent: q, the ring of softmax's exponents.
    """

    hidden: int = 16
    row: int = 17
    weight: int = 13
    even_weight: int = 13
    other_weight: int = 14
    down_weight: int = 14
    rope: int = 13
    key: int = 12
    score: int = 14
    value: int = 13
    attention: int = 17
    mixed: int = 16
    inverse: int = 15
    attended: int = 16
    silu: int = 13
    up: int = 13
    product: int = 14
    activation: int = 14
    shown: int = 16
    balanced: bool = False
    short: bool = False
    hidden_bits: int = 17
    key_bits: int = 8
    mixed_bits: int = 8
    up_bits: int = 10
    logit_bits: int = 16
    logit_room: int = 0
    embedding_bits: int = 4
    gates: int = 256
    exponent: int = 256

    @classmethod
    def of(cls, precision: str) -> "WireConfig":
        """The preset of that name in ``PRECISIONS``."""
        return cls() if precision == DEFAULT else cls.quantised()

    @classmethod
    def quantised(cls) -> "WireConfig":
        """Weights of about 8 bits, and fewer bits behind the point of all that is opened (docs/precision.md)."""
        return cls(
            hidden=11,
            row=12,
            weight=9,
            even_weight=12,
            other_weight=6,
            down_weight=2,
            rope=9,
            key=7,
            score=6,
            value=10,
            attention=11,
            mixed=12,
            inverse=9,
            attended=12,
            silu=7,
            up=11,
            product=11,
            shown=8,
            balanced=True,
            short=True,
            mixed_bits=0,
            up_bits=0,
            logit_bits=12,
        )

    @classmethod
    def choosing(cls, precision: str = DEFAULT) -> "WireConfig":
        """For a run that compares logits on shares: fewer bits before the point leave more behind it, and one of the
        ring is for noise."""
        return replace(cls.of(precision), logit_bits=12, logit_room=1)

    def __post_init__(self) -> None:
        """Raises Overflow where a ring would be wider than a word."""
        rings = {
            "queries and keys": self.rotated_width,
            "gates": self.mlp_width,
            "their products": self.gated_width,
            "mixed values": self.mixed_width,
            "mixed values, divided": self.divided_width,
            "logits": self.logits_width,
        }
        for what, width in rings.items():
            if width > WORD:
                raise Overflow(f"{what} would need a ring of {width} bits, and a word has {WORD}: take fewer bits")

    @cached_property
    def exponents(self) -> Exponents:
        return Exponents(self.exponent, self.score + RANGE)

    @property
    def gate(self) -> Activation:
        """How silu is computed."""
        return SILU_SHORT if self.short else SILU

    @cached_property
    def hidden_width(self) -> int:
        """Of the residual stream."""
        return self.hidden + self.hidden_bits + 2

    @cached_property
    def attended_width(self) -> int:
        """Of W_o's input: its product, at ``attended`` + ``other_weight`` bits, is dropped into the residual's."""
        return self.hidden_width + self.attended + self.other_weight - self.hidden

    @cached_property
    def product_width(self) -> int:
        """Of W_down's input."""
        return self.hidden_width + self.product + self.down_weight - self.hidden

    @cached_property
    def gated_width(self) -> int:
        """Of silu(gate) * up, before low bits are dropped."""
        return self.silu + self.up + self.product_width - self.product

    @cached_property
    def divided_width(self) -> int:
        """Of what attention mixes times 1 / sum, before low bits are dropped."""
        return self.mixed + self.inverse + self.attended_width - self.attended

    @cached_property
    def key_width(self) -> int:
        """Of queries and keys: their product, at twice ``key`` bits, is dropped to a score; one bit is for policies,
        which compare scores below 2^7."""
        return RANGE + 2 * self.key + 1

    @cached_property
    def rotated_width(self) -> int:
        """Of what queries and keys are before they are rotated, as a linear layer after a norm gives them."""
        return self.key_width + self.row + self.weight + self.rope - self.key

    @cached_property
    def mlp_width(self) -> int:
        """Of gate and up, as a linear layer after a norm gives them."""
        dropped = self.row + self.weight + 1 - self.gate.fraction
        return max(self.gate.ring + dropped, self.up_bits + 2 + self.row + self.even_weight)

    @cached_property
    def logits_width(self) -> int:
        return self.row + self.weight + self.logit_bits + self.logit_room + 2

    @cached_property
    def mixed_width(self) -> int:
        """The ring of softmax weights and values, in which their product fits, undivided."""
        return self.attention + self.value + self.mixed_bits + 2

    def input_of(self, name: str) -> tuple[int, int]:
        """Fractional bits and ring of the input of a linear layer that is not after a norm."""
        return (self.product, self.product_width) if name == "down_proj" else (self.attended, self.attended_width)

    def weight_of(self, name: str, after: bool) -> int:
        """Fractional bits of a linear layer's weight; after: whether it is after a norm."""
        if not after:
            return self.down_weight if name == "down_proj" else self.other_weight
        return self.even_weight if name in ("v_proj", "up_proj") else self.weight

    def bits_of(self, name: str) -> int:
        """What is declared of the result of a linear layer after a norm: below 2^bits."""
        if name == "gate_proj":
            return max(self.up_bits, RANGE)
        if name == "up_proj":
            return self.up_bits
        return self.logit_bits if name == LOGITS else self.key_bits

    def reach_of(self, name: str) -> tuple[str, float] | None:
        """What the owner proves of that when it loads its weights: in words, and the limit."""
        if name == "gate_proj":
            return "gates", self.gate.bound(self.gates)
        if name == "up_proj":
            return "what gates are multiplied with", 2.0**self.up_bits
        if name == "v_proj" and self.balanced:
            return "values", 2.0**self.mixed_bits
        return ("logits", 2.0**self.logit_bits) if name == LOGITS else None

    def width_of(self, name: str) -> int:
        """Of the result of a linear layer after a norm, by the layer's name; 64 for what is not of a decoder layer."""
        if name in ("gate_proj", "up_proj"):
            return self.mlp_width
        return self.logits_width if name == LOGITS else self.rotated_width

    @property
    def scores(self) -> tuple[float, float]:
        """What softmax may see, from and to."""
        low, high = self.exponents.scores
        return low * math.log(2), high * math.log(2)

    @property
    def row_logarithms(self) -> tuple[float, float]:
        """Of a row's sum of exp(s), from and to."""
        low, high = self.exponents.sums
        return low * math.log(2), high * math.log(2)

    @property
    def square_sums(self) -> float:
        """A hidden state's sum of squares, below this: from there on, it may be taken for 2^(2 hidden_bits - 1)."""
        return (1 - 2.0**-FINE) * 2.0 ** (2 * self.hidden_bits - 1)


def whole_bytes(bits: int) -> int:
    """Rounded up to whole bytes: what is left over is room for sums."""
    return min(64, -(-bits // 8) * 8)


def bits_for(factor: float) -> int:
    """The smallest g with factor <= 2^g; exact, so that it is the same on every machine."""
    if factor == 0:
        return 0
    mantissa, exponent = math.frexp(factor)
    return exponent - (mantissa == 0.5)


def as_units(value: torch.Tensor, most: int) -> tuple[torch.Tensor, int]:
    """(integers, p) with value = integers / 2^p: exact with the smallest p up to ``most``, else rounded there."""
    value = value.double()
    for fraction in range(most + 1):
        scaled = value * 2.0**fraction
        if fraction == most or bool((scaled == scaled.round()).all()):
            break
    return scaled.round().long(), fraction


def times(share: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """Shares times public integers; at the dealer the shape."""
    if share.is_meta:
        return share.expand(broadcast(share.shape, integers.shape))
    return share * integers
