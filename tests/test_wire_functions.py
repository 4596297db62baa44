"""Functions of one opening: trigonometric sums, comparisons and normalisation against their plaintext twins."""

import math

import numba
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import joined, open_wires, run, share, value

from crypten_llm.kernels import cpu, dcf, ring
from crypten_llm.protocols import fits, smooth
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Overflow
from crypten_llm.protocols.smooth import normalize

TARGETS = {
    "exp": torch.exp,
    "reciprocal": lambda x: 1 / x,
    "inverse root": lambda x: x**-0.5,
    "silu": lambda x: x / (1 + torch.exp(-x)) - x / 2,
}
FITS = pytest.mark.parametrize("name", TARGETS)


# Trigonometric sums.


def grid(*stretches) -> torch.Tensor:
    """All points of stretches (low, high, count), one behind the other."""
    return torch.cat([torch.linspace(*stretch, dtype=torch.float64) for stretch in stretches])


def evaluated(fit, x: torch.Tensor, scale: int, fraction: int = 22, shift: float = 0.0) -> torch.Tensor:
    integers = (x * 2.0**scale).round().long()

    def job(runtime):
        (wire,) = open_wires(
            runtime, [Opening(share(runtime, integers, scale), ring=scale + fit.period, function=True)]
        )
        return smooth.evaluate(runtime, wire, fit, fraction, bits=5, shift=shift)

    outcome = run(job)
    assert (outcome.results[0].scale, outcome.results[0].width) == (2 * fraction, 64)
    return value(outcome)


@FITS
def test_fits_keep_their_declared_error(name):
    """On a grid other than the one they were fitted on."""
    fit = fits.stored(name)
    x = grid((fit.low, fit.high, 20_011))
    error = (fit(x) - TARGETS[name](x)).abs().max()
    assert error <= 1.05 * fit.error
    # The bound of each is what the engine's error budget is made of.
    assert fit.error < {"exp": 4e-9, "inverse root": 2e-6}.get(fit.name, 1e-4)


@pytest.mark.parametrize("name", fits.TARGETS)
def test_stored_fits_are_those_of_their_targets(name):
    """Not to the last bit, which depends on the processor, and is why they are stored: over the domain."""
    target, found = fits.TARGETS[name], fits.stored(name)
    again = target.fit(name)
    x = grid((target.low, target.high, 5001))
    assert (found(x) - again(x)).abs().max() < 0.2 * found.error + 1e-8, "run python -m crypten_llm.protocols.fits"
    assert (found.period, found.modes, bool(found.sine.any())) == (target.period, target.modes, not target.even)


def test_stored_fits_are_whole_units_that_floats_hold():
    """So that every machine reads the same numbers."""
    for name in fits.TARGETS:
        fit = fits.stored(name)
        units = torch.cat([torch.tensor([fit.constant], dtype=torch.float64), fit.cosine, fit.sine]) * 2.0**36
        assert torch.equal(units, units.round()) and units.abs().max() < 2**53


def test_storing_writes_every_fit_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "_STORED", tmp_path / "fits.json")
    monkeypatch.setattr(fits, "TARGETS", {"inverse root": fits.TARGETS["inverse root"]})
    fits.store()
    again, x = fits.stored.__wrapped__("inverse root"), grid((0.25, 1, 100))
    assert (again(x) - x**-0.5).abs().max() < 2e-6


@FITS
@pytest.mark.parametrize(("scale", "fraction"), [(14, 22), (30, 26), (56, 22), (30, 16)])
def test_evaluation_keeps_its_declared_bound_over_the_domain(name, scale, fraction):
    fit = fits.stored(name)
    x = grid((fit.low, fit.high, 2), (fit.low, fit.high, 400))
    x = ((x * 2.0**scale).round() / 2.0**scale).clip(fit.low, fit.high)
    found = evaluated(fit, x, scale, fraction)
    rounded = (x * 2.0**scale).round() / 2.0**scale
    assert (found - fit(rounded)).abs().max() <= fits.rounding(fit, fraction)
    assert (found - TARGETS[name](rounded)).abs().max() <= 1.05 * fit.error + fits.rounding(fit, fraction)


@FITS
def test_outside_the_domain_the_sum_goes_on_periodically_and_bounded(name):
    fit, period = fits.stored(name), 2.0 ** fits.stored(name).period
    outside = grid((fit.high, fit.low + period, 50), (fit.low - period, fit.high - period, 20))
    found = evaluated(fit, outside, 30)
    assert (found - fit(outside)).abs().max() <= fits.rounding(fit, 22)
    assert found.abs().max() <= abs(fit.constant) + math.sqrt(2 * fit.modes) * fit.norm + fits.rounding(fit, 22)


@pytest.mark.parametrize("shift", [-9.0, -0.3, 5.0])
def test_a_public_shift(shift):
    fit = fits.stored("exp")
    x = grid((fit.low, fit.high, 50)) - shift
    found = evaluated(fit, x, 30, shift=shift)
    assert (found - (x + shift).exp()).abs().max() <= 1.05 * fit.error + fits.rounding(fit, 22)


def test_angles_are_computed_to_the_last_bits():
    """Against Python's own, at every eighth of a turn and at random; the ring's top bit is no sign."""
    generator = np.random.default_rng(0)
    eighths = [(k << 61) + d for k in range(8) for d in (-1, 0, 1)]
    for turn in [e % 2**64 for e in eighths] + [int(v) for v in generator.integers(0, 2**64, 2000, np.uint64)]:
        angle = 2 * math.pi * (turn / 2**64)
        for m, shift in ((np.uint64(turn).astype(np.int64), 0), (np.int64(turn >> 4), 4)):
            if shift and turn % 16:
                continue
            cosine, sine = cpu._cos_sin(m, shift)
            assert abs(cosine - math.cos(angle)) < 1e-15 and abs(sine - math.sin(angle)) < 1e-15


@pytest.mark.parametrize(
    ("kernel", "types"), [("_cos_sin", "(int64, int64)"), ("_turned", "(f8[::1], f8[::1], uint64)")]
)
def test_public_factors_do_not_depend_on_the_machine(kernel, types):
    """Both parties must agree on them to the last bit: no call of a mathematical library, nothing contracted."""
    compiled = numba.njit(types, boundscheck=False)(getattr(cpu, kernel).py_func)  # a cached one shows no code
    (code,) = compiled.inspect_llvm().values()
    assert "fmul double" in code
    for word in ("llvm.cos", "llvm.sin", "@cos", "@sin", "llvm.fma", "llvm.fmuladd", "fmul fast", "contract"):
        assert word not in code


def test_more_elements_than_one_block():
    x = grid((-1, 1, smooth.BLOCK + 77))
    fit = fits.stored("silu")
    assert (evaluated(fit, x, 20) - fit((x * 2**20).round() / 2**20)).abs().max() <= fits.rounding(fit, 22)


def test_a_function_wants_its_own_period():
    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, torch.tensor([1]), 14), ring=20, function=True)])
        smooth.evaluate(runtime, wire, fits.stored("exp"), 22, bits=1)

    with pytest.raises(AssertionError, match=r"open exp modulo 2\^19"):
        run(job)


# Comparisons.


def chacha_block(constants: list[int], key: list[int]) -> list[int]:
    """The ChaCha20 block with counter and nonce 0, as RFC 8439 (section 2.3) writes it."""
    start = [*constants, *key, 0, 0, 0, 0]
    x = start.copy()

    def quarter(a, b, c, d):
        for first, second, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[first] = (x[first] + x[second]) % 2**32
            mixed = x[third] ^ x[first]
            x[third] = (mixed << turn | mixed >> (32 - turn)) % 2**32

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(a + b) % 2**32 for a, b in zip(x, start, strict=True)]


def words_of(text: bytes) -> list[int]:
    return np.frombuffer(text, "<u4").tolist()


def test_the_block_function_is_chacha20():
    """The compiled loop against a plain one, the plain one against OpenSSL; only the constant differs."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        key = generator.bytes(32)
        stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(64))
        assert chacha_block(words_of(b"expand 32-byte k"), words_of(key)) == words_of(stream)
    keys = generator.integers(0, 2**32, (4, 7), dtype=np.uint32)
    blocks = np.empty((16, 7), np.uint32)
    dcf.chacha_blocks(keys, blocks, 7)
    for i in range(7):
        assert blocks[:, i].tolist() == chacha_block(words_of(b"expand 16-byte k"), 2 * keys[:, i].tolist())


def test_the_published_vector_for_a_zero_key_of_128_bits():
    """draft-strombergson-chacha-test-vectors, TC1, 20 rounds."""
    blocks = np.empty((16, 1), np.uint32)
    dcf.chacha_blocks(np.zeros((4, 1), np.uint32), blocks, 1)
    assert blocks[:, 0].tobytes().hex().startswith("89670952608364fd00b2f90936f031c8e756e15dba04b8493d00429259b20f46")


def tensor(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int64))


def compared(alpha, beta, points, bits, seed=0):
    generator = np.random.default_rng(seed)
    seeds = [tensor(words) for words in generator.integers(0, 2**64, (2, len(alpha), 2), dtype=np.uint64)]
    common = cpu.compare_keys(tensor(alpha), tensor(beta), *seeds, bits)
    assert [(part.shape, part.dtype) for part in common] == ring.key_sizes(bits, len(alpha)), "sizes are announced"
    return [cpu.compare(seeds[party], common, party, tensor(points)).numpy().view(np.uint64) for party in (0, 1)]


@pytest.mark.parametrize("bits", [1, 2, 7, 8, 31, 32, 46, 63, 64])
def test_shares_of_a_comparison(bits):
    """Every pair of edges: the largest and smallest threshold and point, neighbours, and random ones."""
    generator, top = np.random.default_rng(bits), 2**bits - 1
    edges = sorted(
        {0, 1, top, max(0, top - 1), top // 2, top // 2 + 1, *map(int, generator.integers(0, top, 6, np.uint64))}
    )
    near = {min(top, max(0, e + d)) for e in edges for d in (-1, 0, 1)}
    alpha = np.array(edges, dtype=np.uint64)
    points = np.broadcast_to(np.array(sorted(near), dtype=np.uint64), (len(edges), len(near)))
    beta = generator.integers(0, 2**64, (len(edges), 2), dtype=np.uint64)
    beta[0], beta[1] = (0, 2**64 - 1), (1, 2**63)
    first, second = compared(alpha, beta, points, bits)
    below = (points < alpha[:, None])[..., None]
    assert np.array_equal(first + second, np.where(below, beta[:, None, :], np.uint64(0)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 64), st.data())
def test_any_comparison(bits, data):
    number = st.integers(0, 2**bits - 1)
    alpha, point = data.draw(number), data.draw(number)
    word = st.integers(0, 2**64 - 1)
    beta = np.array([[data.draw(word), data.draw(word)]], np.uint64)
    first, second = compared(
        np.array([alpha], np.uint64), beta, np.array([[point]], np.uint64), bits, seed=alpha % 1000
    )
    assert (first + second).tolist() == [[beta[0].tolist() if point < alpha else [0, 0]]]


def test_more_points_than_lanes():
    alpha = np.arange(70, dtype=np.uint64) * np.uint64(3)
    points = np.broadcast_to(np.arange(200, dtype=np.uint64), (70, 200))
    first, second = compared(alpha, np.ones((70, 2), np.uint64), points, 8)
    assert np.array_equal((first + second)[..., 0], (points < alpha[:, None]).astype(np.uint64))


# Normalisation.


def normalized(integers: torch.Tensor, top: int, segments: int, size: int, table: list[int]):
    def job(runtime):
        secret = share(runtime, integers)
        (wire,) = open_wires(runtime, [Opening(secret, ring=size, function=True)])
        return normalize(runtime, wire, top, segments, table)

    owner, client, _ = run(job).results
    return [joined(mine, theirs) for mine, theirs in zip(owner, client, strict=True)]


@pytest.mark.parametrize(
    ("top", "segments", "size"),
    [(58, 20, 59), (62, 26, 63), (62, 26, 64), (63, 2, 64), (20, 5, 21), (20, 10, 40), (8, 1, 9)],
)
def test_normalize_over_all_segments(top, segments, size):
    """z 4^k is exact, k what z's size says, but within 2^-8 of a power of four, where the next segment will do."""
    ends = [2 ** (top - 2 * j) for j in range(segments + 2) if top >= 2 * j]
    near = {end + offset for end in ends for offset in (-2, -1, 0, 1, 2, -(end >> 6), end >> 6, end // 3)}
    integers = torch.tensor(sorted(z for z in near if 0 < z < 2**top))
    generator = torch.Generator().manual_seed(top)
    exponents = torch.rand(200, generator=generator, dtype=torch.float64) * (top - 0.01)
    integers = torch.cat([integers, (2**exponents).long().clamp(min=1)])
    table = [3 * k * k - 7 for k in range(segments)]
    scaled, entry = normalized(integers, top, segments, size, table)
    for z, found, looked_up in zip(integers.tolist(), scaled.tolist(), entry.tolist(), strict=True):
        k = table.index(looked_up)
        due = min(segments - 1, (top - z.bit_length()) // 2)
        assert found == z * 4**k
        if k != due:
            assert abs(k - due) == 1
            end = 2 ** (top - 2 * max(k, due))
            assert abs(z - end) <= end >> 8
        assert found < 2**top * (1 + 2**-8)
        assert found >= 2**top // 4 * (1 - 2**-8) or z < 2 ** (top - 2 * segments + 2)


def test_normalize_of_zero_stays_in_the_last_segment():
    scaled, entry = normalized(torch.zeros(50, dtype=torch.int64), 58, 20, 59, list(range(20)))
    assert (scaled == 0).all() and (entry == 19).all()


def test_normalize_refuses_what_its_ring_cannot_hold():
    with pytest.raises(Overflow, match="a value of 58 bits needs a ring of 59, not 58"):
        normalized(torch.ones(1, dtype=torch.int64), 58, 20, 58, list(range(20)))
    with pytest.raises(Overflow, match="12 segments do not fit a value of 20 bits"):
        normalized(torch.ones(1, dtype=torch.int64), 20, 12, 21, list(range(12)))
