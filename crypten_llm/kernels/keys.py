"""Comparison keys on processors: shares of beta * 1{x < alpha} from a key each, without a message, at many points.

Owns key generation (the dealer) and evaluation (the parties). The pseudo-random generator is the ChaCha20 block
function keyed by a node's seed. It is compiled over lanes because a decode step has few comparisons, a hundred levels
deep: a library would be called for few blocks at a time. It has no table lookups and no branches on secrets, and a test
holds it against OpenSSL's.

A node's output, words of 64 bits: both children's seeds, two words each; then the left value, the right value and the
node's own value, one word each modulo a small number, or four each for two numbers modulo 2^128, which takes a second
block. No word serves twice: a leaf's correction that shared a word with a child's would show the mask's bits.

Points of a key differ from what was opened from some bit on. So the path of what was opened is walked once, keeping at
each level the child that it does not take; a point starts at the child where it leaves the path. Lanes are points, and
a lane that is done takes the next point.

Source: Boyle et al., "Function Secret Sharing for Mixed-Mode and Fixed-Point Secure Computation" (EUROCRYPT 2021),
Figure 1, with a value for each level, at which a comparison of leading bits may stop.
"""

import numpy as np

from crypten_llm.kernels.compiling import compiled

LANES = 64  # evaluated side by side
# A double round's quarter rounds, of columns and of diagonals. In a table: one kernel is compiled, not one for each.
QUARTERS = (
    *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
    *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
)
SEEDS = 4  # words of a node's output that are its children's seeds


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
def chacha_blocks(key: np.ndarray, x: np.ndarray, counter: int, lanes: int) -> None:
    """x[:, i] = the ChaCha20 block (nonce 0) under the 256-bit key key[:, i] twice; uint32 [4, L], [16, L].

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
        x[12, i] = np.uint32(counter)
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
        x[12, i] += np.uint32(counter)


@compiled
def _expand(s: np.ndarray, words: np.ndarray, key: np.ndarray, x: np.ndarray, lanes: int) -> None:
    """words[:, i] = the output of the node with seed s[:, i]: uint64 [2, L] to [8 blocks, L]."""
    for i in range(lanes):
        for w in range(2):
            key[2 * w, i] = np.uint32(s[w, i] & np.uint64(0xFFFFFFFF))
            key[2 * w + 1, i] = np.uint32(s[w, i] >> np.uint64(32))
    for block in range(words.shape[0] // 8):
        chacha_blocks(key, x, block, lanes)
        for w in range(8):
            for i in range(lanes):
                words[8 * block + w, i] = np.uint64(x[2 * w, i]) | (np.uint64(x[2 * w + 1, i]) << np.uint64(32))


@compiled
def _add(total: np.ndarray, i: int, value: np.ndarray, modulus: np.uint64, sign: int) -> None:
    """total[:, i] += sign * value: one number modulo ``modulus``, or two modulo 2^128."""
    if total.shape[0] == 1:
        part = value[0] if sign > 0 else modulus - value[0]
        total[0, i] = (total[0, i] + part) % modulus
        return
    for n in range(0, total.shape[0], 2):
        low, high = value[n], value[n + 1]
        if sign < 0:
            low, high = np.uint64(0) - low, ~high + (np.uint64(1) if value[n] == np.uint64(0) else np.uint64(0))
        before = total[n, i]
        total[n, i] = before + low
        total[n + 1, i] += high + (np.uint64(1) if total[n, i] < before else np.uint64(0))


@compiled
def _value(words: np.ndarray, first: int, i: int, modulus: np.uint64, out: np.ndarray) -> None:
    """A value of a node's output."""
    for w in range(out.shape[0]):
        word = words[first + w, i]
        out[w] = word % modulus if out.shape[0] == 1 else word


@compiled
def generate(
    alpha: np.ndarray,
    beta: np.ndarray,
    seeds0: np.ndarray,
    seeds1: np.ndarray,
    levels: int,
    modulus: np.uint64,
    cw_seeds: np.ndarray,
    cw_values: np.ndarray,
    cw_leaves: np.ndarray,
    cw_flags: np.ndarray,
) -> None:
    """alpha: uint64 [N, A]. beta, values: uint64 [N, V], [levels, N, V]; leaves: [levels + 1, N, V]."""
    one, size = np.uint64(1), beta.shape[1]
    half = LANES // 2  # a key's two parties are lanes i and half + i
    key, x = np.empty((4, LANES), np.uint32), np.empty((16, LANES), np.uint32)
    words = np.empty((8 if size == 1 else 16, LANES), np.uint64)
    s, t = np.empty((2, LANES), np.uint64), np.empty(LANES, np.uint64)
    running, found, difference = (
        np.empty((size, half), np.uint64),
        np.empty(size, np.uint64),
        np.empty((size, 1), np.uint64),
    )
    for start in range(0, alpha.shape[0], half):
        count = min(half, alpha.shape[0] - start)
        for i in range(LANES):
            n = start + min(i % half, count - 1)
            first = seeds0[n, 0] if i < half else seeds1[n, 0]
            s[0, i], s[1, i] = first & ~one, seeds0[n, 1] if i < half else seeds1[n, 1]
            t[i] = np.uint64(i >= half)
        running[:] = np.uint64(0)
        for level in range(levels + 1):
            _expand(s, words, key, x, LANES)
            for i in range(count):
                n, other = start + i, half + i
                difference[:, 0] = np.uint64(0)  # of the node's own values, and what the path's differ by
                for lane, sign in ((other, 1), (i, -1)):
                    _value(words, SEEDS + 2 * size, lane, modulus, found)
                    _add(difference, 0, found, modulus, sign)
                _add(difference, 0, running[:, i].copy(), modulus, -1)
                found[:] = difference[:, 0]
                difference[:, 0] = np.uint64(0)
                _add(difference, 0, found, modulus, -1 if t[other] else 1)
                cw_leaves[level, n, :] = difference[:, 0]
                if level == levels:
                    continue
                position = levels - 1 - level
                bit = (alpha[n, position >> 6] >> np.uint64(position & 63)) & one
                keep, lose = np.int64(bit), 1 - np.int64(bit)
                left = (words[0, i] ^ words[0, other] ^ bit ^ one) & one
                right = (words[2, i] ^ words[2, other] ^ bit) & one
                cw_flags[level, n] = np.uint8(left | (right << one))
                seed = words[2 * lose, i] ^ words[2 * lose, other]
                cw_seeds[level, n, 0], cw_seeds[level, n, 1] = (
                    seed & ~one,
                    words[2 * lose + 1, i] ^ words[2 * lose + 1, other],
                )
                difference[:, 0] = np.uint64(0)
                for lane, sign in ((other, 1), (i, -1)):
                    _value(words, SEEDS + lose * size, lane, modulus, found)
                    _add(difference, 0, found, modulus, sign)
                _add(difference, 0, running[:, i].copy(), modulus, -1)
                if bit:
                    _add(difference, 0, beta[n], modulus, 1)
                found[:] = difference[:, 0]
                difference[:, 0] = np.uint64(0)
                _add(difference, 0, found, modulus, -1 if t[other] else 1)
                cw_values[level, n, :] = difference[:, 0]
                for lane, sign in ((i, 1), (other, -1)):
                    _value(words, SEEDS + keep * size, lane, modulus, found)
                    _add(running, i, found, modulus, sign)
                found[:] = difference[:, 0]
                _add(running, i, found, modulus, -1 if t[other] else 1)
                flag = right if bit else left
                for lane in (i, other):
                    control = words[2 * keep, lane] & one
                    s[0, lane] = (words[2 * keep, lane] & ~one) ^ (cw_seeds[level, n, 0] * t[lane])
                    s[1, lane] = words[2 * keep + 1, lane] ^ (cw_seeds[level, n, 1] * t[lane])
                    t[lane] = control ^ (t[lane] & flag)


@compiled
def _bit(words: np.ndarray, n: int, position: int) -> np.uint64:
    return (words[n, position >> 6] >> np.uint64(position & 63)) & np.uint64(1)


@compiled
def _point(opened: np.ndarray, n: int, threshold: np.ndarray, k: int, out: np.ndarray) -> None:
    """out[0] = opened - threshold, modulo a power of two above all bits that are looked at."""
    borrow = np.uint64(0)
    for w in range(out.shape[1]):
        a, b = opened[n, w], threshold[k, w]
        first = a - b
        out[0, w] = first - borrow
        borrow = np.uint64(1) if (a < b) or (first < borrow) else np.uint64(0)


@compiled
def _leaving(opened: np.ndarray, n: int, point: np.ndarray, top: int) -> int:
    """The highest bit below ``top`` in which a point differs from what was opened; -1 for none."""
    for w in range((top - 1) >> 6, -1, -1):
        differs = opened[n, w] ^ point[0, w]
        if w == (top - 1) >> 6 and top & 63:
            differs &= (np.uint64(1) << np.uint64(top & 63)) - np.uint64(1)
        if differs:
            position = 63
            while not (differs >> np.uint64(position)) & np.uint64(1):
                position -= 1
            return 64 * w + position
    return -1


@compiled
def _corrected(s0: np.uint64, s1: np.uint64, t: np.uint64, cw: np.ndarray, flag: np.uint64) -> tuple:
    """A child's seed and control bit, of its parent's output and control bit."""
    one = np.uint64(1)
    return (s0 & ~one) ^ (cw[0] * t), s1 ^ (cw[1] * t), (s0 & one) ^ (t & flag)


@compiled
def evaluate(
    seeds: np.ndarray,
    cw_seeds: np.ndarray,
    cw_values: np.ndarray,
    cw_leaves: np.ndarray,
    cw_flags: np.ndarray,
    party: int,
    opened: np.ndarray,
    width: int,
    thresholds: np.ndarray,
    stops: np.ndarray,
    modulus: np.uint64,
    out: np.ndarray,
    tops: np.ndarray,
) -> None:
    """opened: uint64 [N, A]. thresholds: uint64 [K, A]. out: uint64 [N, K, V]. tops: [N, K], bit width - 1 of points.

    The tree is of bits width - 2 and down; a point stops after bit ``stops``.
    """
    one, size, levels = np.uint64(1), out.shape[2], cw_seeds.shape[0]
    key, x = np.empty((4, LANES), np.uint32), np.empty((16, LANES), np.uint32)
    words = np.empty((8 if size == 1 else 16, LANES), np.uint64)
    s, t, v = np.empty((2, LANES), np.uint64), np.empty(LANES, np.uint64), np.empty((size, LANES), np.uint64)
    # Of the path of what was opened, by lane and level: the other child, and the value where it would stop.
    side_s = np.empty((LANES, levels, 2), np.uint64)
    side_t, side_v = np.empty((LANES, levels), np.uint64), np.empty((LANES, levels, size), np.uint64)
    leaf = np.empty((LANES, levels + 1, size), np.uint64)
    found, total = np.empty(size, np.uint64), np.empty((size, 1), np.uint64)
    point = np.empty((1, opened.shape[1]), np.uint64)
    lane_n, lane_k, lane_depth = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    points, many = np.empty((LANES, opened.shape[1]), np.uint64), thresholds.shape[0]
    for start in range(0, opened.shape[0], LANES):
        count = min(LANES, opened.shape[0] - start)
        for i in range(count):
            s[0, i], s[1, i], t[i] = seeds[start + i, 0] & ~one, seeds[start + i, 1], np.uint64(party)
            v[:, i] = np.uint64(0)
        for level in range(levels + 1):
            _expand(s, words, key, x, count)
            for i in range(count):
                n = start + i
                total[:, 0] = v[:, i]
                _value(words, SEEDS + 2 * size, i, modulus, found)
                _add(total, 0, found, modulus, 1)
                if t[i]:
                    _add(total, 0, cw_leaves[level, n], modulus, 1)
                leaf[i, level, :] = total[:, 0]
                if level == levels:
                    continue
                taken = np.int64(_bit(opened, n, width - 2 - level))
                flags, cw = np.uint64(cw_flags[level, n]), cw_seeds[level, n]
                for side in (1 - taken, taken):
                    total[:, 0] = v[:, i]
                    _value(words, SEEDS + side * size, i, modulus, found)
                    _add(total, 0, found, modulus, 1)
                    if t[i]:
                        _add(total, 0, cw_values[level, n], modulus, 1)
                    flag = (flags >> np.uint64(side)) & one
                    made = _corrected(words[2 * side, i], words[2 * side + 1, i], t[i], cw, flag)
                    if side != taken:
                        side_s[i, level, 0], side_s[i, level, 1], side_t[i, level] = made
                        side_v[i, level, :] = total[:, 0]
                    else:
                        s[0, i], s[1, i], t[i] = made
                        v[:, i] = total[:, 0]
        task, busy = 0, 0
        while True:
            while busy < LANES and task < count * many:
                i, k = task // many, task % many
                n = start + i
                task += 1
                _point(opened, n, thresholds, k, point)
                tops[n, k] = np.int64(_bit(point, 0, width - 1))
                depth, leaving = width - 1 - stops[k], _leaving(opened, n, point, width - 1)
                if leaving < stops[k]:
                    out[n, k, :] = leaf[i, depth, :]
                    continue
                level = width - 2 - leaving
                lane_n[busy], lane_k[busy], lane_depth[busy] = n, k, level + 1
                s[0, busy], s[1, busy], t[busy] = side_s[i, level, 0], side_s[i, level, 1], side_t[i, level]
                v[:, busy] = side_v[i, level, :]
                points[busy, :] = point[0, :]
                busy += 1
            if not busy:
                break
            _expand(s, words, key, x, busy)
            left = 0
            for i in range(busy):
                n, k, level = lane_n[i], lane_k[i], lane_depth[i]
                total[:, 0] = v[:, i]
                if level == width - 1 - stops[k]:
                    _value(words, SEEDS + 2 * size, i, modulus, found)
                    _add(total, 0, found, modulus, 1)
                    if t[i]:
                        _add(total, 0, cw_leaves[level, n], modulus, 1)
                    out[n, k, :] = total[:, 0]
                    continue
                side = np.int64(_bit(points, i, width - 2 - level))
                _value(words, SEEDS + side * size, i, modulus, found)
                _add(total, 0, found, modulus, 1)
                if t[i]:
                    _add(total, 0, cw_values[level, n], modulus, 1)
                flag = (np.uint64(cw_flags[level, n]) >> np.uint64(side)) & one
                made = _corrected(words[2 * side, i], words[2 * side + 1, i], t[i], cw_seeds[level, n], flag)
                s[0, left], s[1, left], t[left] = made
                v[:, left] = total[:, 0]
                lane_n[left], lane_k[left], lane_depth[left] = n, k, level + 1
                points[left, :] = points[i, :]
                left += 1
            busy = left
    if party:
        for n in range(out.shape[0]):
            for k in range(many):
                total[:, 0] = np.uint64(0)
                _add(total, 0, out[n, k], modulus, -1)
                out[n, k, :] = total[:, 0]
