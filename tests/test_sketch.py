"""Clients that ask for something else than one row a token are found out, and owners that alter the check."""

import pytest
import torch
from hf_models import tiny
from wire_parties import CLIENT, DEALER, OWNER, run

from crypten_llm import PrivateLlama
from crypten_llm.errors import PartyError
from crypten_llm.protocols import embedding
from crypten_llm.protocols.rounds import Rounds
from crypten_llm.protocols.sketch import NOT_ITS_SUMS, NOT_ONE_ROW, Labels, Sketches

ROWS = 70  # two words of bits, of which the second has some to spare
PASSED = ""
ONE_ROW = embedding.one_hot


def sets(*rows):
    """Words in which the bits of each set are."""
    made = torch.zeros(len(rows), 2, dtype=torch.int64)
    for words, chosen in zip(made, rows, strict=True):
        for row in chosen:
            words[row // 64] ^= torch.tensor(1) << row % 64
    return made


def verdicts(chosen, alter=lambda runtime, sketches: None, times=1):
    """What each party is told of a client that asks for these sets of rows."""

    def job(runtime):
        rounds = Rounds(runtime)
        sketches = Sketches(runtime, rounds)
        value = runtime.held_by(OWNER, torch.ones(ROWS, 3).double())
        table = rounds.run(embedding.own_table(runtime, value, (ROWS, 3), 8, 1))
        told = []
        for _ in range(times):
            hot = runtime.held_by(CLIENT, chosen.clone())
            rounds.run(embedding.look_up(runtime, hot, len(chosen), table, sketches))
            alter(runtime, sketches)
            try:
                rounds.run(sketches.checked())
                told.append(PASSED)
            except PartyError as error:
                told.append(str(error))
        return told

    owner, client, dealer = run(job).results
    assert dealer == [PASSED] * times
    return list(zip(owner, client, strict=True))


def test_one_row_a_token_passes():
    """The first, the last, those beside a word's end, one twice; call after call with the same labels."""
    for row in (0, 1, 63, 64, ROWS - 1):
        assert verdicts(sets([row])) == [(PASSED, PASSED)]
    assert verdicts(sets([3], [3], [69]), times=4) == [(PASSED, PASSED)] * 4


OTHERS = {
    "none": [],
    "twice the same, which is none": [5, 5],
    "two": [5, 64],
    "neighbours": [0, 1],
    "three": [1, 2, 3],
    "three of which one is another's sum": [1, 2, 1 ^ 2],
    "four": [7, 8, 9, 69],
    "five": [0, 10, 20, 30, 40],
    "all": range(ROWS),
    "all but one": range(1, ROWS),
    "a bit beyond the vocabulary": [ROWS],
    "two bits beyond it": [ROWS, 127],
}


@pytest.mark.parametrize("rows", OTHERS.values(), ids=OTHERS)
def test_any_other_set_is_found(rows):
    """Alone, and among tokens that are as they should be. Both are told: to the client it is its own doing."""
    for chosen in (sets(rows), sets([3], rows, [4]), sets([3], [4], rows)):
        assert verdicts(chosen) == [(NOT_ONE_ROW, NOT_ITS_SUMS)]


def test_the_same_wrong_set_twice_does_not_cancel():
    assert verdicts(sets([1, 2], [1, 2])) == [(NOT_ONE_ROW, NOT_ITS_SUMS)]
    assert verdicts(sets([], [])) == [(NOT_ONE_ROW, NOT_ITS_SUMS)]


def test_what_is_beyond_the_vocabulary_counts_for_nothing():
    assert verdicts(sets([3, ROWS])) == [(PASSED, PASSED)]


def test_a_client_cannot_answer_with_the_owners_words():
    """It sends what the owner will tell it; nor does a word of its own choice help."""

    def echoed(runtime, sketches):
        if runtime.held_by(CLIENT, True):
            sketches._words = sketches._words[[1, 1]]

    def chosen(runtime, sketches):
        if runtime.held_by(CLIENT, True):
            sketches._words = torch.zeros(2, dtype=torch.int64)

    for rows in ([1, 2], [1]):
        assert verdicts(sets(rows), alter=echoed)[0][0] == NOT_ONE_ROW
        assert verdicts(sets(rows), alter=chosen)[0][0] == NOT_ONE_ROW


@pytest.mark.parametrize("which", [0, 1])
def test_an_owner_that_alters_its_sums_is_found(monkeypatch, which):
    """A wrong guess of a token: both see it. Its sums are what it guesses with."""
    honest = Labels.sums

    def altered(labels, runtime, chosen):
        found = honest(labels, runtime, chosen)
        if runtime.held_by(OWNER, True):
            found[which] ^= 1
        return found

    monkeypatch.setattr(Labels, "sums", altered)
    assert verdicts(sets([5])) == [(NOT_ONE_ROW, NOT_ITS_SUMS)]


def test_what_is_sent_is_another_each_time():
    """The sums that go to the client and the words of a failed check: uniform, whatever was asked."""

    def job(runtime, labels):
        rounds = Rounds(runtime)
        sketches = Sketches(runtime, rounds)
        held = {OWNER: labels, DEALER: labels}.get(runtime.role)
        bits = torch.zeros(1, 2, dtype=torch.int64)
        sketches.note(held, 1, runtime.held_by(OWNER, bits), runtime.held_by(DEALER, bits))
        rounds.open()
        words = sketches._words.tolist()
        with pytest.raises(PartyError) if runtime.role != DEALER else torch.inference_mode():
            rounds.run(sketches.checked())
        return words

    labels, seen, shown = Labels(torch.zeros(ROWS, 4, dtype=torch.int32), torch.tensor([1])), set(), set()
    for seed in range(40):
        outcome = run(job, labels, seed=seed)
        seen |= {frame.payload for frame in outcome.frames[OWNER] if len(frame.payload) == 16}
        shown |= {mine ^ theirs for mine, theirs in zip(*outcome.results[:2], strict=True)}
        assert outcome.cost() == (2, 16 + 8, 8, 0, 48)
    assert len(seen) == 40 and len(shown) == 80 and 0 not in shown
    assert 0.45 < sum(int.from_bytes(payload).bit_count() for payload in seen) / (40 * 128) < 0.55
    assert 0.45 < sum((word % 2**64).bit_count() for word in shown) / (80 * 64) < 0.55


# Whole sessions: this process is the client, the owner is another.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=1)[0])


@pytest.mark.parametrize("second", [False, True])
def test_a_run_ends_at_the_owner(model, monkeypatch, second):
    """In the prompt, or in a later token. The client passes over its own check, as one that deviates would."""

    def two_rows(ids, count, vocabulary):
        bits = ONE_ROW(ids, count, vocabulary)
        return bits ^ ONE_ROW((ids + 1) % vocabulary, count, vocabulary) if second == (count == 1) else bits

    honest = Sketches.checked

    def ignored(self):
        try:
            yield from honest(self)
        except PartyError:
            pass

    monkeypatch.setattr(embedding, "one_hot", two_rows)
    monkeypatch.setattr(Sketches, "checked", ignored)
    with PrivateLlama.from_pretrained(model, threads=1) as llama:
        tokens = []
        with pytest.raises(PartyError) as ended:
            for event in llama.stream(input_ids=[5, 6, 7], max_new_tokens=3):
                tokens += [event.token_id] if hasattr(event, "token_id") else []
    assert str(ended.value).endswith(f"rank 0 (owner) stopped: {NOT_ONE_ROW}")
    assert len(tokens) == second
