"""ChaCha20's block function on processors, for many seeds side by side: the generator of ``kernels.dcf``.

Owns the compiled loops. A vector register holds the same word of several seeds' blocks, so all that a block needs stays
in registers; a library would be called for few blocks at a time. There are no table lookups and no branches, and a
test holds it against OpenSSL's.
"""

import numpy as np

from crypten_llm.kernels.compiling import compiled

LANES = 64  # seeds side by side; known beforehand, so that the compiler sees that rows do not overlap
ROWS = 16  # 32-bit words of a block
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
VECTOR = 16  # lanes of the widest register: a loop over a multiple of them has no remainder
# "expa", "nd 1", "6-by", "te k": the constant that Bernstein gives for keys of 128 bits.
EXPA, ND_1, SIX_BY, TE_K = np.uint32(0x61707865), np.uint32(0x3120646E), np.uint32(0x79622D36), np.uint32(0x6B206574)


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


@compiled
def _double_round(x: np.ndarray, lanes: int) -> None:
    n = LANES
    for i in range(lanes):
        x0, x4, x8, x12 = _quarter(x[i], x[4 * n + i], x[8 * n + i], x[12 * n + i])
        x1, x5, x9, x13 = _quarter(x[n + i], x[5 * n + i], x[9 * n + i], x[13 * n + i])
        x2, x6, x10, x14 = _quarter(x[2 * n + i], x[6 * n + i], x[10 * n + i], x[14 * n + i])
        x3, x7, x11, x15 = _quarter(x[3 * n + i], x[7 * n + i], x[11 * n + i], x[15 * n + i])
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
        x[i], x[n + i], x[2 * n + i], x[3 * n + i] = x0, x1, x2, x3
        x[4 * n + i], x[5 * n + i], x[6 * n + i], x[7 * n + i] = x4, x5, x6, x7
        x[8 * n + i], x[9 * n + i], x[10 * n + i], x[11 * n + i] = x8, x9, x10, x11
        x[12 * n + i], x[13 * n + i], x[14 * n + i], x[15 * n + i] = x12, x13, x14, x15


@compiled
def block(key: np.ndarray, counter: np.uint32, x: np.ndarray, lanes: int) -> None:
    """Word j of lane i, x[j LANES + i], of the block under the key key[0 .. 3, i] twice, nonce 0.

    key: uint32 [4 LANES], x: [16 LANES], both by rows. More lanes than asked for are written, up to a full vector.
    """
    n = LANES
    lanes = (lanes + VECTOR - 1) // VECTOR * VECTOR
    for i in range(lanes):
        x[i], x[n + i], x[2 * n + i], x[3 * n + i] = EXPA, ND_1, SIX_BY, TE_K
        x[12 * n + i], x[13 * n + i], x[14 * n + i], x[15 * n + i] = counter, np.uint32(0), np.uint32(0), np.uint32(0)
    for i in range(lanes):
        for j in range(4):
            x[(4 + j) * n + i] = x[(8 + j) * n + i] = key[j * n + i]
    for _ in range(10):
        _double_round(x, lanes)
    for i in range(lanes):
        x[i] += EXPA
        x[n + i] += ND_1
        x[2 * n + i] += SIX_BY
        x[3 * n + i] += TE_K
        x[12 * n + i] += counter
    for i in range(lanes):
        for j in range(4):
            x[(4 + j) * n + i] += key[j * n + i]
            x[(8 + j) * n + i] += key[j * n + i]


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
