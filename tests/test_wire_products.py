"""Products of wires against the same products of plain integers, modulo the width that the result declares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import open_wires, play, reconstruct, run, share, signed

from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Overflow
from crypten_llm.roles import CLIENT, OWNER

NARROW, LIFTED, WHOLE = dict(size=48), dict(size=40, lifted=64), dict(size=64)
KINDS = {"narrow": NARROW, "lifted": LIFTED, "whole": WHOLE}


def integers(*shape, seed=0, bits=12):
    """Random, with the extremes of |x| < 2^bits in front."""
    x = torch.randint(1 - 2**bits, 2**bits, shape, generator=torch.Generator().manual_seed(seed))
    edge = torch.tensor([2**bits - 1, 1 - 2**bits, 0])[: x.numel()]
    x.view(-1)[: len(edge)] = edge
    return x


def wires(runtime, *inputs):
    """One round that opens (integers, kind) pairs without truncation, so that products are exact."""
    return open_wires(
        runtime,
        [Opening(share(runtime, x, width=kind["size"], bits=12), lifted=kind.get("lifted", 0)) for x, kind in inputs],
    )


def product_of(function, *inputs, **options):
    return run(lambda runtime: function(runtime, *wires(runtime, *inputs), **options))


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
@pytest.mark.parametrize("shapes", [((4, 5), (4, 5)), ((4, 5), (4, 1)), ((3, 1, 2), (5, 1)), ((), (6,))])
def test_multiply(left, right, shapes):
    x, y = integers(*shapes[0]), integers(*shapes[1], seed=1)
    outcome = product_of(products.multiply, (x, KINDS[left]), (y, KINDS[right]))
    assert torch.equal(reconstruct(outcome), x * y)
    expected = 48 if "narrow" in (left, right) else 64
    assert outcome.results[0].width == expected and outcome.results[0].bits == 24


def test_multiply_with_a_declared_scale_and_bound():
    x, y = torch.tensor([3, -5]), torch.tensor([4, 16])
    result = product_of(products.multiply, (x, NARROW), (y, LIFTED), scale=20, bits=3).results[0]
    assert (result.scale, result.bits) == (20, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_squares(kind):
    x = integers(5, 9, bits=12)
    assert torch.equal(reconstruct(product_of(products.square, (x, KINDS[kind]))), x * x)
    outcome = product_of(products.sum_of_squares, (x, KINDS[kind]), bits=30)
    assert torch.equal(reconstruct(outcome), (x * x).sum(-1, keepdim=True))


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("left", "right"), [("narrow", "narrow"), ("narrow", "whole"), ("whole", "whole")])
def test_matmul(batch, transposed, left, right):
    x, y = integers(*batch, 4, 7), integers(*batch, 7, 3, seed=1)
    given_y = y.transpose(-1, -2).contiguous() if transposed else y
    inputs = (x, KINDS[left]), (given_y, KINDS[right])
    outcome = product_of(products.matmul, *inputs, transposed=transposed, bits=27)
    assert torch.equal(reconstruct(outcome), x @ y)


def weight(runtime, integers, scale=8):
    """The owner's matrix of these integers / 2^scale."""
    plain = integers.double() / 2**scale if runtime.role == OWNER else None
    return play(runtime, products.own(runtime, plain, integers.shape, scale))


def looked_up(runtime, ids, count, matrix):
    """Rows of the matrix for ids that the client alone is given."""
    mine = ids if runtime.role == CLIENT else None
    return play(runtime, products.lookup(runtime, mine, count, matrix, bits=8))


@pytest.mark.parametrize("kind", ["narrow", "whole"])
@pytest.mark.parametrize("rows", [1, 5])
def test_linear(kind, rows):
    x, w = integers(rows, 33), integers(20, 33, seed=1)

    def job(runtime):
        matrix = weight(runtime, w)
        (wire,) = wires(runtime, (x, KINDS[kind]))
        return products.linear(runtime, wire, matrix, bits=24)

    outcome = run(job)
    assert torch.equal(reconstruct(outcome), x @ w.t())
    assert outcome.results[0].scale == 8


def test_linear_of_truncated_wires_uses_the_dealt_mask():
    """A truncated wire's mask is a dealt one; its shares do not add up modulo 2^64 to what was drawn."""
    x, w = integers(3, 16, bits=20), integers(4, 16, seed=1)

    def job(runtime):
        matrix = weight(runtime, w)
        (wire,) = open_wires(runtime, [Opening(share(runtime, x * 2**10, width=50), truncate=10)])
        return products.linear(runtime, wire, matrix, bits=30)

    assert torch.equal(reconstruct(run(job)), x @ w.t())


@pytest.mark.parametrize("extreme", [2**31 - 1, 1 - 2**31])
def test_the_largest_weights_are_held_exactly(extreme):
    def job(runtime):
        matrix = weight(runtime, torch.tensor([[extreme]]), scale=0)
        return products.linear(runtime, *wires(runtime, (torch.tensor([[3]]), WHOLE)), matrix, bits=40)

    assert reconstruct(run(job)).item() == 3 * extreme


def test_a_weight_that_32_bits_do_not_hold_is_refused():
    with pytest.raises(Overflow, match=r"a weight of 3.28e\+04 does not fit 32 bits at scale 2\^16"):
        run(lambda runtime: weight(runtime, torch.tensor([[2**31]]), scale=16))
    with pytest.raises(Overflow, match="a weight of inf does not fit"):
        run(lambda runtime: play(runtime, products.own(runtime, torch.tensor([[torch.inf]]), (1, 1), 8)))


def test_lookup_gives_the_rows_of_the_ids():
    table, ids = integers(101, 6), torch.tensor([0, 100, 37, 37])

    def job(runtime):
        return looked_up(runtime, ids, 4, weight(runtime, table))

    outcome = run(job)
    assert torch.equal(reconstruct(outcome), table[ids])
    assert (outcome.results[0].scale, outcome.results[0].width) == (8, 32)


@pytest.mark.parametrize("wrong", [-1, 101])
def test_lookup_refuses_an_id_outside_the_vocabulary(wrong):
    table = integers(101, 6)

    def job(runtime):
        looked_up(runtime, torch.tensor([5, wrong]), 2, weight(runtime, table))

    with pytest.raises(ValueError, match=f"token id {wrong} is not in a vocabulary of 101"):
        run(job)


def test_a_result_that_could_wrap_is_refused_by_name():
    x = torch.ones(2, 2, dtype=torch.int64)

    def refused(message, function, *kinds, **options):
        with pytest.raises(Overflow, match=message):
            product_of(function, *[(x, kind) for kind in kinds], **options)

    narrow = dict(size=24)
    refused(
        r"product: \|x\| < 2\^24 at scale 2\^0 does not fit a share valid modulo 2\^24",
        products.multiply,
        narrow,
        narrow,
    )
    refused("square: ", products.square, narrow)
    refused("sum of squares: ", products.sum_of_squares, narrow, bits=24)
    refused("matrix product: ", products.matmul, narrow, WHOLE, transposed=False, bits=24)
    with pytest.raises(Overflow, match="linear layer: "):
        run(lambda runtime: products.linear(runtime, *wires(runtime, (x, narrow)), weight(runtime, x), bits=16))
    with pytest.raises(Overflow, match="embedding: "):
        run(lambda runtime: play(runtime, products.lookup(runtime, None, 1, weight(runtime, x), bits=24)))


def test_matrix_products_take_exact_wires():
    x = torch.ones(2, 2, dtype=torch.int64)
    with pytest.raises(AssertionError, match="matrix products take exact wires"):
        product_of(products.matmul, (x, LIFTED), (x, NARROW), transposed=False, bits=20)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_a_chain_of_products_and_openings_keeps_its_bounds(data):
    """x * y truncated, times z: off by less than the truncated unit times z, whatever the widths."""
    size = data.draw(st.integers(44, 64), "ring of x")
    cut = data.draw(st.integers(0, 12), "bits dropped")
    lifted = data.draw(st.booleans(), "lifted")
    values = st.lists(st.integers(-(2**12) + 1, 2**12 - 1), min_size=1, max_size=8)
    x = torch.tensor(data.draw(values, "x"))
    y, z = integers(len(x), seed=1), integers(len(x), seed=2, bits=5)

    def job(runtime):
        kinds = dict(size=size), WHOLE
        product = products.multiply(runtime, *wires(runtime, (x, kinds[0]), (y, kinds[1])))
        middle = Opening(product, truncate=cut, lifted=lifted)
        small = Opening(share(runtime, z, bits=5))
        return products.multiply(runtime, *open_wires(runtime, [middle, small]), bits=24 - cut + 6 - (12 - cut))

    outcome = run(job)
    error = reconstruct(outcome).double() - (x * y).double() / 2**cut * z
    assert (error.abs() <= z.abs() * (cut > 0)).all()


def test_results_stay_shares_modulo_their_width():
    """Above a result's width the shares hold nothing that adds up: only the low bits may ever be opened."""
    x = integers(50)
    outcome = product_of(products.multiply, (x, NARROW), (x, NARROW))
    whole = outcome.results[0].share + outcome.results[1].share
    assert torch.equal(signed(whole, 48), x * x) and not torch.equal(whole, x * x)
