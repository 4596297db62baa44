"""The private embedding by bits: rows to the last bit for every shape, what it costs, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import CLIENT, OWNER, check_cost, joined, open_wires, play, run

from crypten_llm.kernels import places
from crypten_llm.kernels.ring import packed_size
from crypten_llm.protocols.embedding import look_up, one_hot, own_table
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Rounds
from crypten_llm.protocols.secret import Overflow, as_secret
from crypten_llm.protocols.sketch import Sketches


def numbers(shape, bits, scale, seed=0):
    """A table with both ends of what it may hold in front: whole units."""
    top = 2 ** (bits + scale)
    units = torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor([top, -top, 0, 1, -1])[: units.numel()]
    units.view(-1)[: len(ends)] = ends
    return units.double() / 2**scale


def held(runtime, value, bits, scale):
    return play(runtime, own_table(runtime, runtime.held_by(OWNER, value), tuple(value.shape), scale, bits))


def rows(runtime, ids, table):
    rounds = Rounds(runtime)
    sketches = Sketches(runtime, rounds)
    hot = runtime.held_by(CLIENT, one_hot(ids, len(ids), table.shape[0]))
    return rounds.run(look_up(runtime, hot, len(ids), table, sketches))


def looked_up(value, ids, bits, scale):
    """The rows that the parties share, as numbers."""
    outcome = run(lambda runtime: rows(runtime, ids, held(runtime, value, bits, scale)))
    owner, client, dealer = outcome.results
    assert (owner.scale, owner.width, owner.bits) == (scale, bits + scale + 2, bits)
    assert dealer.shape == owner.shape == (len(ids), value.shape[1])
    return joined(owner, client).double() / 2.0**scale


@pytest.mark.parametrize(("bits", "scale"), [(0, 0), (1, 16), (3, 5), (-2, 16), (5, 24)])
@pytest.mark.parametrize("count", [1, places._WORTH_SUMMING - 1, places._WORTH_SUMMING, 40])
def test_rows_are_exact(bits, scale, count):
    """Both ends of the table's range, the first and the last token, the same one twice."""
    value = numbers((130, 11), bits, scale)
    ids = torch.cat([torch.tensor([129, 0, 0, 64, 63]), torch.arange(40) * 7 % 130])[:count]
    assert torch.equal(looked_up(value, ids, bits, scale), value[ids])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 25), st.integers(0, 1000))
def test_any_shape(vocabulary, hidden, count, seed):
    value = numbers((vocabulary, hidden), 1, 9, seed)
    ids = torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(looked_up(value, ids, 1, 9), value[ids])


def test_every_token_of_a_vocabulary():
    value = numbers((97, 5), 2, 13)
    assert torch.equal(looked_up(value, torch.arange(97), 2, 13), value)


def test_entries_are_rounded_to_the_nearest_unit():
    value = torch.tensor([[0.3, -0.3, 0.74, -0.76]])
    assert looked_up(value, torch.tensor([0]), 1, 1).tolist() == [[0.5, -0.5, 0.5, -1.0]]


def test_a_table_serves_many_lookups():
    value, asked = numbers((70, 6), 1, 12), [torch.tensor([3, 69]), torch.tensor([3]), torch.tensor([0, 1, 2])]

    def job(runtime):
        table = held(runtime, value, 1, 12)
        return [rows(runtime, ids, table) for ids in asked]

    owner, client, _ = run(job).results
    for mine, theirs, ids in zip(owner, client, asked, strict=True):
        assert torch.equal(joined(mine, theirs).double() / 2**12, value[ids])


def test_rows_have_room_to_be_lifted():
    """Both ends too: that is what the two bits beyond the table's range are for."""
    value, ids = numbers((70, 6), 1, 16), torch.tensor([0, 69, 1])

    def job(runtime):
        found = rows(runtime, ids, held(runtime, value, 1, 16))
        (wire,) = open_wires(runtime, [Opening(found, lifted=64)])
        return as_secret(runtime, wire)

    owner, client, _ = run(job).results
    assert torch.equal(joined(owner, client).double() / 2**16, value[ids])


@pytest.mark.parametrize(("vocabulary", "hidden", "count"), [(130, 16, 3), (128, 8, 20), (1, 24, 1)])
def test_cost(vocabulary, hidden, count):
    """19 bits an entry, as SmolLM2's: 209 dealt ones an element. Of the sketch 16 bytes a token, 48 dealt."""
    value, ids = numbers((vocabulary, hidden), 1, 16), torch.zeros(count, dtype=torch.int64)
    handed, opened = packed_size(vocabulary * hidden, 19), packed_size(count * hidden, 19)
    asked = 8 * count * -(-vocabulary // 64)
    dealt = packed_size(count * hidden, 19 + 19 * 20 // 2) + 48 * count
    # The table is a round for the client, the choice one for the owner, the opening one for both.
    declared = (2, handed + opened + 16 * count, asked + opened, 0, dealt)
    check_cost(lambda runtime: rows(runtime, ids, held(runtime, value, 1, 16)), declared)


def refused(error, message, value, ids, bits=1, scale=16):
    with pytest.raises(error, match=message):
        looked_up(value, torch.tensor(ids), bits, scale)


def test_what_is_refused():
    value = torch.ones(5, 3)
    refused(ValueError, "token id 5 is not in a vocabulary of 5", value, [5])
    refused(ValueError, "token id -1 is not in a vocabulary of 5", value, [0, -1])
    refused(Overflow, r"an entry of 2.1 does not fit a table of \|x\| < 2\^1", 2.1 * value, [0])
    refused(Overflow, "an entry of nan does not fit", value * float("nan"), [0])
    refused(Overflow, r"a table of \|x\| < 2\^6 at scale 2\^24 needs 32 bits an entry; 31 are held", value, [0], 6, 24)
