"""What the wire engine sends looks like noise whatever it hides, depends on no secret, and is never used twice."""

import numpy as np
import pytest
import torch
from wire_parties import CLIENT, DEALER, OWNER, key, open_wires, play, run, share

from crypten_llm.errors import OneTimeError
from crypten_llm.insecure.audit import MaskReused
from crypten_llm.kernels.ring import Comparison, Group, packed_size
from crypten_llm.protocols import fits, products, smooth
from crypten_llm.protocols.dealer.randomness import Stream
from crypten_llm.protocols.embedding import look_up, one_hot, own_table
from crypten_llm.protocols.ladder import below
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Rounds
from crypten_llm.protocols.secret import Secret
from crypten_llm.protocols.sketch import Sketches

COUNT = 4096
EXTREMES = {
    "zeros": torch.zeros(COUNT, dtype=torch.int64),
    "largest": torch.full((COUNT,), 2**20 - 1),
    "smallest": torch.full((COUNT,), 1 - 2**20),
    "ramp": torch.arange(COUNT),
}

# Protocols: what each does with the same integers, and the words that travel.


def ordinary(size, bits=20, **options):
    def job(runtime, integers):
        open_wires(runtime, [Opening(share(runtime, integers, width=size, bits=bits), **options)])

    return job


def function(size):
    def job(runtime, integers):
        secret = share(runtime, integers, scale=size - 5, width=64)
        (wire,) = open_wires(runtime, [Opening(secret, ring=size, function=True)])
        smooth.evaluate(runtime, wire, fits.stored("sigmoid"), 22, bits=1)

    return job


def reopened_product(runtime, integers):
    """A product of a wire with itself and with another, opened again: three openings that hang together."""
    first, second = (share(runtime, integers, bits=20) for _ in range(2))
    wires = open_wires(runtime, [Opening(first), Opening(second, lifted=64, ring=40)])
    open_wires(runtime, [Opening(products.multiply(runtime, *wires))])
    open_wires(runtime, [Opening(products.square(runtime, wires[0]))])


def lifted_products(runtime, integers):
    """Of two lifted wires, and of one with itself, from rings that leave room for each wrap, and for both."""
    wide = [Opening(share(runtime, integers, width=64, bits=20), ring=ring, lifted=64) for ring in (30, 24)]
    first, second = open_wires(runtime, wide)
    open_wires(runtime, [Opening(products.multiply(runtime, first, second))])
    products.square(runtime, first)


def embedded(runtime, integers):
    """A table of 8 by 8 entries of 11 bits."""
    ids = integers.clamp(min=0) % 8
    table = play(runtime, own_table(runtime, runtime.held_by(OWNER, torch.eye(8)), (8, 8), 8, 1))
    rounds = Rounds(runtime)
    hot = runtime.held_by(CLIENT, one_hot(ids, len(ids), 8))
    rounds.run(look_up(runtime, hot, len(ids), table, Sketches(runtime, rounds)))


def weights(runtime, integers):
    value = integers.double().view(64, -1) if runtime.role == OWNER else None
    play(runtime, products.own(runtime, value, (64, COUNT // 64), 0))


PROTOCOLS = {  # what a party that sends anything sends, message by message, in (words, bits of each)
    "truncated opening": (ordinary(37, truncate=9), [[(COUNT, 28)]]),
    "lifted opening": (ordinary(48, truncate=16, lifted=64), [[(COUNT, 32)]]),
    "lifted by one bit": (ordinary(30, lifted=31), [[(COUNT, 30)]]),
    "whole opening": (ordinary(64), [[(COUNT, 64)]]),
    "tiny ring": (lambda runtime, x: ordinary(8, bits=1)(runtime, x % 2), [[(COUNT, 8)]]),
    "function": (function(19), [[(COUNT, 19)]]),
    "products": (reopened_product, [[(COUNT, 64), (COUNT, 40)], [(COUNT, 64)], [(COUNT, 64)]]),
    "lifted products": (lifted_products, [[(COUNT, 30), (COUNT, 24)], [(COUNT, 64)]]),
    "embedding": (embedded, [[(COUNT, 64)], [(8 * COUNT, 11)]]),
    "weights": (weights, [[(COUNT, 64)]]),
}
DEALT = {  # what the dealer sends the client, in order: the bits of the ring that the shares are valid in
    "truncated opening": [],
    "lifted opening": [(2 * COUNT, 64 - 32)],
    "lifted by one bit": [(2 * COUNT, 1)],
    "whole opening": [],
    "tiny ring": [],
    "function": [(2 * fits.stored("sigmoid").modes * COUNT, 64)],
    "products": [(2 * COUNT, 24), (COUNT, 64), (COUNT, 24), (COUNT, 64)],  # lifting, masks, one with a bit, a square
    "lifted products": [
        *[(2 * COUNT, 34), (2 * COUNT, 40)],  # lifting
        *[(COUNT, bits) for bits in (64, 40, 34, 10)],  # masks, each with the other's bit, both bits
        *[(COUNT, 64), (COUNT, 33)],  # the square
    ],
    "embedding": [  # what pads rows, the sketch's, and as bytes the shares of bits
        *[(8 * COUNT, 11), (6 * COUNT, 64), (COUNT * 11 * 12 // 2, 8)]
    ],
}


def words(payload: bytes, bits: int) -> np.ndarray:
    """Words packed to the bit as [words, bytes]; nothing may be left over."""
    assert len(payload) * 8 % bits == 0, f"{len(payload)} bytes are no whole number of words of {bits} bits"
    digits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little").reshape(-1, bits)
    return np.packbits(digits, axis=1, bitorder="little")


def numbers(payload: bytes, bits: int) -> np.ndarray:
    """The same as uint64."""
    rows = words(payload, bits)
    padded = np.zeros((len(rows), 8), np.uint8)
    padded[:, : rows.shape[1]] = rows
    return padded.view(np.uint64)[:, 0]


def packed(words: np.ndarray, bits: int) -> bytes:
    """The inverse: the low bits of uint64 words, one behind the other."""
    digits = np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    return np.packbits(digits[:, :bits], bitorder="little").tobytes()


def cut(payload: bytes, parts: list[tuple[int, int]]) -> list[bytes]:
    """A message's values, one behind the other, by their (words, bits)."""
    sizes = [packed_size(*part) for part in parts]
    assert sum(sizes) == len(payload), f"{len(payload)} bytes, {sizes} expected"
    ends = np.cumsum(sizes)
    return [payload[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def surprise(counts: np.ndarray) -> float:
    """How many standard deviations a chi-square of equal cells is above its mean (5 is one in millions)."""
    expected = counts.sum() / len(counts)
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return ((chi / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5  # Wilson-Hilferty


def kolmogorov(sample: np.ndarray) -> float:
    """sqrt(n) times the largest distance of a sample in [0, 1) from the uniform distribution (2.5: one in 10^5)."""
    ordered = np.sort(sample)
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    return max((ranks[1:] - ordered).max(), (ordered - ranks[:-1]).max()) * len(ordered) ** 0.5


def assert_uniform(payload: bytes, bits: int, what: str) -> None:
    rows = words(payload, bits)
    for position in range(rows.shape[1]):
        free = min(8, bits - 8 * position)
        counts = np.bincount(rows[:, position], minlength=256)
        assert surprise(counts[: 2**free]) < 5, f"{what}: byte {position} is not uniform"
    assert surprise(np.bincount(np.frombuffer(payload, np.uint8), minlength=256)) < 5, f"{what}: bytes are not uniform"
    if bits > 8:  # else the byte has said all
        assert kolmogorov(numbers(payload, bits) / 2.0**bits) < 2.5, what


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)
def test_what_the_parties_send_each_other_is_uniform(name, integers):
    job, messages = PROTOCOLS[name]
    outcomes = [run(job, integers, seed=seed) for seed in range(3)]
    senders = {
        "embedding": {OWNER: [[(8 * 8, 11)], [(2 * COUNT, 64), *messages[-1]]], CLIENT: messages},
        "weights": {OWNER: messages, CLIENT: []},
    }
    for role, due in senders.get(name, {OWNER: messages, CLIENT: messages}).items():
        assert all(len(outcome.frames[role]) == len(due) for outcome in outcomes)
        for position, parts in enumerate(due):
            values = [cut(outcome.frames[role][position].payload, parts) for outcome in outcomes]
            for same, (count, bits) in zip(zip(*values, strict=True), parts, strict=True):
                if count > 8 * 8:  # which is too little to tell
                    assert_uniform(b"".join(same), bits, f"{name} of rank {role}, message {position}")


def received_by(party: int, job, integers, seed: int) -> bytes:
    """The corrections that the dealer sends ``party``."""
    frames = run(job, integers, seed=seed).frames[DEALER]
    return b"".join(frame.payload for frame in frames if frame.target == party)


@pytest.mark.parametrize("name", DEALT)
@pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)
def test_what_the_dealer_sends_is_uniform(name, integers):
    payload = received_by(CLIENT, PROTOCOLS[name][0], integers, seed=5)
    for part, (_, bits) in zip(cut(payload, DEALT[name]), DEALT[name], strict=True):
        assert_uniform(part, bits, name)
    assert received_by(OWNER, PROTOCOLS[name][0], integers, seed=5) == b""


KEYS = Comparison(31, (0, 1 << 8, 1 << 20, 12345), (2, 2, 14, 7), Group(2, 64))


def comparison(runtime, integers):
    """Of each with four thresholds, for two words that are theirs if it is below."""
    (wire,) = open_wires(runtime, [Opening(share(runtime, integers), ring=31, function=True)])
    limbs = (len(integers), 2, 1)
    public = None if wire.public is None else wire.public[:, None]
    ones = torch.ones(limbs, dtype=torch.int64)
    below(runtime, KEYS, public, wire.mask.held[:, None], lambda: ones, lambda: runtime.plus(torch.zeros_like(ones), 1))


@pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)
def test_comparison_keys_are_uniform(integers):
    """Correction words of every level, but for the seeds' cleared bit, and the control bits of every level."""
    outcome = run(comparison, integers)
    assert_uniform(b"".join(frame.payload for frame in outcome.frames[OWNER]), 31, "opening")
    payload = b"".join(frame.payload for frame in outcome.frames[DEALER] if frame.target == OWNER)
    assert payload == b"".join(frame.payload for frame in outcome.frames[DEALER] if frame.target == CLIENT)
    levels, leaves = 31 - 1 - 2, 3
    assert (levels, leaves) == (KEYS.levels, len(KEYS.leaves))
    sizes = [16 * levels, 16 * levels, 16 * leaves, packed_size(levels, 2)]
    assert len(payload) == COUNT * sum(sizes)
    cuts = np.cumsum([COUNT * size for size in sizes])[:-1]
    seeds, values, ends, flags = (part.reshape(COUNT, -1) for part in np.split(np.frombuffer(payload, np.uint8), cuts))
    for level in range(levels):
        words = seeds[:, 16 * level : 16 * level + 16].copy().view(np.uint64)
        assert not (words[:, 0] & 1).any()
        assert_uniform(packed(words[:, 0] >> 1, 63), 63, f"seed corrections of level {level}")
        assert_uniform(words[:, 1].tobytes(), 64, f"seed corrections of level {level}")
        assert_uniform(values[:, 16 * level : 16 * level + 16].tobytes(), 64, f"value corrections of level {level}")
        counts = np.bincount(flags[:, level // 4] >> 2 * (level % 4) & 3, minlength=4)
        assert surprise(counts) < 5, f"control bits of level {level}"
    for leaf in range(leaves):
        assert_uniform(ends[:, 16 * leaf : 16 * leaf + 16].tobytes(), 64, f"corrections of leaf {leaf}")


def test_statistics_notice_what_is_not_uniform():
    """The checks above can fail: a mask one bit short, a value left bare, a biased byte."""
    generator = np.random.default_rng(0)
    short = generator.integers(0, 2**36, COUNT, dtype=np.uint64)
    with pytest.raises(AssertionError, match="byte 4 is not uniform"):
        assert_uniform(packed(short, 37), 37, "short mask")
    with pytest.raises(AssertionError, match="no whole number of words of 37 bits"):
        assert_uniform(bytes(37 * 512 + 1), 37, "more than words")
    with pytest.raises(AssertionError, match="32768 bytes"):
        cut(bytes(8 * COUNT), [(COUNT, 37)])
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform(EXTREMES["ramp"].numpy().tobytes(), 64, "bare")
    sums = (generator.random((COUNT, 2)).sum(1) / 2 * 2.0**53).astype(np.uint64)
    with pytest.raises(AssertionError):
        assert_uniform(sums.tobytes(), 64, "sum of two")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_two_inputs_give_transcripts_of_one_kind(name):
    """Byte by byte, the counts of two inputs differ no more than two samples of one distribution do."""
    job, _ = PROTOCOLS[name]
    first, second = (run(job, EXTREMES[kind], seed=seed) for seed, kind in enumerate(("zeros", "largest")))
    for role in range(3):
        ours, theirs = first.frames[role], second.frames[role]
        assert [(f.target, f.kind, len(f.payload)) for f in ours] == [
            (f.target, f.kind, len(f.payload)) for f in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            counts = [np.bincount(np.frombuffer(f.payload, np.uint8), minlength=256) for f in (one, other)]
            both = sum(counts)
            used = both > 0
            chi = ((counts[0] - counts[1]) ** 2)[used] / both[used]
            freedom = used.sum() - 1
            assert chi.sum() < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", [*PROTOCOLS, "comparison"])
def test_the_same_seed_hides_different_values_behind_the_same_traffic(name):
    """Rounds, messages and sizes are the same for every input; so is each of the dealer's, bit by bit.

    What the dealer sends follows from its keys alone: it has no input.
    """
    job = comparison if name == "comparison" else PROTOCOLS[name][0]
    outcomes = [run(job, integers) for integers in EXTREMES.values()]
    for outcome in outcomes[1:]:
        assert outcome.cost() == outcomes[0].cost()
        assert outcome.frames[DEALER] == outcomes[0].frames[DEALER]
        for role in (OWNER, CLIENT):
            mine, first = outcome.frames[role], outcomes[0].frames[role]
            assert [len(frame.payload) for frame in mine] == [len(frame.payload) for frame in first]


@pytest.mark.parametrize("name", [*PROTOCOLS, "comparison"])
def test_nothing_is_sent_to_the_dealer(name):
    outcome = run(comparison if name == "comparison" else PROTOCOLS[name][0], EXTREMES["ramp"])
    assert not [frame for role in (OWNER, CLIENT) for frame in outcome.frames[role] if frame.target == DEALER]
    assert all(frame.kind == "stream" for frame in outcome.frames[DEALER])


# Masks are used once.


def twice(runtime, forget: bool):
    for value in (1, 2):
        if forget:
            runtime._begun.clear()
        runtime.begin("twice")
        open_wires(runtime, [Opening(share(runtime, torch.tensor([value])))])


def test_a_section_is_begun_once():
    with pytest.raises(OneTimeError, match="section 'twice' is begun twice: it would use its masks twice"):
        run(twice, False)


def test_the_audit_detects_a_section_that_was_begun_before():
    with pytest.raises(MaskReused, match="bytes 0 to 8 of the stream of section 'twice' were used before"):
        run(twice, True)


def test_a_stream_that_starts_over_is_detected():
    def job(runtime):
        open_wires(runtime, [Opening(share(runtime, torch.tensor([1])))])
        for stream in runtime._streams:
            stream.position = 0
        open_wires(runtime, [Opening(share(runtime, torch.tensor([2])))])

    with pytest.raises(MaskReused):
        run(job)


def test_sections_that_follow_each_other_share_no_mask():
    def job(runtime):
        for label in ("request 1 token 0", "request 1 token 1", "request 2 token 0"):
            runtime.begin(label)
            open_wires(
                runtime, [Opening(share(runtime, EXTREMES["zeros"])), Opening(share(runtime, EXTREMES["zeros"]))]
            )

    outcome = run(job)
    for role in (OWNER, CLIENT):
        words = np.frombuffer(b"".join(frame.payload for frame in outcome.frames[role]), np.uint64)
        assert len(words) == 6 * COUNT == len(np.unique(words))


def test_streams_of_sections_and_of_parties_are_disjoint():
    """4 kilobytes of each of 40 streams hold no 8 bytes twice."""

    def job(runtime):
        mine = []
        for section in range(10):
            runtime.begin(f"section {section}")
            mine += [stream.draw(4096).view(torch.int64) for stream in runtime._streams]
        return mine

    drawn = [words for seed in (0, 1) for words in run(job, seed=seed).results[DEALER]]
    assert len(drawn) == 40
    assert len(torch.cat(drawn).unique()) == 40 * 512


def test_no_word_is_sent_twice_when_everything_is_zero():
    """Secret and shares are zero, so each message is its mask: one used for two openings would be sent twice."""

    def job(runtime):
        zero = runtime.share((COUNT,), lambda: torch.zeros(COUNT, dtype=torch.int64))
        for _ in range(3):
            openings = [Opening(Secret(zero, 0, 64, 1)), Opening(Secret(zero, 0, 64, 1), truncate=8, lifted=64)]
            open_wires(runtime, [*openings, Opening(Secret(zero, 0, 64, 1), function=True)])

    outcome, parts = run(job), [(COUNT, 64), (COUNT, 56), (COUNT, 64)]
    sent = [cut(frame.payload, parts) for role in (OWNER, CLIENT) for frame in outcome.frames[role]]
    assert len(sent) == 2 * 3
    words = np.concatenate([numbers(p, bits) for message in sent for p, (_, bits) in zip(message, parts, strict=True)])
    assert len(words) == 2 * 9 * COUNT == len(np.unique(words))


def test_parties_draw_what_the_dealer_expects():
    """The dealer's whole mask is the sum of the parties' parts, modulo the ring it is opened in."""

    def job(runtime):
        return [runtime.mask((50,), bits) for bits in (8, 37, 64)], runtime.mask_of(0, (3,)), runtime.mask_of(1, (3,))

    (first, own0, hidden1), (second, hidden0, own1), (whole, known0, known1) = run(job).results
    for mine, theirs, both, bits in zip(first, second, whole, (8, 37, 64), strict=True):
        total = mine.held + theirs.held
        assert torch.equal(total if bits == 64 else total & (2**bits - 1), both.held)
        assert mine.client is None and theirs.client is None and torch.equal(both.client, theirs.held)
    assert hidden0 is None and hidden1 is None
    assert torch.equal(own0, known0) and torch.equal(own1, known1)


def test_keys_of_the_parties_are_their_own():
    """Party 1 cannot compute party 0's masks: their streams come from keys that the dealer draws apart."""
    streams = [Stream(key(0, party)).draw(64).tolist() for party in (0, 1)]
    assert streams[0] != streams[1]
    masks = run(lambda runtime: runtime.mask((4,))).results
    assert not torch.equal(masks[0].held, masks[1].held)
