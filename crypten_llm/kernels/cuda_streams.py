"""Kernels in torch's own operations: ChaCha20's block function, and key streams of it (``kernels.ring``).

Owns the block function for many counters or many keys at a time, in 32-bit words held as int32; the words of a column
of the state are one tensor, so that four quarter rounds are one.
"""

import torch
from torch import Tensor

from crypten_llm.kernels.cuda_choice import hot

WORDS = 16  # of 32 bits in a block
BYTES = 4 * WORDS
LONG = WORDS // 2  # of 64 bits
LONG_KEY, SHORT_KEY = (  # the constants of keys of 256 and of 128 bits, as Bernstein gives them
    [int.from_bytes(text[i : i + 4], "little") for i in range(0, 16, 4)]
    for text in (b"expand 32-byte k", b"expand 16-byte k")
)


def _turned(x: Tensor, left: int) -> Tensor:
    return (x << left) | ((x >> (32 - left)) & ((1 << left) - 1))


def _quarters(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = a + b
    d = _turned(d ^ a, 16)
    c = c + d
    b = _turned(b ^ c, 12)
    a = a + b
    d = _turned(d ^ a, 8)
    c = c + d
    b = _turned(b ^ c, 7)
    return a, b, c, d


def blocks(state: Tensor) -> Tensor:
    """What the block function makes of states: int32 [16, N] to int32 [16, N], as RFC 8439, section 2.3, numbers them.

    Of 20 rounds; which words are a counter and which a nonce is its caller's.
    """
    a, b, c, d = state.view(4, 4, -1)
    for _ in range(10):
        a, b, c, d = _quarters(a, b, c, d)
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        a, b, c, d = _quarters(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return torch.cat([a, b, c, d]) + state


def halves(words: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of words, as int32."""
    return words.int(), (words >> 32).int()


def constants(values: list[int], count: int, device: torch.device) -> Tensor:
    """int32 [4, N]."""
    return torch.tensor(values, dtype=torch.int32, device=device)[:, None].expand(-1, count)


@hot("triton_chacha")
def stream(key: Tensor, first: int, count: int) -> Tensor:
    """Bytes of ``count`` blocks from block ``first`` on: uint8. key: int32 [8].

    The counter has 64 bits, words 12 and 13 of the state, and the nonce is 0.
    """
    counters = halves(torch.arange(first, first + count, device=key.device))
    state = torch.cat(
        [
            constants(LONG_KEY, count, key.device),
            key[:, None].expand(-1, count),
            torch.stack(counters),
            constants([0, 0], count, key.device),
        ]
    )
    return blocks(state).T.contiguous().view(torch.uint8).view(-1)


@hot("triton_chacha")
def words_of(seeds: Tensor, many: int) -> Tensor:
    """At least the first ``many`` words that seeds [..., 2] make: [W, ...]."""
    flat = seeds.reshape(-1, 2)
    count, device = flat.shape[0], flat.device
    key = torch.stack([half for limb in flat.unbind(-1) for half in halves(limb)])
    found = []
    for counter in range(-(-many // LONG)):
        state = [constants(SHORT_KEY, count, device), key, key, constants([counter, 0, 0, 0], count, device)]
        made = blocks(torch.cat(state)).long()
        found.append((made[::2] & 0xFFFFFFFF) | (made[1::2] << 32))
    return torch.cat(found).view(len(found) * LONG, *seeds.shape[:-1])
