"""The operations that the Llama definition and every eviction policy are written against.

An engine decides what a *handle* is: a torch tensor (``plain``), an MPCTensor (``crypten``). Handles share
torch's names for what costs nothing: ``shape``, ``reshape``, ``permute``, ``transpose``, indexing by public slices.
Everything that computes on a secret is a method here, so that an engine can choose its protocol, and nothing
in ``models`` knows which engine runs.
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext

from crypten_llm.errors import UsageError
from crypten_llm.links.meter import Meter


class Engine(ABC):
    """Operations on handles. Shapes: T rows of hidden states, H hidden, V vocabulary, N keys in the cache."""

    name: str
    is_private: bool  # whether handles are secrets
    layer_error: float  # declared: of a layer's output on random inputs and weights of unit size (``bench``)
    dealer_follows: bool = False  # whether the dealer runs the same program, ahead of the parties' need
    dealer = None  # or the engine's link to a dealer that answers requests
    meter: Meter
    rank: int

    @abstractmethod
    def parameter(self, value, shape):
        """A weight that the owner holds: ``value`` is its float tensor at the owner and ``None`` elsewhere."""

    def prepare(self, weight, norm=None) -> None:  # noqa: B027  (few engines want to know)
        """Announces, while the model is loaded, that ``linear`` will meet ``weight``, or ``embed`` if it is a table.

        norm: weight of the norm whose output it will multiply, ``None`` for other inputs.
        """

    def expect(self, verb: str, facts: dict, request: int) -> None:  # noqa: B027  (most engines run anything)
        """Announces what comes next; an engine that was prepared for something else raises UsageError.

        verb: "model" (``facts`` is its configuration), or that of a request (``facts`` is its plan, ``request`` its
        number).
        """

    def calibrate(self, config, weights: dict) -> dict[str, float]:
        """At the owner, before its float ``weights`` are shared: public scales for its norms, by weight name.

        Raises UsageError when the model leaves the domain of the engine's functions.
        """
        return {}

    @abstractmethod
    def secret(self, value, shape, source: int):
        """A float tensor that party ``source`` holds, ``None`` elsewhere; |x| < 256 on fixed-point engines."""

    @abstractmethod
    def tokens(self, ids, count: int, vocab_size: int):
        """One-hot rows [count, V] of the client's token ids; ``ids`` is ``None`` on every other party."""

    @abstractmethod
    def embed(self, one_hot, weight):
        """[T, V] one-hot rows and [V, H] weight to [T, H]."""

    @abstractmethod
    def linear(self, x, weight, bias=None):
        """[T, in] by [out, in] to [T, out]."""

    def rows(self, x, values: bool = False):
        """Keys, or values, [kv_heads, T, head_dim] as the cache keeps them."""
        return x

    def scores(self, query, keys):
        """[kv_heads, M, head_dim] by cached [kv_heads, N, head_dim] to [kv_heads, M, N]."""
        return self.matmul(query, keys.transpose(1, 2))

    def mix(self, weights, values):
        """Softmax weights [kv_heads, M, N] by cached [kv_heads, N, head_dim] to [kv_heads, M, head_dim]."""
        return self.matmul(weights, values)

    @abstractmethod
    def matmul(self, x, y):
        """Batched matrix product of two secrets."""

    @abstractmethod
    def rms_norm(self, x, weight, eps: float, scale: float):
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

        ``scale`` is a public power of four that brings mean(x^2) near 1; the result does not depend on it but for
        the error of the approximation.
        """

    @abstractmethod
    def rotate(self, x, cos, sin):
        """Rotary embedding with public tables: x * cos + rotate_half(x) * sin; x [heads, T, head_dim]."""

    @abstractmethod
    def softmax(self, scores, mask=None):
        """Row-wise softmax of [..., N]; ``mask`` is a public bool [..., N], true where a key may be seen."""

    @abstractmethod
    def swiglu(self, gate, up):
        """silu(gate) * up, element-wise."""

    @abstractmethod
    def add(self, x, y):
        """x + y, element-wise; local on every engine."""

    def residual(self, x, y):
        """x + y for a hidden state x and what a layer adds to it."""
        return self.add(x, y)

    @abstractmethod
    def cat(self, handles, dim: int):
        """Handles joined along a dimension; local on every engine."""

    @abstractmethod
    def open_to(self, x, rank: int):
        """The float value of ``x`` at party ``rank`` and ``None`` elsewhere. Only ``reveal`` may call this."""

    def check_policy(self, policy) -> None:
        """Raises UsageError unless this engine has the operations of an eviction policy (``eviction.operations``)."""
        missing = [name for name in policy.uses if not hasattr(self, name)]
        if missing:
            raise UsageError(
                f"engine {self.name!r} cannot run policy {policy.name}: it lacks {', '.join(missing)}; choose another "
                "engine (--engine) or another policy (--policy)"
            )

    def section(self, label: str):
        """Context around a stretch of the program whose randomness starts afresh: a prefill, a decode step."""
        return nullcontext()
