"""Engine ``crypten``: MPCTensors and CrypTen's own protocols, n compute parties and a dealer.

The baseline. Its numerics are CrypTen's: fixed point with local truncation, comparison by bit decomposition, exp by
repeated squaring, reciprocal and inverse square root by Newton's iteration. Each holds on a narrow range only, so
inputs are brought into it by public factors; the settings, and the ranges that follow from them, are in ``domain``.

Every method reveals nothing but ``open_to``: what is opened is masked by fresh randomness of the dealer. Errors
are absolute unless they say relative, u = 2^-f is the unit of the fixed point, and each truncation may in addition
be wild: wrong by 2^(64-2f), with probability |x| 2^(2f-64) on two parties. Rounds are those of two parties; more
parties also wait for each truncation.

Source: CrypTen, arXiv 2109.00984, and its dealer protocol in appendix C.2; where we differ the method says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.base import Engine, Held
from crypten_llm.engines.crypten import bridge
from crypten_llm.engines.crypten.bridge import bare, crypten
from crypten_llm.engines.crypten.domain import LONGEST, MASKED, CryptenConfig, calibrate
from crypten_llm.engines.crypten.selection import CryptenSelection, row_maximum
from crypten_llm.engines.domain import Calibration
from crypten_llm.errors import UsageError
from eviction.operations import Handle

if TYPE_CHECKING:
    from crypten_llm.links.meter import Meter
    from crypten_llm.links.transport import Transport
    from crypten_llm.session.calibration import Ranges
    from eviction import Policy


MPCTensor = crypten.mpc.MPCTensor
ArithmeticSharedTensor = crypten.mpc.primitives.ArithmeticSharedTensor


class CryptenEngine(CryptenSelection, Engine):
    """MPCTensors on this party; every party constructs one at the same time over a connected ``transport``."""

    name = "crypten"
    is_private = True
    layer_error = 0.1

    def __init__(
        self,
        transport: Transport,
        compute_parties: int,
        config: CryptenConfig | None = None,
        owner: int = 0,
        client: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.transport = transport
        self.device, self.parties = torch.device(device), compute_parties
        self.rank = transport.rank
        self.owner, self.client = owner, client
        self.config = config = config or CryptenConfig()
        self.dealer = bridge.start(transport, compute_parties, config.precision_bits, self.device)
        crypten.cfg.functions.exp_iterations = config.squarings
        crypten.cfg.functions.sqrt_nr_iters = config.rsqrt_iterations
        crypten.cfg.functions.reciprocal_nr_iters = config.reciprocal_iterations
        crypten.cfg.functions.reciprocal_all_pos = True  # every reciprocal here is of a sum of exponentials

    @property
    def meter(self) -> Meter:
        return self.transport.meter

    def holds(self, rank: int) -> Held:
        """A share is a word; the dealer, which answers requests, keeps nothing."""
        return Held(8, 8) if rank < self.parties else Held(0, 0)

    def calibrate(self, measure: Callable[[], Ranges]) -> Calibration:
        return calibrate(self.config, measure())

    def parameter(self, value: torch.Tensor | None, shape: Sequence[int]) -> Handle:
        """Shares of the owner's tensor. Error: u / 2. Cost: nothing."""
        return self._share(value, shape, self.owner)

    def secret(self, value: torch.Tensor | None, shape: Sequence[int], source: int) -> Handle:
        return self._share(value, shape, source)

    def known_rows(self, value: torch.Tensor | None, shape: Sequence[int], values: bool = False) -> Handle:
        """Shares of the owner's rows. Error: u / 2. Cost: nothing."""
        return self._share(value, shape, self.owner)

    def tokens(self, ids: torch.Tensor | None, count: int, vocab_size: int) -> Handle:
        """Shares of the client's one-hot rows, exact. Cost: nothing."""
        value = None
        if self.rank == self.client:
            value = torch.nn.functional.one_hot(torch.as_tensor(ids), vocab_size).float()
        return self._share(value, (count, vocab_size), self.client)

    def _share(self, value: torch.Tensor | None, shape: Sequence[int], source: int) -> Handle:
        """Additive shares of ``value``, which only ``source`` holds. No message: zero is shared from common keys."""
        share = ArithmeticSharedTensor.PRZS(torch.Size(shape), device=self.device).share
        if self.rank == source:
            assert value is not None, "its source has the value"
            assert value.shape == torch.Size(shape), f"{tuple(value.shape)} given, {tuple(shape)} announced"
            share += (value.to(self.device).double() * 2**self.config.precision_bits).round().long()
        return MPCTensor.from_shares(share)

    def embed(self, one_hot: Handle, weight: Handle) -> Handle:
        """As ``matmul``; the product with a one-hot row is exact but for u."""
        return one_hot.matmul(weight)

    def linear(self, x: Handle, weight: Handle, bias: Handle = None) -> Handle:
        """As ``matmul``, and a local sum."""
        out = x.matmul(weight.transpose(0, 1))
        return out if bias is None else out + bias

    def matmul(self, x: Handle, y: Handle) -> Handle:
        """Beaver's protocol. Domain: |result| < 2^(62-2f). Error: u, and u (|x| + |y|) for the rounding of inputs.

        Cost: 1 round, 8 bytes per element of x and of y, sent by each party to each other.
        """
        return x.matmul(y)

    def rms_norm(self, x: Handle, weight: Handle, eps: float, scale: float) -> Handle:
        """Domain: scale * (mean(x^2) + eps) in [0.043, 173]. Error: 1e-4 relative, and about 8 u sqrt(scale) |x|.

        ``scale`` multiplies x itself, by its root, before the square: a small x keeps its bits, and the squares of
        a large one do not make the truncation wild. The norm of x and of a multiple of it are the same.
        Cost: 26 rounds at 16 fractional bits.
        """
        x = self._times(x, math.sqrt(scale))
        mean_square = x.square().sum(-1, keepdim=True).div(x.shape[-1])
        inverse = (mean_square + eps * scale).inv_sqrt()
        return x * inverse * weight

    def _times(self, x: Handle, factor: float) -> Handle:
        """x times a public power of two; a factor below one is one truncation."""
        if factor >= 1:
            return x * int(factor)
        return x.div(round(1 / factor))

    def rotate(self, x: Handle, cos: torch.Tensor, sin: torch.Tensor) -> Handle:
        """Local. Error: 3 u, and u |x| for the rounding of the tables."""
        half = x.shape[-1] // 2
        turned = self.cat([-x[..., half:], x[..., :half]], -1)
        return x * cos.to(self.device) + turned * sin.to(self.device)

    def softmax(self, scores: Handle, mask: torch.Tensor | None = None) -> Handle:
        """Domain: seen scores differ by less than 2^k, N up to 2^14. Error: x^2 / 2^(k+1) + 2^k u relative to each
        weight exp(-x) / z, so 2 % at the default settings where a weight matters, and 4 u.

        The denominator z lies in [1, N]; z / sqrt(N) keeps CrypTen's Newton iteration where it converges.
        The maximum is a tree of comparisons without CrypTen's argmax, which a softmax does not need.
        Cost: 9 ceil(log2 N) + 37 rounds at 16 fractional bits. Raises: UsageError for a larger N.
        """
        if scores.shape[-1] > LONGEST:
            raise UsageError(
                f"attention over {scores.shape[-1]} tokens leaves the range of engine 'crypten', {LONGEST} at most; "
                "shorten the prompt"
            )
        if mask is not None:
            mask = mask.to(self.device)
            scores = scores + (mask.float() - 1) * MASKED
        numerator = (scores - row_maximum(scores)).exp()
        if mask is not None:
            numerator.share *= mask.long()
        factor = 2.0 ** -round(math.log2(scores.shape[-1]) / 2)
        reciprocal = (numerator.sum(-1, keepdim=True) * factor).reciprocal()
        return numerator * reciprocal * factor

    def swiglu(self, gate: Handle, up: Handle) -> Handle:
        """Domain: |gate| < 2^k, |gate * up| < 2^(62-2f). Error: (2^-(k+1) + 2^k u) |gate * up|.

        sigmoid(-|x|) by exp and a reciprocal, as in CrypTen, which takes three Newton steps from a constant (4e-3
        at x = 0); ours start from a line. Cost: 24 rounds at 16 fractional bits.
        """
        return gate * self.sigmoid(gate) * up

    def check_policy(self, policy: Policy) -> None:
        if policy.uses and self.device.type != "cpu":
            raise UsageError(
                f"engine 'crypten' runs policy {policy.name} on the processor alone: CrypTen's tensors on a GPU "
                "lack what choosing rows takes; leave --policy or --device out, or use engine 'wire'"
            )
        super().check_policy(policy)

    def check_sampling(self, temperature: float) -> None:
        if temperature:
            raise UsageError(
                f"engine 'crypten' has no noise to draw tokens on shares at temperature {temperature:g}; with --reveal "
                "tokens decode greedily (--greedy), or use engine 'wire'"
            )

    def sample(self, logits: Handle, temperature: float) -> Handle:
        """By ``top``; no noise is dealt here. Error: none. Cost: ``top``'s of one among V."""
        self.check_sampling(temperature)
        bits = self.top(logits, 1)
        return self.transform(bits, torch.arange(logits.shape[-1])[:, None])[..., 0]

    def top_k(self, logits: Handle, count: int) -> tuple[Handle, Handle]:
        """Beyond ``selection.PAIRS`` logits in the order of their indices. Error: none. Cost: ``best``'s of V, and a
        round with count V bits and V logits."""
        picks = self.best(logits, count)[0]
        ids = self.transform(picks, torch.arange(logits.shape[-1])[:, None])[:, 0]
        return ids, self.gather(picks, logits.reshape(-1, 1))[:, 0]

    def open_to(self, x: Handle | tuple[Handle, ...], rank: int) -> Any:
        """Reveals: x to ``rank`` alone. Exact. Cost: one message of 8 bytes per element from each other party."""
        found = []
        for handle in x if isinstance(x, tuple) else (x,):
            total = handle.reveal(dst=rank)
            found.append(None if total is None else (bare(total).double() / handle.encoder.scale).float().cpu())
        return found[0] if found[0] is None or not isinstance(x, tuple) else tuple(found)
