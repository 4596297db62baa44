"""Rows of the owner's table for tokens that the client alone knows, by bits: the private embedding.

Owns ``own_table`` and ``look_up``. A token's row is the xor of the rows that its one-hot vector chooses. The client
sends that vector xor a mask m, one bit an entry of the vocabulary, and the owner xors the rows so chosen. What is too
much, the rows that m chooses, the client xors itself, out of a table hidden by R that it holds since the model was
loaded; and the dealer tells it the same of R, padded. A row so shared by xor is opened behind an xor mask s, C = x xor
s, and bit by bit C_j + (1 - 2 C_j) s_j is linear in bits that the dealer shares modulo what they count for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.opening import Message, Request
from crypten_llm.protocols.points import Points
from crypten_llm.protocols.products import row_blocks
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret
from crypten_llm.protocols.sketch import Labels, Sketches, labels_of
from crypten_llm.roles import CLIENT, OWNER

WIDEST = 31  # bits of an entry


class OwnedTable:
    """A table [V, H] that the owner knows, in entries of ``width`` bits; of fewer than 2^bits, at ``scale``.

    plain: at the owner, entries modulo 2^width. hidden: the same xor R, at the client. mask: R, at the dealer. All are
    int32. R is uniform and used for this table alone, so what the client holds is uniform too. labels: of the rows,
    with which the owner checks what it is asked for; not at the client.
    """

    def __init__(self, shape: tuple[int, int], scale: int, bits: int) -> None:
        self.shape, self.scale, self.bits = shape, scale, bits
        self.plain: Tensor | None = None
        self.hidden: Tensor | None = None
        self.mask: Tensor | None = None
        self.labels: Labels | None = None

    @property
    def width(self) -> int:
        """As many as it takes to lift a row to a wider ring once it has been looked up."""
        return self.bits + self.scale + 2


def own_table(
    runtime: Runtime, value: Tensor | None, shape: tuple[int, int], scale: int, bits: int
) -> Protocol[OwnedTable]:
    """An ``OwnedTable`` of numbers at most 2^bits. value: float [V, H] at the owner, ``None`` elsewhere.

    Reveals: nothing; the client is sent uniform bits. Error: half a unit of ``scale``.
    Cost: the owner sends the client bits + scale + 2 bits an entry, once.
    Raises: Overflow for an entry above 2^bits, which the owner alone can see, and for more than 31 bits.
    """
    table = OwnedTable(shape, scale, bits)
    width = table.width
    if width > WIDEST:
        raise Overflow(f"a table of |x| < 2^{bits} at scale 2^{scale} needs {width} bits an entry; {WIDEST} are held")
    mask = _narrow(runtime.mask_of(OWNER, (shape[0], (shape[1] + 1) // 2)), shape[1], width)
    hidden = None
    if value is not None:
        assert mask is not None, "the owner draws the mask of its table"
        table.plain = torch.empty(shape, dtype=torch.int32, device=runtime.device)
        for rows in row_blocks(value):
            entries = (runtime.moved(value[rows]).double() * 2**scale).round_()
            largest = entries.abs().max()
            if not largest <= 2 ** (width - 2):  # nor NaN
                raise Overflow(f"an entry of {largest / 2**scale:.3g} does not fit a table of |x| < 2^{bits}")
            table.plain[rows] = ring.low_bits(entries.int(), width)
        hidden = mask.bitwise_xor_(table.plain)  # in the place of R, which is of no more use here
    (received,) = yield [Message(OWNER, shape, width, hidden)]
    table.hidden = None if received is None else received.int()
    table.mask = runtime.known_to_dealer(mask)
    table.labels = labels_of(runtime, shape[0])
    return table


def _narrow(words: Tensor | None, columns: int, width: int) -> Tensor | None:
    """Uniform words as int32 below 2^width, two of each."""
    if words is None or words.is_meta:
        return words
    return ring.low_bits(words.view(torch.int32)[:, :columns], width)


def look_up(
    runtime: Runtime,
    hot: Tensor | None,
    count: int,
    table: OwnedTable,
    sketches: Sketches,
    points: Points | None = None,
) -> Protocol[Secret]:
    """Rows [count, H] for tokens that only the client knows; hot: their bits (``one_hot``), on its device; ``None``
    elsewhere. points: of tokens that neither party knows; hot is then the client's part of their bits.

    Whatever bits a client sends choose some set of rows, whose xor it would get. That each set is of one row is noted
    with ``sketches``, to be checked before anything is revealed.

    Reveals: one-hot vectors xor a uniform mask, to the owner; then rows xor a uniform mask, to both.
    Error: none. Cost: 2 rounds; the client sends V bits a token (in whole words), each party b = ``table.width`` bits
    an element; dealer b bits an element, and b (b + 1) / 2; and a sketch (``Sketches.note``), in these rounds. With
    points, ``points.size`` bytes a token more of the client's.
    Source: private information retrieval by xor (Chor et al., FOCS 1995) with a second database that is hidden;
    daBits (Rotaru and Wood, INDOCRYPT 2019), dealt modulo what each bit counts for.
    """
    (vocabulary, hidden), width, kernels = table.shape, table.width, runtime.kernels
    shape, words = (count, hidden), (count, ring.limbs(vocabulary))
    mask = runtime.mask_of(CLIENT, words)
    asked = None
    if hot is not None:
        assert mask is not None, "the client draws the mask of its tokens"
        asked = mask ^ hot
    messages: list[Request] = [Message(CLIENT, words, 64, asked)]
    if points is not None:
        messages.append(Message(CLIENT, (count, points.size), 8, points.sent))
    seen, *keys = yield messages
    if points is not None and points.read is not None:
        seen = seen ^ points.read(keys[0])

    def rows(entries: Tensor | None, chosen: Tensor | None) -> Tensor:
        assert entries is not None and chosen is not None, "who xors rows has the table and the choice"
        return kernels.xor_rows(entries, chosen).long()

    def padded(pad: Tensor) -> Tensor:
        return pad ^ kernels.pack(rows(table.mask, mask), width)

    pad = runtime.deal_table((ring.packed_size(count * hidden, width),), 8, padded)

    def own(entries: Tensor | None, chosen: Tensor | None) -> Tensor:
        assert pad is not None, "parties have their parts of what pads a row"
        return rows(entries, chosen) ^ kernels.unpack(pad, width, shape)

    sketches.note(table.labels, count, runtime.held_by(OWNER, seen), runtime.known_to_dealer(mask))
    share = runtime.share(shape, lambda: own(table.plain, seen), lambda: own(table.hidden, mask))
    return (yield from _as_words(runtime, share, table))


def _as_words(runtime: Runtime, share: Tensor, table: OwnedTable) -> Protocol[Secret]:
    """Additive shares of what xor shares of ``table.width`` bits stand for: [...] to [...]."""
    width, shape = table.width, tuple(share.shape)
    masks = [runtime.mask_of(party, shape) for party in (OWNER, CLIENT)]
    known = [mask for mask in masks if mask is not None]  # a party's own; the dealer's both
    sent = runtime.share(shape, lambda: ring.low_bits(share ^ known[0], width))
    received = yield [Message(party, shape, width, runtime.held_by(party, sent)) for party in (OWNER, CLIENT)]
    flips = []
    for j in range(width):

        def bit(j: int = j) -> Tensor:
            return (known[0] ^ known[1]) >> j & 1

        flips.append(runtime.deal(shape, bit, width - j).held)

    def words() -> Tensor:
        (theirs,) = (part for part in received if part is not None)
        opened = sent ^ theirs
        total = runtime.plus(torch.zeros_like(opened), opened)
        for j, flip in enumerate(flips):
            total += (1 - 2 * (opened >> j & 1)) * flip << j
        return total

    return Secret(runtime.share(shape, words), table.scale, width, table.bits)


def one_hot(ids: Tensor, count: int, vocabulary: int) -> Tensor:
    """Words [count, V / 64 rounded up] in which the bit of each token is set. Raises: ValueError for an id outside the
    vocabulary.
    """
    assert len(ids) == count, f"{len(ids)} token ids, {count} announced"
    for token in ids.tolist():
        if not 0 <= token < vocabulary:
            raise ValueError(f"token id {token} is not in a vocabulary of {vocabulary}")
    hot = torch.zeros(count, ring.limbs(vocabulary), dtype=torch.int64)
    hot[torch.arange(count), ids // 64] = torch.ones_like(ids) << ids % 64
    return hot
