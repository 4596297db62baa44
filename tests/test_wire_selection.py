"""Selection on shares: every operation of ``eviction.operations`` against the plaintext engine's, over its domain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import CLIENT, DEALER, OWNER, run

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.choosing import PAIRS
from crypten_llm.protocols.secret import Overflow
from eviction.operations import Choice

PLAIN = PlainEngine(softmax_base=2.0)  # as engine wire's
UNIT = 2.0**-13  # of a compared score


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def grid(*size, seed=0, step=2.0**-10, limit=20_000):
    """Numbers of both signs in steps that every fixed point here holds, a fifth of them equal to another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-limit, limit + 1, size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 0.2, x.flatten()[0], x) * step


def shown(job, *arguments):
    """What the client sees of the handle (or handles) that ``job(engine, secret)`` makes."""

    def play(engine):
        def secret(value, source=OWNER, bits=5):
            handle = engine.secret(value if engine.rank == source else None, value.shape, source)
            handle.bits = bits
            return handle

        engine.shown_bits = 64  # all there are: a reciprocal of 2,000 is small
        made = job(engine, secret, *arguments)
        several = made if isinstance(made, list) else [made]
        values = [engine.open_to(engine.contents(h) if hasattr(h, "settle") else h, CLIENT) for h in several]
        return values if isinstance(made, list) else values[0]

    outcome = run(play, engine=True)
    assert outcome.results[DEALER] in (None, [None] * 2)
    return outcome.results[CLIENT]


def close(value, expected, tolerance=0.0):
    torch.testing.assert_close(value, expected.float(), atol=tolerance, rtol=0)


# Top-k and one-hot rows.

SIZES = [(1, 0), (1, 1), (2, 1), (5, 2), (7, 7), (16, 1), (16, 15), (17, 1), (31, 8), (64, 13), (65, 1), (130, 1)]


@pytest.mark.parametrize(("n", "count"), SIZES)
def test_top_and_its_picks(n, count):
    x = grid(2, 3, n, seed=n + count)

    def job(engine, secret):
        bits = engine.top(secret(x), count)
        return [bits, engine.picks(bits, count)]

    bits, picks = shown(job)
    close(bits, PLAIN.top(x, count))
    close(picks, PLAIN.picks(PLAIN.top(x, count), count))


@pytest.mark.parametrize(("n", "count"), [(PAIRS + 1, 1), (PAIRS + 1, PAIRS), (300, 40), (1100, 600)])
def test_top_of_many_values(n, count):
    x = grid(2, n, seed=n)
    close(shown(lambda engine, secret: engine.top(secret(x), count)), PLAIN.top(x, count))


@pytest.mark.parametrize("n", [PAIRS, PAIRS + 1])
@pytest.mark.parametrize("count", [1, 3])
def test_best_on_both_sides_of_the_number_of_pairs(n, count):
    """By rank where pairs are compared; by position beyond."""
    x = grid(2, n, seed=n)
    best, expected = shown(lambda engine, secret: engine.best(secret(x), count)), PLAIN.best(x, count)
    close(best, expected if n == PAIRS else PLAIN.picks(PLAIN.top(x, count), count))


@pytest.mark.parametrize("n", [9, 40, 300])
@pytest.mark.parametrize("level", [0.0, -3.5, 31.0])
def test_equal_values_are_taken_from_the_lowest_index_on(n, level):
    x = torch.full((1, n), level)
    for count in (1, n // 2):
        close(shown(lambda engine, secret, count=count: engine.top(secret(x), count)), PLAIN.top(x, count))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_top_of_any_values(data):
    values = st.integers(-32, 31) | st.sampled_from([-32 * 2**8 + 1, 0, 1, 32 * 2**8 - 1])
    x = torch.tensor([data.draw(st.lists(values, min_size=1, max_size=40))]) / 2.0**8
    count = data.draw(st.integers(0, x.shape[1]))
    best = shown(lambda engine, secret: engine.best(secret(x), count))
    close(best.sum(-2), PLAIN.top(x, count))
    close(best, PLAIN.best(x, count))


def test_a_count_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="top: the 4 largest of 3 values; give 0 to 3"):
        shown(lambda engine, secret: engine.top(secret(grid(1, 3)), 4))


def test_scores_of_the_cache_are_compared_at_their_precision():
    """Values closer than a unit may go either way; those further apart never do."""
    query, keys = normal(2, 3, 16), normal(2, 50, 16, seed=1)

    def job(engine, secret):
        return engine.top(engine.total(engine.scores(secret(query), engine.rows(secret(keys))), 1), 20)

    found, exact = shown(job), PLAIN.total(query @ keys.transpose(1, 2), 1)
    missed = exact.masked_fill(found > 0.5, -torch.inf).amax(-1) - exact.masked_fill(found < 0.5, torch.inf).amin(-1)
    assert (found.sum(-1) == 20).all() and (missed < 3 * 16 * 3 * 2**-12).all()


# Rows, scores and weights by secret choices.


def choice(engine, secret, likeness, size, first, rows, count):
    bits = engine.top(secret(likeness), count)
    return Choice(rows, engine.picks(bits, count), first, size)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_a_choice_of_blocks(shared, size):
    """Scores gathered, softmax over them, weights scattered and mixed: as on plaintext."""
    scores, values, likeness = 3 * normal(2, 3, 30), normal(2, 30, 8, seed=1), grid(1 if shared else 2, 6)
    rows = torch.tensor([0, 1, 26, 27, 28, 29])

    def job(engine, secret):
        held = engine.rows(secret(values), values=True)
        picked = choice(engine, secret, likeness, size, 2, rows, 3)
        gathered = engine.gather_scores(picked, secret(scores))
        weights = engine.scatter_weights(picked, engine.softmax(gathered), 30)
        return [gathered, engine.mix(weights, held)]

    gathered, mixed = shown(job)
    picked = choice(PLAIN, lambda x: x, likeness, size, 2, rows, 3)
    expected = PLAIN.gather_scores(picked, scores)
    close(gathered, expected, 2**-13)
    close(mixed, PLAIN.mix(PLAIN.scatter_weights(picked, PLAIN.softmax(expected), 30), values), 1e-3)


def test_a_choice_of_public_rows_alone():
    scores, rows = 3 * normal(2, 3, 12), torch.tensor([0, 5, 11])

    def job(engine, secret):
        values = engine.rows(secret(normal(2, 12, 8, seed=1)), values=True)
        weights = engine.softmax(engine.gather_scores(Choice(rows), secret(scores)))
        return engine.mix(engine.scatter_weights(Choice(rows), weights, 12), values)

    weights = PLAIN.softmax(PLAIN.gather_scores(Choice(rows), scores))
    close(shown(job), PLAIN.mix(PLAIN.scatter_weights(Choice(rows), weights, 12), normal(2, 12, 8, seed=1)), 1e-3)


@pytest.mark.parametrize("queries", [torch.ones(6), torch.tensor([0.0, 0, 0.25, 0.25, 1 / 3, 1]), torch.ones(6) / 6])
def test_mass(queries):
    scores, values = 3 * normal(2, 6, 20), normal(2, 20, 8, seed=1)

    def job(engine, secret):
        weights = engine.softmax(secret(scores))
        engine.mix(weights, engine.rows(secret(values), values=True))
        return engine.mass(weights, queries)

    close(shown(job), PLAIN.mass(PLAIN.softmax(scores), queries), 1e-3)


def test_the_mass_of_many_queries():
    """A chunk of 128 tokens and a group of four heads, and what one row draws of it all."""
    scores = normal(1, 512, 8) + torch.arange(8) / 4
    scores[..., 0] += 12

    def job(engine, secret):
        weights = engine.softmax(secret(scores))
        engine.mix(weights, engine.rows(secret(normal(1, 8, 4)), values=True))
        mass = engine.mass(weights, torch.ones(512))
        return [mass, engine.top(engine.add(mass, mass), 3)]

    mass, best = shown(job)
    expected = PLAIN.mass(PLAIN.softmax(scores), torch.ones(512))
    close(mass, expected, 512 * 2**-14)
    close(best, PLAIN.top(expected, 3))


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_rows_that_are_kept_serve_further_products(values, shared, size):
    """Rows, and blocks of five."""
    rows, likeness, count = normal(2, 20, 8), grid(1 if shared else 2, 20 // size), 7 // size + 1

    def job(engine, secret):
        held = engine.rows(secret(rows), values=values)
        kept = engine.keep(held, engine.picks(engine.top(secret(likeness), count), count), size)
        return [kept, *([] if values else [engine.scores(secret(normal(2, 1, 8)), kept)])]

    blocks = likeness.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values.expand(2, -1)
    expected = rows.reshape(2, -1, size, 8)[torch.arange(2)[:, None], blocks].reshape(2, -1, 8)
    found = shown(job) if not values else [shown(lambda e, s: job(e, s)[0])]
    close(found[0], expected, 2**-12)
    if not values:
        close(found[1], normal(2, 1, 8) @ expected.transpose(1, 2), 40 * 2**-12)


@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("heads", [1, 2])
def test_drop(n, heads):
    rows = normal(2, n, 4)
    for position in range(0, n, 4 if n > 4 else 1):
        likeness = torch.zeros(heads, n)
        likeness[:, position] = 1
        likeness[-1, position - 1] = 2

        def job(engine, secret, likeness=likeness):
            return engine.drop(engine.rows(secret(rows)), engine.top(secret(likeness), 1))

        close(shown(job), PLAIN.drop(rows, PLAIN.top(likeness, 1)), 2**-12)


def test_rows_are_taken_joined_and_grow():
    rows, new, query = normal(2, 10, 8), normal(2, 1, 8, seed=1), normal(2, 3, 8, seed=2)
    index = torch.tensor([0, 1, 5, 9])

    def job(engine, secret):
        held = engine.rows(secret(rows))
        parts = [engine.take(held, index), engine.keep(held, engine.picks(engine.top(secret(rows[..., 0]), 3), 3))]
        grown = engine.cat([engine.cat([*parts, engine.fixed(secret(new))], 1), engine.rows(secret(new))], 1)
        assert grown.shape == (2, 9, 8)
        scores = engine.scores(secret(query), grown)
        return [scores, grown]

    kept = PLAIN.keep(rows, PLAIN.picks(PLAIN.top(rows[..., 0], 3), 3))
    expected = torch.cat([rows[:, index], kept, new, new], 1)
    scores, grown = shown(job)
    close(grown, expected, 2**-12)
    close(scores, query @ expected.transpose(1, 2), 40 * 2**-12)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coarse(bits, values):
    rows = torch.cat([torch.linspace(-1.49, 1.43, 50), torch.tensor([0.0, 1.0, -1.0])]).reshape(1, 53, 1)

    def job(engine, secret):
        return engine.coarse(engine.rows(secret(rows), values=values), bits)

    close(shown(job), PLAIN.coarse(rows, bits), 2**-12)


def test_gather_composes_and_adds():
    x, first, second = grid(2, 12, 5), grid(2, 12, seed=1), grid(2, 6, seed=2)

    def job(engine, secret):
        bits = engine.top(secret(first), 6)
        outer = engine.picks(bits, 6)
        both = engine.gather(engine.best(secret(second), 2), outer)
        return [engine.gather(both, secret(x)), engine.gather(bits.reshape(2, 1, 12), secret(x))]

    outer = PLAIN.picks(PLAIN.top(first, 6), 6)
    found, sums = shown(job)
    close(found, PLAIN.gather(PLAIN.gather(PLAIN.best(second, 2), outer), x))
    close(sums, PLAIN.top(first, 6)[:, None] @ x)


# Comparisons and maxima.


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_largest(n, dim):
    shape = [3, 4, 2]
    shape[dim] = n
    x = grid(*shape, seed=n)
    close(shown(lambda engine, secret: engine.largest(secret(x), dim)), x.amax(dim))
    low = shown(lambda engine, secret: engine.largest(engine.scale(secret(x), -1), dim))
    close(low, -x.amin(dim))


@pytest.mark.parametrize("threshold", [0.0, -3.0, 2.0**-10, 19.0, 100.0, -100.0])
def test_above(threshold):
    x = torch.cat([grid(50), torch.tensor([0.0, -3.0, 2.0**-10, 2.0**-9, 19.0, 31.9, -31.9])])
    close(shown(lambda engine, secret: engine.above(secret(x), threshold)), PLAIN.above(x, threshold))


def test_summaries_of_clusters_are_rows():
    """MPCache's: a mixture of the largest and least of each coordinate, fixed, scored."""
    keys, query = grid(2, 4, 8, 6, limit=3000), normal(2, 3, 6)

    def summary(engine, x):
        high, least = engine.largest(x, 2), engine.largest(engine.scale(x, -1), 2)
        return engine.add(engine.scale(high, 0.6), engine.scale(least, -0.4))

    def job(engine, secret):
        held = engine.rows(secret(keys.reshape(2, 32, 6)))
        made = engine.fixed(summary(engine, engine.contents(held).reshape(2, 4, 8, 6)))
        return [engine.scores(secret(query), made), made]

    scores, rows = shown(job)
    close(rows, summary(PLAIN, keys), 3e-3)
    close(scores, query @ summary(PLAIN, keys).transpose(1, 2), 6 * 4 * 3e-3)


# Linear with public factors, products, functions.


@pytest.mark.parametrize("factor", [2, -1, 0.25, 0.6, 0.0, torch.tensor([[1.0], [0.5], [-0.3]])], ids=str)
def test_scale(factor):
    x = grid(3, 7)
    close(shown(lambda engine, secret: engine.scale(secret(x), factor)), PLAIN.scale(x, factor), 20 * 2**-16)


def test_scale_of_scores_that_have_little_room():
    query, keys = normal(1, 3, 8), normal(1, 5, 8, seed=1)

    def job(engine, secret):
        scores = engine.scores(secret(query), engine.rows(secret(keys)))
        return engine.scale(engine.total(scores, 1), 1 / 3)

    close(shown(job), (query @ keys.transpose(1, 2)).sum(1) / 3, 40 * 2**-12)


def test_total_transform_cat_and_public():
    x, matrix = grid(2, 6, 5), torch.tensor([[1.0, 0.5], [0, 0.3], [-1, 0], [0, 0.1], [0.2, 0.1]])

    def job(engine, secret):
        made = engine.transform(secret(x), matrix)
        joined = engine.cat([made, engine.public(torch.full((2, 1, 2), 0.75)), engine.scale(made, 0.5)], 1)
        return [engine.total(secret(x), 1), joined]

    total, joined = shown(job)
    close(total, x.sum(1))
    expected = x @ matrix
    close(joined, torch.cat([expected, torch.full((2, 1, 2), 0.75), expected / 2], 1), 5 * 20 * 2**-16)


@pytest.mark.parametrize("shape", [(2, 7), (2, 1), (1, 7)])
def test_multiply_and_choose_broadcast(shape):
    x, y, likeness = grid(2, 7), grid(*shape, seed=1), grid(2, 7, seed=2)

    def job(engine, secret):
        bits = engine.top(secret(likeness), 3)
        return [engine.multiply(secret(x), secret(y)), engine.choose(bits, secret(x), secret(y))]

    product, chosen = shown(job)
    close(product, x * y, 2**-12)
    close(chosen, PLAIN.choose(PLAIN.top(likeness, 3), x, y))


def test_bits_multiply_and_count():
    x, likeness = grid(2, 7), grid(2, 7, seed=2)

    def job(engine, secret):
        bits = engine.top(secret(likeness), 3)
        return [engine.multiply(bits, secret(x)), engine.total(bits, 1)]

    product, count = shown(job)
    close(product, PLAIN.top(likeness, 3) * x)
    close(count, torch.full((2,), 3.0))


def test_sigmoid():
    x = torch.linspace(-12, 12, 201)
    close(shown(lambda engine, secret: engine.sigmoid(secret(x))), x.sigmoid(), 2e-5 + 2**-16)


@pytest.mark.parametrize(("low", "high"), [(0.5, 2), (1, 1), (1, 2000), (2**-6, 30), (3, 3.5)])
def test_reciprocal(low, high):
    x = torch.logspace(0, 1, 60, base=high / low).mul(low).mul(2**10).round().div(2**10).clamp(low, high)
    found = shown(lambda engine, secret: engine.reciprocal(secret(x, bits=11), low, high))
    torch.testing.assert_close(found, 1 / x, atol=0, rtol=3e-4)


def test_reciprocal_refuses_what_it_cannot_divide():
    with pytest.raises(ValueError, match="reciprocal: from 0 to 2; give 0 < low <= high"):
        shown(lambda engine, secret: engine.reciprocal(secret(grid(2)), 0, 2))


def test_values_that_do_not_fit_are_refused_by_name():
    def wide(bits, engine, secret):
        x = secret(grid(1, 4), bits=bits)
        x.width = 20
        return x

    for name, call in {
        "total": lambda e, x: e.total(x, 1),
        "scale": lambda e, x: e.scale(x, 0.3),
        "comparison": lambda e, x: e.top(x, 2),
        "choose": lambda e, x: e.choose(x, x, x),
    }.items():
        with pytest.raises(
            Overflow, match=rf"{name}: \|x\| < 2\^5 at scale 2\^16 does not fit a share valid modulo 2\^20"
        ):
            shown(lambda engine, secret, call=call: call(engine, wide(5, engine, secret)))
