"""Functions of one opened value that are computed from its mask's material. Nothing is opened here.

Owns two. ``evaluate``: smooth functions as trigonometric sums. A value opened modulo its period is M = x + r with r
uniform over the whole period, so M says nothing about x; and cos(w (M - r)) = cos(wM) [cos wr] + sin(wM) [sin wr] needs
only shares of the cosines and sines of the mask, which the dealer has. ``normalize``: a positive secret of unknown size
is brought to [1/4, 1), the first half of 1/z and 1/sqrt(z), by comparing it with all powers of four. Which power it was
stays secret: the parties get shares of the scaled value and of the power's root.
"""

import torch
from torch import Tensor

from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.fits import Fit
from crypten_llm.protocols.secret import Secret, Wire

BLOCK = 1 << 14  # elements at a time, so that a block's shares stay in cache, and in memory


def evaluate(
    runtime: Runtime, wire: Wire, function: Fit, fraction: int, bits: int, shift: float = 0.0, dealt: int | None = None
) -> Secret:
    """function(x + shift) for x opened modulo its period (``Opening(function=True, ring=scale + period)``); local.

    fraction, dealt: bits of the public factors and of the dealt shares (alike by default), so the result has scale
    fraction + dealt and is valid modulo 2^64. bits: the declared bound of the result. shift: a public constant.

    Error: function.error on its domain, and ``fits.rounding(function, fraction, dealt)`` everywhere.
    Cost: dealer 16 * modes bytes an element.
    Source: Fourier evaluation as in SHAFT (NDSS 2025) with a mask uniform over the whole period, which theirs is not.
    """
    assert wire.width == wire.scale + function.period, f"open {function.name} modulo 2^{wire.scale + function.period}"
    kernels, shape = runtime.kernels, wire.shape
    dealt = fraction if dealt is None else dealt
    modes, turn = len(function.cosine), 64 - wire.width
    turns = round(shift * 2.0 ** (64 - function.period)) % 2**64
    cosine, sine = kernels.turned(function.cosine, function.sine, turns)
    constant = runtime.plus(0, round(function.constant * 2.0 ** (fraction + dealt)))
    mask = wire.mask.held.reshape(-1)
    raw = None if wire.public is None else wire.public.reshape(-1)
    blocks = []
    for part in runtime.blocks(mask.numel(), BLOCK):

        def turned(part: slice = part) -> Tensor:
            return kernels.waves(mask[part], turn, 2.0**dealt, modes)

        waves = runtime.deal((2 * modes, part.stop - part.start), turned)
        if raw is not None:
            blocks.append(kernels.combine(raw[part], turn, 2.0**fraction, cosine, sine, waves.held, constant))
    share = runtime.share(shape, lambda: torch.cat(blocks).view(shape))
    return Secret(share, fraction + dealt, 64, bits)
