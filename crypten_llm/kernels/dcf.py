"""Distributed comparison functions on processors: shares of beta * 1{x < alpha} from a key each, without a message.

Owns key generation (the dealer) and evaluation (the parties), batched over keys and points. The pseudo-random
generator is the ChaCha20 block function keyed by a node's seed: one block holds both children and both values. It is
compiled over lanes because a decode step has few comparisons, forty levels deep: a library would be called for few
blocks at a time. It has no table lookups and no branches on secrets, and a test holds it against OpenSSL's.

Source: Boyle et al., "Function Secret Sharing for Mixed-Mode and Fixed-Point Secure Computation" (EUROCRYPT 2021),
Figure 1; payloads here are two words modulo 2^64.
"""

import numpy as np

from crypten_llm.kernels.compiling import compiled

WORDS = 2  # payload words
LANES = 64  # evaluated side by side
# A double round's quarter rounds, of columns and of diagonals. In a table: one kernel is compiled, not one for each.
QUARTERS = (
    *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
    *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
)


@compiled
def _quarter(x: np.ndarray, a: int, b: int, c: int, d: int, lanes: int) -> None:
    for i in range(lanes):
        x[a, i] += x[b, i]
        t = x[d, i] ^ x[a, i]
        x[d, i] = (t << np.uint32(16)) | (t >> np.uint32(16))
        x[c, i] += x[d, i]
        t = x[b, i] ^ x[c, i]
        x[b, i] = (t << np.uint32(12)) | (t >> np.uint32(20))
        x[a, i] += x[b, i]
        t = x[d, i] ^ x[a, i]
        x[d, i] = (t << np.uint32(8)) | (t >> np.uint32(24))
        x[c, i] += x[d, i]
        t = x[b, i] ^ x[c, i]
        x[b, i] = (t << np.uint32(7)) | (t >> np.uint32(25))


@compiled
def chacha_blocks(key: np.ndarray, x: np.ndarray, lanes: int) -> None:
    """x[:, i] = the ChaCha20 block (counter and nonce 0) under the 256-bit key key[:, i] twice; uint32 [4, L], [16, L].

    A 128-bit seed fills both halves of the key, with the constant that Bernstein gives for 128-bit keys.
    """
    for i in range(lanes):
        x[0, i] = np.uint32(0x61707865)
        x[1, i] = np.uint32(0x3120646E)
        x[2, i] = np.uint32(0x79622D36)
        x[3, i] = np.uint32(0x6B206574)
        for j in range(4):
            x[4 + j, i] = key[j, i]
            x[8 + j, i] = key[j, i]
            x[12 + j, i] = np.uint32(0)
    for _ in range(10):
        for a, b, c, d in QUARTERS:
            _quarter(x, a, b, c, d, lanes)
    for i in range(lanes):
        x[0, i] += np.uint32(0x61707865)
        x[1, i] += np.uint32(0x3120646E)
        x[2, i] += np.uint32(0x79622D36)
        x[3, i] += np.uint32(0x6B206574)
        for j in range(4):
            x[4 + j, i] += key[j, i]
            x[8 + j, i] += key[j, i]


@compiled
def _word(x: np.ndarray, row: int | np.int64, lane: int) -> np.uint64:
    return np.uint64(x[row, lane]) | (np.uint64(x[row + 1, lane]) << np.uint64(32))


@compiled
def _set_key(key: np.ndarray, lane: int, low: np.uint64, high: np.uint64) -> None:
    key[0, lane] = np.uint32(low & np.uint64(0xFFFFFFFF))
    key[1, lane] = np.uint32(low >> np.uint64(32))
    key[2, lane] = np.uint32(high & np.uint64(0xFFFFFFFF))
    key[3, lane] = np.uint32(high >> np.uint64(32))


# A block's 16 words: left child (0-3), right child (4-7), left value (8-11), right value (12-15). The control bit is
# the lowest bit of a child's first word, which is cleared in the seed. A leaf takes its value from words 8-11.


@compiled
def generate(
    alpha: np.ndarray,
    beta: np.ndarray,
    seeds0: np.ndarray,
    seeds1: np.ndarray,
    bits: int,
    cw_seeds: np.ndarray,
    cw_values: np.ndarray,
    cw_flags: np.ndarray,
) -> None:
    one, zero = np.uint64(1), np.uint64(0)
    key, x = np.empty((4, 2), np.uint32), np.empty((16, 2), np.uint32)
    s, t = np.empty((2, 2), np.uint64), np.empty(2, np.uint64)
    running = np.empty(2, np.uint64)
    for n in range(alpha.shape[0]):
        for w in range(2):
            s[0, w], s[1, w] = seeds0[n, w], seeds1[n, w]
            running[w] = zero
        s[0, 0] &= ~one
        s[1, 0] &= ~one
        t[0], t[1] = zero, one
        for level in range(bits + 1):
            for b in range(2):
                _set_key(key, b, s[b, 0], s[b, 1])
            chacha_blocks(key, x, 2)
            if level == bits:
                for w in range(2):
                    value = _word(x, 8 + 2 * w, 1) - _word(x, 8 + 2 * w, 0) - running[w]
                    cw_values[level, n, w] = zero - value if t[1] else value
                break
            bit = (alpha[n] >> np.uint64(bits - 1 - level)) & one
            keep, lose = (4, 0) if bit else (0, 4)
            control = np.empty((2, 2), np.uint64)  # [party, side]
            for b in range(2):
                control[b, 0], control[b, 1] = np.uint64(x[0, b]) & one, np.uint64(x[4, b]) & one
                x[0, b] &= np.uint32(0xFFFFFFFE)
                x[4, b] &= np.uint32(0xFFFFFFFE)
            for w in range(2):
                cw_seeds[level, n, w] = _word(x, lose + 2 * w, 0) ^ _word(x, lose + 2 * w, 1)
                value = _word(x, 8 + lose + 2 * w, 1) - _word(x, 8 + lose + 2 * w, 0) - running[w]
                value += beta[n, w] * bit
                value = zero - value if t[1] else value
                cw_values[level, n, w] = value
                running[w] += _word(x, 8 + keep + 2 * w, 0) - _word(x, 8 + keep + 2 * w, 1)
                running[w] += zero - value if t[1] else value
            left = control[0, 0] ^ control[1, 0] ^ bit ^ one
            right = control[0, 1] ^ control[1, 1] ^ bit
            cw_flags[level, n] = np.uint8(left | (right << one))
            flag = right if bit else left
            for b in range(2):
                for w in range(2):
                    s[b, w] = _word(x, keep + 2 * w, b) ^ (cw_seeds[level, n, w] * t[b])
                t[b] = control[b, bit] ^ (t[b] & flag)


@compiled
def evaluate(
    seeds: np.ndarray,
    cw_seeds: np.ndarray,
    cw_values: np.ndarray,
    cw_flags: np.ndarray,
    party: int,
    points: np.ndarray,
    out: np.ndarray,
) -> None:
    one = np.uint64(1)
    bits, count, lanes_each = cw_seeds.shape[0], points.shape[0], points.shape[1]
    total = count * lanes_each
    key, x = np.empty((4, LANES), np.uint32), np.empty((16, LANES), np.uint32)
    s, t = np.empty((2, LANES), np.uint64), np.empty(LANES, np.uint64)
    for start in range(0, total, LANES):
        lanes = min(LANES, total - start)
        for i in range(lanes):
            n = (start + i) // lanes_each
            s[0, i], s[1, i] = seeds[n, 0] & ~one, seeds[n, 1]
            t[i] = np.uint64(party)
        for level in range(bits + 1):
            for i in range(lanes):
                _set_key(key, i, s[0, i], s[1, i])
            chacha_blocks(key, x, lanes)
            for i in range(lanes):
                n, p = (start + i) // lanes_each, (start + i) % lanes_each
                if level == bits:
                    for w in range(2):
                        value = out[n, p, w] + _word(x, 8 + 2 * w, i) + cw_values[level, n, w] * t[i]
                        out[n, p, w] = np.uint64(0) - value if party else value
                    continue
                bit = (points[n, p] >> np.uint64(bits - 1 - level)) & one
                side = np.int64(bit) * 4
                for w in range(2):
                    out[n, p, w] += _word(x, 8 + side + 2 * w, i) + cw_values[level, n, w] * t[i]
                first = _word(x, side, i)
                control = first & one
                s[0, i] = (first & ~one) ^ (cw_seeds[level, n, 0] * t[i])
                s[1, i] = _word(x, side + 2, i) ^ (cw_seeds[level, n, 1] * t[i])
                t[i] = control ^ (t[i] & ((np.uint64(cw_flags[level, n]) >> bit) & one))
