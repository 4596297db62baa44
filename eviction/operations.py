"""The operations that a policy is handed, and what it gives back. An engine implements them; policies import no engine.

Owns the contract. A *handle* is whatever the engine computes with: a float tensor (plaintext), additive shares. It has
torch's names for what costs nothing: ``shape``, ``reshape``, ``permute``, ``transpose`` and indexing by public slices
and public index tensors. All shapes, counts, positions of clusters and settings are public; values and which rows were
chosen are secret. No operation here shows a value to anybody, so no policy can.

Shapes: G kv heads, M query rows of one kv head (heads of its group times tokens), N rows in the cache, D head_dim.
A tensor that all kv heads share has G = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Handle = Any  # which of its kinds of handle an operation takes is between the engine and itself


@dataclass(frozen=True)
class Choice:
    """The rows that one decode step attends to, in the order in which scores are gathered.

    rows: indices of rows that are always attended to, public, int64 [P]. picks: one-hot handle [G or 1, k, C]: k of C
    blocks of ``size`` rows, block c being rows first + c * size and on, in order of position; ``None`` for none.
    """

    rows: torch.Tensor
    picks: Handle = None
    first: int = 0
    size: int = 1

    @property
    def count(self) -> int:
        """Rows attended to."""
        return len(self.rows) + (0 if self.picks is None else self.picks.shape[-2] * self.size)


def no_rotary(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer that was made without a model. Raises ValueError."""
    raise ValueError(f"no rotary embedding is known for {len(places)} places; make the layer with rotary=")


@dataclass
class Layer:
    """What a policy knows of one layer: public sizes, the cache's rows as handles, and its own notes.

    keys, values: the cache's rows [G, N, D], rotated keys. positions: of each row, public int64 [N] while the cache is
    as it came; ``None`` once rows were chosen by a secret. notes: whatever the policy wants to remember; common: the
    same of all layers of a prompt together. before: the layer below, ``None`` for the first. which: under a policy that
    splits a layer's heads (``Policy.split``), which of the model's kv heads these G are; the layer below is then
    unknown. () for all. rotary: of public places int64 [P] the cosines and sines [P, head_dim] by which attention turns
    queries there, the right half like the left.
    """

    index: int
    layers: int
    prompt_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    keys: Handle = None
    values: Handle = None
    positions: torch.Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    before: "Layer | None" = None
    which: tuple[int, ...] = ()
    rotary: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = no_rotary

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.heads // self.kv_heads

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]


@dataclass(frozen=True)
class Seen:
    """What a policy sees of one pass of a layer: T new rows and their attention, as handles.

    positions: of the new rows, public int64 [T]. query: [G, M, D] with M = group * T, row g * T + t being query head g
    of its kv head at the t-th new row. key, value: [G, T, D]. query_before, key_before: the same before the rotary
    embedding. scores, weights: [G, M, N] over the cache's rows, the new ones last; scores are of all rows and not
    masked, softmax weights are zero where a row may not be seen or was not chosen.
    """

    positions: torch.Tensor
    query: Handle
    key: Handle
    value: Handle
    query_before: Handle
    key_before: Handle
    scores: Handle
    weights: Handle


class Operations(Protocol):
    """All are methods of an engine. "Local" ones send nothing on shares. ``is_private`` says whether handles are
    secrets; ``softmax_base``, of what softmax takes scores to be exponents, queries and keys being scaled for that.
    """

    is_private: bool
    softmax_base: float

    # Local: linear with public coefficients.

    def add(self, x: Handle, y: Handle) -> Handle:
        """x + y, of the same shape."""

    def public(self, value: torch.Tensor) -> Handle:
        """A public float tensor as a handle."""

    def cat(self, handles: list, dim: int) -> Handle:
        """Joined along a dimension. Rows (of the cache, of ``take``, ``keep``, ``fixed``) join along 1."""

    def scale(self, x: Handle, factor: float | torch.Tensor) -> Handle:
        """x * factor for a public number or a public float tensor that broadcasts to x."""

    def total(self, x: Handle, dim: int) -> Handle:
        """The sum over one dimension, which goes."""

    def transform(self, x: Handle, matrix: torch.Tensor) -> Handle:
        """x @ matrix for a public float matrix [N, K]: [..., N] to [..., K] (pooling, means of clusters). A matrix of
        integers is exact: it takes 0/1 bits to bits, one-hot rows to one-hot rows."""

    def within(self, x: Handle, limit: float) -> Handle:
        """x, of which the policy knows that |x| <= limit: shares are compared the finer the smaller that is."""

    # Attention.

    def scores(self, query: Handle, keys: Handle) -> Handle:
        """[G, M, D] by rows [G, N, D] to [G, M, N]; keys may be the cache's rows, or rows made by ``fixed``. A query
        (the same object) is opened once, however often it is scored."""

    def mass(self, weights: Handle, queries: torch.Tensor) -> Handle:
        """Attention that each row drew: sum over m of queries[m] * w[g, m, n] for softmax weights w whose rows sum
        to one; queries: public float [M]. [G, M, N] to [G, N]. To be called after ``mix`` has used the weights."""

    def gather_scores(self, choice: Choice, scores: Handle) -> Handle:
        """[G, M, N] to [G, M, choice.count]: what ``choice`` attends to."""

    def scatter_weights(self, choice: Choice, weights: Handle, count: int) -> Handle:
        """Its inverse for softmax weights: [G, M, choice.count] to [G, M, count], zero at rows not chosen."""

    def softmax(self, scores: Handle, mask: torch.Tensor | None = None) -> Handle:
        """Softmax weights, to ``softmax_base``, of [G, M, N]; mask: public bool [M, N], true where a row is seen."""

    def mix(self, weights: Handle, rows: Handle) -> Handle:
        """Softmax weights [G, M, N] by rows [G, N, D] to [G, M, D]."""

    # Rows of the cache.

    def contents(self, rows: Handle) -> Handle:
        """Cached rows [G, N, D] as a handle to compute with; local."""

    def fixed(self, x: Handle, values: bool = False) -> Handle:
        """A handle [G, N, D] as rows that many products will use: its one opening joins the next message. values: they
        take the place of the cache's values, to which new rows will be joined."""

    def take(self, rows: Handle, index: torch.Tensor) -> Handle:
        """Rows at public indices int64 [K], the same for all kv heads; local."""

    def keep(self, rows: Handle, picks: Handle, size: int = 1) -> Handle:
        """Rows [G, C * size, D], which are blocks of ``size``, by one-hot [G or 1, K, C] to rows [G, K * size, D]."""

    def drop(self, rows: Handle, hot: Handle) -> Handle:
        """Rows [G, N, D] without the one that hot [G or 1, N] marks, the others in order: [G, N - 1, D]."""

    # Comparisons. x is compared at the engine's precision for scores; ties go to the lower index.

    def top(self, x: Handle, count: int) -> Handle:
        """1 at the ``count`` largest of the last dimension, 0 elsewhere: [..., N] to [..., N]."""

    def best(self, x: Handle, count: int) -> Handle:
        """One-hot rows of the ``count`` largest: ``picks`` of ``top`` in an order that nobody may rely on. One round
        less on shares; enough for a ``Choice``, whose order does not change what is attended to."""

    def picks(self, bits: Handle, count: int) -> Handle:
        """One-hot rows [..., count, N] of 0/1 bits [..., N] with exactly ``count`` ones, in order of position."""

    def gather(self, picks: Handle, x: Handle) -> Handle:
        """picks [..., K, N] times x [..., N, C]: rows of x; also composes picks with picks (the result is picks again).
        Rows of 0/1 bits with several ones give sums of rows of x."""

    def largest(self, x: Handle, dim: int) -> Handle:
        """The maximum over one dimension, which goes (minima are maxima of the negated)."""

    def above(self, x: Handle, threshold: float) -> Handle:
        """1 where x > threshold, 0 elsewhere."""

    # Arithmetic on two secrets, and functions.

    def multiply(self, x: Handle, y: Handle) -> Handle:
        """Element-wise with broadcasting."""

    def choose(self, bits: Handle, x: Handle, y: Handle) -> Handle:
        """x where bits is 1, y where it is 0; with broadcasting."""

    def coarse(self, rows: Handle, bits: int) -> Handle:
        """Rows [G, N, D] of numbers in [-1, 1], each rounded to one of 2^bits - 1 levels, 1 / (2^(bits - 1) - 1) apart,
        0 and both ends among them, and held in as little memory as that needs; beyond the ends it saturates."""

    def sigmoid(self, x: Handle) -> Handle:
        """1 / (1 + exp(-x)) for |x| <= 12."""

    def reciprocal(self, x: Handle, low: float, high: float) -> Handle:
        """1 / x for x in [low, high], 0 < low, both public."""
