"""Functions of one opened value that are computed from its mask's material. Nothing is opened here.

Owns two. ``evaluate``: smooth functions as trigonometric sums. A value opened modulo its period is M = x + r with r
uniform over the whole period, so M says nothing about x; and cos(w (M - r)) = cos(wM) [cos wr] + sin(wM) [sin wr] needs
only shares of the cosines and sines of the mask, which the dealer has. ``normalize``: a positive secret of unknown size
is brought to [1/4, 1), the first half of 1/z and 1/sqrt(z), by comparing it with all powers of four. Which power it was
stays secret: the parties get shares of the scaled value and of the power's root.
"""

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.roles import Runtime
from crypten_llm.protocols.fits import Fit
from crypten_llm.protocols.secret import Overflow, Secret, Wire
from crypten_llm.roles import CLIENT, OWNER

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


def normalize(runtime: Runtime, wire: Wire, top: int, segments: int, table: list[int]) -> tuple[Secret, Secret]:
    """(z * 4^k at scale ``top``, table[k]) for the secret k in 0 .. segments - 1 that brings the first to [1/4, 1).

    wire: z opened modulo its ring of n bits, with z * 2^scale in (0, 2^top), top <= n - 1 (``Opening(function=True)``).
    table: ``segments`` public integers; the second result has scale 0 (powers 2^k, or k itself, are what callers need).
    The integers z * 2^scale below 4^(-segments) 2^top keep k = segments - 1 and land below 1/4.
    The comparison looks at the top bits only: next to a power of four the first may miss [1/4, 1) by 2^-8 of itself.

    Error: none. Cost: no message; dealer 33 m + 16 bytes a value to each party, a comparison key for m = n - 1 bits or
    n - top + 2 segments + 5 where those are fewer, and 24 bytes to the client (16 for n = 64).
    """
    assert len(table) == segments, f"{len(table)} table entries for {segments} segments"
    size, shape = wire.width, wire.shape
    if top > size - 1:
        raise Overflow(f"a value of {top} bits needs a ring of {top + 1}, not {size}")
    if 2 * (segments - 1) > top:
        raise Overflow(f"{segments} segments do not fit a value of {top} bits: give at most {top // 2 + 1}")
    drop = max(0, top - 2 * segments - 6)
    levels = size - drop - 1
    mask = wire.mask.held.reshape(-1)
    seed, common = _deal_keys(runtime, mask, drop, levels, size)
    # v_w = [f beta_w] + dcf_w is the share of beta_w * (1{y < r} xor f), f = msb(r), beta = (1, r).
    flipped = runtime.deal(
        (mask.numel(), 2), lambda: torch.stack([ring.top_bit(mask, size), ring.top_bit(mask, size) * mask], 1)
    )
    whole = mask if size == 64 else runtime.deal(mask.shape, lambda: mask).held

    def below(raw: Tensor) -> tuple[Tensor, Tensor]:
        """[:, j - 1]: 1{z < 2^(top - 2 j)} * (1, r), where k steps from j - 1 to j; and (1, r)."""
        assert seed is not None, "a party has a seed of its own"
        steps = [1 << (top - 2 * j - drop) for j in range(1, segments)]
        thresholds = torch.tensor(steps, dtype=torch.int64, device=mask.device)
        points = ring.low_bits(ring.shift_right(raw.reshape(-1), drop)[:, None] - thresholds, size - drop)
        half = ring.low_bits(points, levels)
        found = runtime.kernels.compare(seed, common, runtime.role, half) + flipped.held[:, None, :]
        turned = ring.top_bit(points, size - drop)[..., None]
        constant = torch.stack([runtime.plus(torch.zeros_like(whole), 1), whole], 1)
        return found + turned * (constant[:, None, :] - 2 * found), constant

    def share(column: int, table: list[int]) -> Tensor:
        assert found is not None, "parties have compared"
        smaller, constant = found
        return _look_up(constant[:, column], smaller[..., column], table).view(shape)

    powers = [4**j for j in range(segments)]
    raw = wire.public
    found = None if raw is None else below(raw)

    def whole_share() -> Tensor:
        assert raw is not None, "parties have opened it"
        return raw * share(0, powers) - share(1, powers)

    scaled = runtime.share(shape, whole_share)
    entry = runtime.share(shape, lambda: share(0, table))
    bits = max(abs(value) for value in table).bit_length()
    return Secret(scaled, top, size, 0), Secret(entry, 0, 64, bits)


def _look_up(first: Tensor, below: Tensor, table: list[int]) -> Tensor:
    """Shares of table[k] times what ``first`` shares, from shares of the same at each step up to k."""
    apart = [high - low for low, high in zip(table, table[1:], strict=False)]
    return first * table[0] + (below * torch.tensor(apart, dtype=torch.int64, device=below.device)).sum(-1)


def _deal_keys(runtime: Runtime, mask: Tensor, drop: int, levels: int, size: int) -> tuple[Tensor | None, list[Tensor]]:
    """This party's comparison keys for the low bits of the mask, its seed and the part that both are sent."""
    count = mask.numel()
    owner, client = (runtime.mask_of(party, (count, 2)) for party in (OWNER, CLIENT))

    def common() -> list[Tensor]:
        assert owner is not None and client is not None, "the dealer knows both seeds"
        low = ring.low_bits(ring.shift_right(mask, drop), levels)
        sign = 1 - 2 * ring.top_bit(mask, size)
        return runtime.kernels.compare_keys(low, torch.stack([sign, sign * mask], 1), owner, client, levels)

    parts = runtime.deal_common(ring.key_sizes(levels, count), common)
    return client if owner is None else owner, parts
