"""Calls of every kernel, for who holds it against a twin: ``check`` is given a kernel's name and its arguments, and
returns their result. Sizes are the caller's: several programs share the work of the largest, and the last is not full.
"""

import torch
from kernel_twins import layouts, table_words, wide_layouts, wide_pairs, wide_words, words

from crypten_llm.kernels import ring
from crypten_llm.kernels.ring import Comparison, Group

FLOATS = torch.linspace(-3, 3, 7, dtype=torch.float64) * 2**20
EIGHTHS = torch.tensor([(k << 61) + step for k in range(4) for step in (-1, 0, 1)][1:])
OF_TWO = ("add_wide", "subtract_wide", "multiply_wide")
GROUPS = [Group.residues(256), Group(2, 88), Group(2, 64), Group(1, 64), Group(1, 90), Group(2, 20)]


def travel(check, bits, count):
    x, mask = words(count), words(count, seed=1)
    check("unpack", check("pack", x, bits), bits, (count,))
    value, packed = check("hide", x, mask, 1 << max(0, bits - 2), bits)
    for skipped in (0, 3):
        message = torch.cat([torch.zeros(skipped, dtype=torch.uint8), packed])
        check("show", value, message[skipped:], bits, (count,))
    if 1 < bits < 64:
        check("unwrap", value, bits)
    check("pack", x.int(), min(bits, 31))


def limbs(check, bits, rows, size):
    """Numbers modulo 2^bits, [rows, size] of them; rows of sums, elements of all else."""
    x, y = wide_words(bits, rows, size), wide_words(bits, rows, size, seed=1)
    check("unpack", check("pack", x, bits), bits, (rows, size))
    for ones in (False, True):
        for offset in (0, 1 << (bits - 2), -1):
            value, packed = check("hide_wide", x, y, offset, bits, ones)
        for skipped in (0, 3):
            message = torch.cat([torch.zeros(skipped, dtype=torch.uint8), packed])[skipped:]
            check("show_wide", value, message, bits, ones, (rows, size))
    for less in (bits - 3, 65, bits + 70):
        check("reduce_wide", x, less)
    for signed in (False, True):
        check("widen", words(rows, size), bits, signed)
    for name in OF_TWO:
        for right in (y, y[:1], y[:, :1], y[..., :1]):
            check(name, x, right, bits)
        check(name, y[:1], x, bits)
        check(name, x, y, bits + 40)
        check(name, *wide_pairs(bits), bits)
    check("sum_wide", x, bits)
    check("sum_wide", torch.full_like(x, -1), 64 * ring.limbs(bits))
    for count in (0, 1, 64, 70, -9, -64):
        check("shift_wide", x, count, bits)
    for up in (False, True):
        for count in (0, 1, 36, 64, bits - 64, bits - 1):
            check("drop_wide", x, bits, count, up)
            check("drop_wide", wide_pairs(bits)[0], bits, count, up)


def lifted(check, bits, rows, size):
    x, y, bit = wide_words(bits, rows, size), wide_words(bits, rows, size, seed=1), words(rows, size) & 1
    dealt = words(rows, size, 1, seed=3)
    for opened in (2, 31, 63):
        mask = words(rows, size) & ((1 << opened) - 1)
        check("lift_mask", mask, x, y, bit, opened, bits)
        if bits - opened <= 64:  # what is dealt then, modulo 2^(bits - opened), has one limb
            check("lift_mask", mask, dealt, words(rows, size, 1, seed=4), bit, opened, bits)
    for numbers in (x, dealt, wide_words(bits + 64, rows, size)):
        check("dot_wide", words(rows, size), numbers, bits)
    check("dot_wide", torch.full((rows, size), -(2**63)), torch.full_like(x, -1), bits)
    if size:
        for opened, kept in ((35, 32), (22, 64), (62, 0)):
            check("scale_lifted", words(rows, size), bit, x, y[:, 0], y[:, -1], dealt, y, opened, kept, bits)


def ones(check, q, count):
    x, y, turns = wide_words(q, count), wide_words(q, count, seed=1), words(count)
    for name in ("add_ones", "subtract_ones", "multiply_ones"):
        check(name, x, y, q)
        check(name, x, y[:1], q)
        check(name, *wide_pairs(q), q)
    starts = torch.tensor([0, count // 2, count // 2, count])
    check("sum_ones", x, starts, q)
    check("sum_ones", torch.full_like(x, -1) if q % 64 == 0 else x, starts, q)
    check("power_ones", turns, q)
    check("rotate_ones", x, turns, q)
    check("rotate_ones", wide_words(q, q), torch.arange(q), q)
    for up in (False, True):
        for bits in (1, 40, min(64, q - 1)):
            check("window_ones", x, turns[:3] if count > 2 else words(3), starts, q, bits, up)
    for given in (words(count, seed=2) % q, torch.arange(count) % q):
        made = check("turned_exponents", turns, given, 16, q, x)
    for low in (0, 126, q - 1):
        check("read_exponents", made, turns, low, 16, q)


def waves(check, shift, count):
    angle = torch.cat([EIGHTHS, EIGHTHS >> shift, words(count)])
    n, scale = angle.numel(), 2.0**31 * 1.1
    check("waves", angle, shift, scale, 7)
    check("coefficients", angle, shift, scale, FLOATS / 2**20, FLOATS.flip(0) / 2**20)
    check("combine", angle, shift, scale, FLOATS / 2**20, FLOATS.flip(0) / 2**20, words(14, n), -5)
    check("cosines", angle, shift, words(7), FLOATS)
    check("add_cosines", angle, shift, words(7), FLOATS, torch.arange(7) * 9, words(7, 2, n), 77)


def tables(check, count):
    rows, places = table_words(8, count, 32), words(count)
    check("flip_places", places, rows)
    check("parities", rows, places, words(3, 256) & 1 == 1)
    for bits in (8, 16, 32, 64):
        check("turn_table", words(64), places, table_words(bits, count, 64))
        check("read_table", table_words(bits, count, 64), places, words(7))
    check("turn_signs", words(count), 5, table_words(16, count, 32))
    check("read_signs", table_words(16, count, 32), words(count, 9), 5)
    check("turn_bits", words(count, 3) & 31, places & 1, table_words(16, count, 3, 32))
    check("read_bits", table_words(16, count, 3, 32), words(count, 3) & 31, words(count, 3, seed=1) & 1, 1)


def rows_and_fields(check):
    for size, columns, asked in ((130, 40, 5), (1030, 300, 1), (700, 130, 17), (0, 5, 2), (64, 3, 0)):
        check("xor_rows", table_words(32, size, columns), words(asked, ring.limbs(size)))
    for left, right in (((3, 50), (50,)), ((2, 1, 70), (3, 1)), ((0,), (0,)), ((), ())):
        check("multiply_field", words(*left), words(*right, seed=1))


def any_layout(check):
    """Limbs that lie apart, dimensions turned, parts of more, and what is repeated without a copy."""
    for x in wide_layouts(104, 3, 5):
        for y in wide_layouts(104, 3, 5, seed=1):
            for name in (*OF_TWO, "subtract_ones", "multiply_ones"):
                check(name, x, y, 104)
            check("hide_wide", x, y, 7, 104, True)
        check("sum_wide", x, 104)
        check("reduce_wide", x, 70)
        check("drop_wide", x, 104, 9, True)
        for turns in layouts(words, 3, 5):
            check("rotate_ones", x, turns, 104)
            check("dot_wide", turns, x, 104)
    for x in wide_layouts(104, 6)[:4]:
        made = check("turned_exponents", words(12)[::2], words(6) % 104, 20, 104, x)
        check("read_exponents", made, words(12)[::2], 9, 20, 104)
        check("window_ones", x, words(4)[::2], torch.tensor([[0, 9], [4, 9], [6, 9]])[:, 0], 104, 40, True)


def keys(check, group, count, comparison=None):
    comparison = comparison or Comparison(79, (0, 1 << 30, 1 << 60), (0, 20, 50), group)
    bits = comparison.width
    paid = (wide_words(group.bits, count, group.count), wide_words(group.bits, count, group.count, seed=1))
    if group.modulus:
        paid = tuple(x % group.modulus for x in paid)
    mask, opened = wide_words(bits, count), wide_words(bits, count, seed=1)
    seeds = words(count, 2), words(count, 2, seed=1)
    common = check("compare_keys", comparison, mask, paid[0], *seeds)
    for party in (0, 1):
        check("compare", comparison, seeds[party], common, party, opened, paid[1])
