"""Smooth functions of one opened value, as trigonometric sums. Nothing is opened here.

Owns ``evaluate``. A value opened modulo its period is M = x + r with r uniform over the whole period, so M says
nothing about x; and cos(w (M - r)) = cos(wM) [cos wr] + sin(wM) [sin wr] needs only shares of the cosines and sines of
the mask, which the dealer has.
"""

import torch
from torch import Tensor

from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.fits import Fit
from crypten_llm.protocols.secret import Secret, Wire

BLOCK = 1 << 14  # elements at a time, so that a block's shares stay in cache, and in memory


def evaluate(runtime: Runtime, wire: Wire, function: Fit, fraction: int, bits: int) -> Secret:
    """function(x) for x opened modulo its period (``Opening(function=True, ring=scale + period)``); local.

    fraction: bits of the public factors and of the dealt shares, so the result has twice as many and is valid modulo
    2^64. bits: the declared bound of the result.

    Error: function.error on its domain, and ``fits.rounding(function, fraction)`` everywhere.
    Cost: dealer 16 * modes bytes an element.
    Source: Fourier evaluation as in SHAFT (NDSS 2025) with a mask uniform over the whole period, which theirs is not.
    """
    assert wire.width == wire.scale + function.period, f"open {function.name} modulo 2^{wire.scale + function.period}"
    kernels, shape = runtime.kernels, wire.shape
    modes, turn = len(function.cosine), 64 - wire.width
    cosine, sine = runtime.constant(function.cosine), runtime.constant(function.sine)
    constant = runtime.plus(0, round(function.constant * 2.0 ** (2 * fraction)))
    mask = wire.mask.held.reshape(-1)
    raw = None if wire.public is None else wire.public.reshape(-1)
    blocks = []
    for part in runtime.blocks(mask.numel(), BLOCK):

        def of_mask(part: slice = part) -> Tensor:
            return kernels.waves(mask[part], turn, 2.0**fraction, modes)

        waves = runtime.deal((2 * modes, part.stop - part.start), of_mask)
        if raw is not None:
            blocks.append(kernels.combine(raw[part], turn, 2.0**fraction, cosine, sine, waves.held, constant))
    share = runtime.share(shape, lambda: torch.cat(blocks).view(shape))
    return Secret(share, 2 * fraction, 64, bits)
