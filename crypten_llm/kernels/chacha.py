"""ChaCha20's block function on processors, for many seeds side by side: the generator of ``kernels.dcf``.

Owns the compiled loops. A vector register holds the same word of several seeds' blocks, so all that a block needs stays
in registers; a library would be called for few blocks at a time. There are no table lookups and no branches, and a
test holds it against OpenSSL's.
"""

import numpy as np

from crypten_llm.kernels.compiling import compiled, inlined

LANES = 64  # seeds side by side; known beforehand, so that the compiler sees that rows do not overlap
ROWS = 16  # 32-bit words of a block
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
VECTOR = 16  # lanes of the widest register: a loop over a multiple of them has no remainder
# "expa", "nd 1", "6-by", "te k": the constant that Bernstein gives for keys of 128 bits.
EXPA, ND_1, SIX_BY, TE_K = np.uint32(0x61707865), np.uint32(0x3120646E), np.uint32(0x79622D36), np.uint32(0x6B206574)

Block = tuple[np.uint32, ...]


@compiled
def _turn(x: np.uint32, left: int) -> np.uint32:
    return np.uint32((x << np.uint32(left)) | (x >> np.uint32(32 - left)))


@compiled
def _quarter(
    a: np.uint32, b: np.uint32, c: np.uint32, d: np.uint32
) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    a = np.uint32(a + b)
    d = _turn(np.uint32(d ^ a), 16)
    c = np.uint32(c + d)
    b = _turn(np.uint32(b ^ c), 12)
    a = np.uint32(a + b)
    d = _turn(np.uint32(d ^ a), 8)
    c = np.uint32(c + d)
    b = _turn(np.uint32(b ^ c), 7)
    return a, b, c, d


@inlined
def _double_round(x: Block) -> Block:
    x0, x4, x8, x12 = _quarter(x[0], x[4], x[8], x[12])
    x1, x5, x9, x13 = _quarter(x[1], x[5], x[9], x[13])
    x2, x6, x10, x14 = _quarter(x[2], x[6], x[10], x[14])
    x3, x7, x11, x15 = _quarter(x[3], x[7], x[11], x[15])
    x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
    x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
    x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
    x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@inlined
def _ten_rounds(x: Block) -> Block:
    return _double_round(_double_round(_double_round(_double_round(_double_round(x)))))


@compiled
def block(key: np.ndarray, counter: np.uint32, x: np.ndarray, lanes: int) -> None:
    """Word j of lane i, x[j LANES + i], of the block under the key key[0 .. 3, i] twice, nonce 0.

    key: uint32 [4 LANES], x: [16 LANES], both by rows. More lanes than asked for are written, up to a full vector.
    """
    n, zero = LANES, np.uint32(0)
    for i in range((lanes + VECTOR - 1) // VECTOR * VECTOR):  # without a loop in it, so that it becomes one of vectors
        k0, k1, k2, k3 = key[i], key[n + i], key[2 * n + i], key[3 * n + i]
        start = (EXPA, ND_1, SIX_BY, TE_K, k0, k1, k2, k3, k0, k1, k2, k3, counter, zero, zero, zero)
        y = _ten_rounds(_ten_rounds(start))
        x[i], x[n + i], x[2 * n + i], x[3 * n + i] = y[0] + EXPA, y[1] + ND_1, y[2] + SIX_BY, y[3] + TE_K
        x[4 * n + i], x[5 * n + i], x[6 * n + i], x[7 * n + i] = y[4] + k0, y[5] + k1, y[6] + k2, y[7] + k3
        x[8 * n + i], x[9 * n + i], x[10 * n + i], x[11 * n + i] = y[8] + k0, y[9] + k1, y[10] + k2, y[11] + k3
        x[12 * n + i], x[13 * n + i], x[14 * n + i], x[15 * n + i] = y[12] + counter, y[13], y[14], y[15]


@compiled
def expand(s: np.ndarray, key: np.ndarray, x: np.ndarray, words: int, lanes: int) -> None:
    """x's columns: at least ``words`` 64-bit words of each seed, uint64 s[0 .. 1, i], from counters 0, 1, ...

    key: uint32 [4 LANES], written. x: uint32 [16 LANES] for each block.
    """
    for i in range(lanes):
        for j in range(2):
            key[2 * j * LANES + i] = np.uint32(s[j, i] & LOW)
            key[(2 * j + 1) * LANES + i] = np.uint32(s[j, i] >> HALF)
    for counter in range((2 * words + ROWS - 1) // ROWS):
        block(key, np.uint32(counter), x[counter * ROWS * LANES :], lanes)


@compiled
def word_of(x: np.ndarray, word: int | np.int64, lane: int) -> np.uint64:
    """A 64-bit word of a lane."""
    row = 2 * word * LANES + lane
    return np.uint64(x[row]) | (np.uint64(x[row + LANES]) << HALF)
