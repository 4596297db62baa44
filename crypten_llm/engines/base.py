"""The operations that the Llama definition and every eviction policy are written against.

An engine decides what a *handle* is: a torch tensor (``plain``), an MPCTensor (``crypten``). Handles share
torch's names for what costs nothing: ``shape``, ``reshape``, ``permute``, ``transpose``, indexing by public slices.
Everything that computes on a secret is a method here, so that an engine can choose its protocol, and nothing
in ``models`` knows which engine runs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from crypten_llm.engines.domain import Calibration
from crypten_llm.errors import UsageError
from crypten_llm.links.meter import Meter
from eviction.operations import Handle

Method = TypeVar("Method")
Result = TypeVar("Result")

if TYPE_CHECKING:
    from crypten_llm.engines.passing import Pad, Padded
    from crypten_llm.protocols.points import Points
    from crypten_llm.session.calibration import Ranges
    from eviction import Policy

    # A checker cannot see the operations that an engine takes from a table; Python asks for each when one is made.
    def required(method: Method) -> Method: ...
else:
    required = abstractmethod


class Held(NamedTuple):
    """Bytes that a party keeps, at least, of a weight and of a cached number."""

    weight: int
    cached: int


HELD = Held(8, 16)  # at a party of engine ``wire`` that has no weights of its own


class Engine(ABC):
    """Operations on handles. Shapes: T rows of hidden states, H hidden, V vocabulary, N keys in the cache."""

    name: str
    is_private: bool  # whether handles are secrets
    layer_error: float  # declared: of a layer's output on random inputs and weights of unit size (``bench``)
    device: torch.device = torch.device("cpu")  # where this party's handles are
    softmax_base: float = math.e  # scores are exponents of this
    tells_range: bool = False  # whether it tells both parties, with each value that is opened, if any left its range
    pads: bool = False  # whether it has ``padded`` caches
    balances: bool = False  # whether it takes weights as ``models.balance`` leaves them
    dealer_follows: bool = False  # whether the dealer runs the same program, ahead of the parties' need
    dealer: Any = None  # or the engine's link to a dealer that answers requests
    rounds: Any = None  # where programs can share rounds: what runs them side by side
    rank: int

    def holds(self, rank: int) -> Held:
        """What the party of that rank keeps of a weight and of a cached number."""
        return Held(8, 8)

    if TYPE_CHECKING:

        @property
        def meter(self) -> Meter:
            """Counters of this party."""

    @required
    def parameter(self, value: torch.Tensor | None, shape: Sequence[int]) -> Handle:
        """A weight that the owner holds: ``value`` is its float tensor at the owner and ``None`` elsewhere."""

    def prepare(self, weight: Handle, norm: Handle = None, name: str = "", bias: Handle = None) -> None:
        """Announces, while the model is loaded, that ``linear`` will meet ``weight``, or ``embed`` if it is a table.

        norm: weight of the norm whose output it will multiply, ``None`` for other inputs. name: of the layer, such as
        "q_proj". bias: what will be added, ``None`` for nothing.
        """

    def expect(self, verb: str, facts: dict, request: int) -> None:
        """Announces what comes next; an engine that was prepared for something else raises UsageError.

        verb: "model" (``facts`` is its configuration), or that of a request (``facts`` is its plan, ``request`` its
        number).
        """

    def calibrate(self, measure: Callable[[], Ranges]) -> Calibration:
        """At the owner, before its weights are shared: public scales for the model's norms, and how far its numbers go
        beside the ranges of the engine's functions.

        measure: runs the model in the clear, for an engine that wants to know.
        """
        return Calibration(self.name)

    @required
    def secret(self, value: torch.Tensor | None, shape: Sequence[int], source: int) -> Handle:
        """A float tensor that party ``source`` holds, ``None`` elsewhere; |x| < 256 on fixed-point engines."""

    @required
    def tokens(self, ids: torch.Tensor | None, count: int, vocab_size: int) -> Handle:
        """One-hot rows [count, V] of the client's token ids; ``ids`` is ``None`` on every other party."""

    @required
    def embed(self, one_hot: Handle, weight: Handle) -> Handle:
        """[T, V] one-hot rows and [V, H] weight to [T, H]."""

    @required
    def linear(self, x: Handle, weight: Handle, bias: Handle = None) -> Handle:
        """[T, in] by [out, in] to [T, out]."""

    def rows(self, x: Handle, values: bool = False) -> Handle:
        """Keys, or values, [kv_heads, T, head_dim] as the cache keeps them."""
        return x

    @required
    def known_rows(self, value: torch.Tensor | None, shape: Sequence[int], values: bool = False) -> Handle:
        """Keys, or values, [kv_heads, T, head_dim] as the cache keeps them, which the owner knows in the clear.

        value: as the model of engine ``plain`` would cache them, to this engine's ``softmax_base``; a float tensor at
        the owner and ``None`` elsewhere.
        """

    def scores(self, query: Handle, keys: Handle, mask: torch.Tensor | None = None) -> Handle:
        """[kv_heads, M, head_dim] by cached [kv_heads, N, head_dim] to [kv_heads, M, N].

        mask: public bool [M, N]; what is false in it will not be read, and may be anything.
        """
        return self.matmul(query, keys.transpose(1, 2))

    def mix(self, weights: Handle, values: Handle) -> Handle:
        """Softmax weights [kv_heads, M, N] by cached [kv_heads, N, head_dim] to [kv_heads, M, head_dim]."""
        return self.matmul(weights, values)

    @required
    def matmul(self, x: Handle, y: Handle) -> Handle:
        """Batched matrix product of two secrets."""

    @required
    def rms_norm(self, x: Handle, weight: Handle, eps: float, scale: float) -> Handle:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

        ``scale`` is a public power of four that brings mean(x^2) near 1; the result does not depend on it but for
        the error of the approximation.
        """

    @required
    def rotate(self, x: Handle, cos: torch.Tensor, sin: torch.Tensor) -> Handle:
        """Rotary embedding with public tables: x * cos + rotate_half(x) * sin; x [heads, T, head_dim]."""

    @required
    def softmax(self, scores: Handle, mask: torch.Tensor | None = None) -> Handle:
        """Row-wise softmax of [..., N], to ``softmax_base``; ``mask`` is a public bool [M, N], true where a key may be
        seen."""

    @required
    def swiglu(self, gate: Handle, up: Handle) -> Handle:
        """silu(gate) * up, element-wise."""

    @required
    def add(self, x: Handle, y: Handle) -> Handle:
        """x + y, element-wise; local on every engine."""

    def residual(self, x: Handle, y: Handle) -> Handle:
        """x + y for a hidden state x and what a layer adds to it."""
        return self.add(x, y)

    @required
    def cat(self, handles: list[Handle], dim: int) -> Handle:
        """Handles joined along a dimension; local on every engine."""

    @required
    def sample(self, logits: Handle, temperature: float) -> Handle:
        """[1, V] to [1], the index of the largest; of each plus temperature times Gumbel noise, which makes it a draw
        from softmax(logits / temperature). temperature: public, 0 for none.
        """

    @required
    def top_k(self, logits: Handle, count: int) -> Any:
        """[1, V] to (indices [count] of the largest, these logits [count])."""

    @required
    def open_to(self, x: Handle | tuple[Handle, ...], rank: int) -> Any:
        """The float value of ``x``, or of each of several, at party ``rank`` and ``None`` elsewhere. Only ``reveal``
        may call this.
        """

    # Of engines whose second party can stand for a client that is no party itself.

    def tokens_of(self, points: Points, count: int, vocab_size: int) -> Handle:
        """One-hot rows [count, V] of tokens that no party knows; points: what this one has of them."""
        raise UsageError(f"engine {self.name!r} has no helper; use engine 'wire'")

    def pass_on(self, x: Handle | tuple[Handle, ...], rank: int, pad: Pad | None) -> list[Padded]:
        """``open_to`` for who is no party: at ``rank`` the value behind a pad, at all how it looks. pad: at the other
        party alone. Only ``reveal`` may call this.
        """
        raise UsageError(f"engine {self.name!r} has no helper; use engine 'wire'")

    def check_sampling(self, temperature: float) -> None:
        """Raises UsageError where ``sample`` cannot draw at that temperature."""

    def check_policy(self, policy: Policy) -> None:
        """Raises UsageError unless this engine has the operations of an eviction policy (``eviction.operations``)."""
        missing = [name for name in policy.uses if not hasattr(self, name)]
        if missing:
            raise UsageError(
                f"engine {self.name!r} cannot run policy {policy.name}: it lacks {', '.join(missing)}; choose another "
                "engine (--engine) or another policy (--policy)"
            )

    def side_by_side(self, programs: list[Callable[[], Result]]) -> list[Result]:
        """What each of these programs returns, which know nothing of each other.

        They share rounds where the engine has such; elsewhere one runs after another.
        """
        return self.rounds.side_by_side(programs) if self.rounds else [program() for program in programs]

    def repeated(self, program: Callable[..., Handle]) -> Callable[..., Handle]:
        """The program of sections that are alike, for an engine that runs it faster from the second or third time on.

        To be called once a section, right behind its begin, with handles of the same shapes. What it returns is gone
        with the next call; so is what it keeps, but for what it writes into tensors that were there before.
        """
        return program

    # Of engines that ``pads``: caches in which a decode step is the same at every length.

    def places(self, size: int) -> Any:
        """Room for ``size`` rows, the same of all layers; ``put`` says how many are there."""
        raise UsageError(f"engine {self.name!r} has no padded caches")

    def padded(self, rows: Handle, places: Any, room: Handle = None) -> Handle:
        """Cached rows in such room: new room, or that which other rows are in."""
        raise UsageError(f"engine {self.name!r} has no padded caches")

    def unpadded(self, rows: Handle, count: int) -> Handle:
        """The first ``count`` of padded rows, as rows of their own."""
        raise UsageError(f"engine {self.name!r} has no padded caches")

    def turning(self, table: torch.Tensor) -> torch.Tensor:
        """A table of ``rotate``'s as an input of what is ``repeated``."""
        return table

    def section(self, label: str) -> AbstractContextManager[None]:
        """Context around a stretch of the program whose randomness starts afresh: a prefill, a decode step."""
        return nullcontext()
