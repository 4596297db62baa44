"""Products of wires against the same products of plain integers, modulo the width that the result declares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import joined, open_wires, play, reconstruct, run, share, signed

from crypten_llm.kernels import ring
from crypten_llm.kernels.ring import packed_size
from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Overflow
from crypten_llm.roles import CLIENT, DEALER, OWNER

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


@st.composite
def wire_kinds(draw, bits):
    """Rings in which |x| < 2^bits can be opened, exact or lifted to any that is wider: by one bit, to a word."""
    size = draw(st.integers(bits + 2, 64), "ring")
    return dict(size=size, lifted=draw(st.sampled_from([0, *range(size + 1, 65)]), "lifted"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_products_in_rings_of_any_size(data):
    """Every sum of a wrap bit's power of two and the result's width, from those that leave nothing of it."""
    bits = data.draw(st.integers(1, 12), "bits")
    left, right = (data.draw(wire_kinds(bits), side) for side in ("left", "right"))
    x, y = integers(3, 40, bits=bits), integers(40, seed=1, bits=bits)
    width = min(max(kind.values()) for kind in (left, right))

    def job(runtime):
        sizes = [(x, left["size"], left["lifted"]), (y, right["size"], right["lifted"])]
        opened = [Opening(share(runtime, z, width=size, bits=bits), lifted=wide) for z, size, wide in sizes]
        first, second = open_wires(runtime, opened)
        made = {"product": products.multiply(runtime, first, second, bits=min(2 * bits, width - 2))}
        if 2 * bits < first.width:
            made["square"] = products.square(runtime, first)
        if 2 * bits + 6 < second.width:
            made["sum"] = products.sum_of_squares(runtime, second, bits=2 * bits + 6)
        return made

    owner, client, _ = run(job).results
    expected = {"product": x * y, "square": x * x, "sum": (y * y).sum(-1, keepdim=True)}
    for name, mine in owner.items():
        assert torch.equal(joined(mine, client[name]), signed(expected[name], mine.width)), name
    assert owner["product"].width == width


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


def test_linear_of_truncated_wires():
    """They are valid modulo as many bits less, and so is the product: multiples of what is dropped come out exact."""
    x, w = integers(3, 16, bits=20), integers(4, 16, seed=1)

    def job(runtime):
        matrix = weight(runtime, w)
        (wire,) = open_wires(runtime, [Opening(share(runtime, x * 2**10, width=50), truncate=10)])
        return products.linear(runtime, wire, matrix, bits=30)

    outcome = run(job)
    assert torch.equal(reconstruct(outcome), x @ w.t()) and outcome.results[0].width == 40


@pytest.mark.parametrize("extreme", [2**31 - 1, 1 - 2**31])
def test_the_largest_weights_are_held_exactly(extreme):
    def job(runtime):
        matrix = weight(runtime, torch.tensor([[extreme]]), scale=0)
        return products.linear(runtime, *wires(runtime, (torch.tensor([[3]]), WHOLE)), matrix, bits=40)

    assert reconstruct(run(job)).item() == 3 * extreme


@pytest.mark.parametrize("shape", [(1, 7), (products.BLOCK // 600 + 1, 600), (3, products.BLOCK + 1)])
def test_weights_are_made_integers_in_any_number_of_blocks(shape):
    """What both parties hold of a weight, and the dealer of its mask, with a factor for each column."""
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factors = torch.linspace(-3, 3, shape[1], dtype=torch.float64)

    def job(runtime):
        given = runtime.held_by(OWNER, value)
        return play(runtime, products.own(runtime, given, shape, 12, 46, factors))

    owner, client, dealer = run(job).results
    expected = (value.double() * factors * 2**12).round().long()
    assert torch.equal(owner.plain.long(), expected)
    assert torch.equal(ring.low_bits(client.hidden + dealer.mask, 46), ring.low_bits(expected, 46))
    lengths = products.row_lengths(value, factors)
    torch.testing.assert_close(lengths, (value.double() * factors).norm(dim=1))


def test_a_weight_that_32_bits_do_not_hold_is_refused():
    with pytest.raises(Overflow, match=r"a weight of 3.28e\+04 does not fit 32 bits at scale 2\^16"):
        run(lambda runtime: weight(runtime, torch.tensor([[2**31]]), scale=16))
    with pytest.raises(Overflow, match="a weight of inf does not fit"):
        run(lambda runtime: weight(runtime, torch.tensor([[torch.inf]])))


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


DROPS = pytest.mark.parametrize("dropped", [0, 3, 4, 5, 20, 46])


def check_dropped(outcome, expected, dropped, dealt=1):
    """Each dealt product is off by a 32nd of what is left after ``dropped`` bits; by nothing where none is left out."""
    error = reconstruct(outcome) - expected
    assert error.abs().max() <= (0 if dropped <= 4 else dealt * 2 ** (dropped - 5))
    assert dropped <= 4 or error.any()


@DROPS
@pytest.mark.parametrize(("left", "right"), [("narrow", "narrow"), ("narrow", "lifted"), ("lifted", "lifted")])
def test_products_whose_low_bits_will_be_dropped(left, right, dropped):
    x, y = integers(30, 40), integers(30, 40, seed=1)
    outcome = product_of(products.multiply, (x, KINDS[left]), (y, KINDS[right]), dropped=dropped)
    check_dropped(outcome, x * y, dropped, 2 ** (left, right).count("lifted"))


@DROPS
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_products_whose_low_bits_will_be_dropped(transposed, dropped):
    x, y = integers(2, 9, 7), integers(2, 7, 8, seed=1)
    inputs = (x, NARROW), (y.transpose(-1, -2).contiguous() if transposed else y, WHOLE)
    outcome = product_of(products.matmul, *inputs, transposed=transposed, bits=27, dropped=dropped)
    check_dropped(outcome, x @ y, dropped)


@DROPS
def test_linear_layers_whose_low_bits_will_be_dropped(dropped):
    x, w = integers(9, 33), integers(20, 33, seed=1)

    def job(runtime):
        matrix = weight(runtime, w)
        return products.linear(runtime, *wires(runtime, (x, NARROW)), matrix, bits=24, dropped=dropped)

    check_dropped(run(job), x @ w.t(), dropped)


@pytest.mark.parametrize("dropped", [0, 9])
@pytest.mark.parametrize("share_of_entries", [0.0, 0.5, 1.0])
def test_entries_that_nobody_reads_are_not_dealt(share_of_entries, dropped):
    """Visible ones are right, wherever they are."""
    x, y = integers(3, 9, 7), integers(3, 11, 7, seed=1)
    visible = torch.rand((3, 9, 11), generator=torch.Generator().manual_seed(0)) < share_of_entries
    outcome = product_of(
        products.matmul, (x, NARROW), (y, NARROW), transposed=True, bits=27, dropped=dropped, visible=visible
    )
    error = (reconstruct(outcome) - x @ y.mT)[visible]
    assert (error.abs() <= (2 ** (dropped - 5) if dropped else 0)).all()
    assert outcome.sent(DEALER, CLIENT) == packed_size(int(visible.sum()), 48 - max(0, dropped - 4))


@pytest.mark.parametrize("bits", [40, 48, 64])
def test_weights_that_are_handed_over_in_the_bits_of_their_rings(bits):
    x, w = integers(4, 33), integers(20, 33, seed=1)

    def job(runtime):
        plain = w.double() if runtime.role == OWNER else None
        matrix = play(runtime, products.own(runtime, plain, w.shape, 0, bits))
        (wire,) = wires(runtime, (x, dict(size=min(bits, 48))))
        return products.linear(runtime, wire, matrix, bits=30)

    outcome = run(job)
    assert torch.equal(reconstruct(outcome), x @ w.t())
    assert len(outcome.frames[OWNER][0].payload) == packed_size(w.numel(), bits)


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
    lifted = data.draw(st.sampled_from([0, *range(26, 65)]), "lifted")
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
