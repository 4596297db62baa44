"""The private embedding: the table's rows, exactly, for tokens that the owner does not see."""

import pytest
import torch
from wire_parties import play, reconstruct, run

from crypten_llm.protocols import embedding
from crypten_llm.protocols.secret import Overflow
from crypten_llm.roles import CLIENT, OWNER

SCALE = 16


def table(rows, hidden, bits, seed=0):
    """Entries of every size that fits, the largest in front."""
    most = 2 ** (bits - 2) - 1
    x = torch.randint(-most, most + 1, (rows, hidden), generator=torch.Generator().manual_seed(seed))
    x.view(-1)[:3] = torch.tensor([most, -most, 0])[: x.numel()]
    return x


def looked_up(runtime, integers, bits, ids):
    value = runtime.held_by(OWNER, integers.double() / 2**SCALE)
    own = play(runtime, embedding.own_table(runtime, value, integers.shape, SCALE, bits))
    asked = runtime.held_by(CLIENT, ids)
    return play(runtime, embedding.look_up(runtime, asked, len(ids), own))


@pytest.mark.parametrize("bits", [19, 22, 31])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (63, 5), (64, 3), (65, 8), (300, 7)])
def test_rows_are_exact(bits, rows, hidden):
    integers = table(rows, hidden, bits)
    for count in (1, 4):
        ids = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(count))
        ids[-1] = rows - 1
        outcome = run(looked_up, integers, bits, ids)
        assert torch.equal(reconstruct(outcome), integers[ids])
        assert outcome.results[0].width == bits and outcome.results[0].scale == SCALE


def test_a_large_table_is_sent_in_pieces(monkeypatch):
    monkeypatch.setattr(embedding, "PIECE", 40)
    integers, ids = table(50, 9, 22), torch.arange(50)
    assert torch.equal(reconstruct(run(looked_up, integers, 22, ids)), integers[ids])


def test_cost_of_a_look_up():
    """2 rounds; a bit a row of the table from the client; of an entry its bits each way, and 32 + b (b + 1) / 2 dealt."""
    rows, hidden, bits, count = 130, 6, 20, 3
    integers, ids = table(rows, hidden, bits), torch.tensor([5, 129, 5])

    def loaded(runtime):
        value = runtime.held_by(OWNER, integers.double() / 2**SCALE)
        play(runtime, embedding.own_table(runtime, value, integers.shape, SCALE, bits))

    before, after = run(loaded).cost(), run(looked_up, integers, bits, ids).cost()
    _, from_owner, from_client, to_owner, to_client = (a - b for a, b in zip(after, before, strict=True))
    assert (before[0], after[0]) == (1, 2), "the table's is one way, and so is the first of a look-up, the other way"
    entries = count * hidden
    packed = entries * bits // 8
    assert before[1] == rows * hidden * bits // 8 and before[2:] == (0, 0, 0)
    assert (from_owner, from_client, to_owner) == (packed, packed + count * 3 * 8, 0)
    assert to_client == entries * 4 + sum(-(-entries * j // 8) for j in range(1, bits + 1))


def test_what_the_owner_sees_is_a_uniform_set():
    """Of one token again and again: half of all rows, its own as often as any other."""
    integers, ids = table(64, 1, 19), torch.full((4_000,), 3)
    frames = [f for f in run(looked_up, integers, 19, ids).frames[CLIENT] if f.target == OWNER]
    (sets,) = [f.payload for f in frames if len(f.payload) == 8 * len(ids)]
    asked = torch.tensor(list(sets), dtype=torch.uint8).view(len(ids), 8)
    bits = torch.stack([asked >> b & 1 for b in range(8)], -1).reshape(len(ids), 64).double()
    assert ((bits.mean(0) - 0.5).abs() < 5 * 0.5 / len(ids) ** 0.5).all()
    assert len(set(map(bytes, asked.numpy()))) == len(ids), "every set is drawn afresh"


def test_what_does_not_fit_is_refused():
    integers = table(4, 2, 22)
    with pytest.raises(Overflow, match=r"an entry of the embedding is 16, and 22 bits hold them below 16"):
        run(looked_up, integers + 1, 22, torch.tensor([0]))
    with pytest.raises(ValueError, match="token id 4 is not in a vocabulary of 4"):
        run(looked_up, integers, 22, torch.tensor([4]))
