"""Gumbel noise: added to logits, it makes the largest of them a draw from their softmax.

Owns the noise, as one distribution for plaintext and shares. argmax(x / T + G) with independent G of the standard
Gumbel distribution, -log(-log U), is token i with probability softmax(x / T)_i, and so is argmax(x + T G).

Source: the Gumbel-max trick (Gumbel 1954; Maddison, Tarlow and Minka, NeurIPS 2014, section 2).
"""

from collections.abc import Sequence

from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.roles import CLIENT, OWNER

UNIFORM = 52  # bits of U, which is never 0 or 1
LARGEST = 37.0  # |G| is smaller


def noise(words: Tensor) -> Tensor:
    """float64 G for uniform words; U is an odd multiple of 2^-53, so that -3.7 < G < 36.8."""
    uniform = (ring.shift_right(words, 64 - UNIFORM).double() + 0.5) / 2.0**UNIFORM
    return -(-uniform.log()).log()


def dealt(runtime: Runtime, shape: Sequence[int], temperature: float, scale: int, width: int) -> Tensor:
    """Shares modulo 2^width of T G at ``scale`` fractional bits, of which nobody but the dealer knows anything; local.

    U comes from words of which each party draws a part and the dealer knows the sum, as of a mask.

    Error: half a unit of ``scale``. Cost: dealer ``width`` bits an element.
    """
    parts = [runtime.mask_of(party, shape) for party in (OWNER, CLIENT)]

    def words() -> Tensor:
        owner, client = parts
        assert owner is not None and client is not None, "the dealer knows both parts"
        return (noise(owner + client) * (temperature * 2.0**scale)).round().long()

    return runtime.deal(shape, words, width).held
