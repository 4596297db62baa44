"""Rows of the owner's table for tokens that only the client knows, by exclusive or.

Owns the table and the look-up. The client asks for a random set of rows, and for the same set with its token's row more
or less: the exclusive or of the two answers is that row. What the owner sees is uniform; the other answer the client
computes itself, from the table behind a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crypten_llm.kernels.ring import low_bits
from crypten_llm.protocols.dealer.roles import Runtime
from crypten_llm.protocols.opening import Message, Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret
from crypten_llm.roles import CLIENT, OWNER

WORD = 64  # rows that one word of a set tells of
HELD = 32  # bits of what holds an entry
PIECE = 1 << 22  # entries that are sent at a time


@dataclass
class OwnedTable:
    """bits: of an entry, which has ``scale`` fractional ones, modulo 2^bits. held: int32 [V, H]: at the owner the
    entries, at the client these xor a mask, at the dealer the mask (``None`` where nothing is computed).
    """

    shape: torch.Size
    scale: int
    bits: int
    held: Tensor | None


def own_table(
    runtime: Runtime, value: Tensor | None, shape: Sequence[int], scale: int, bits: int
) -> Protocol[OwnedTable]:
    """value: float [V, H] at the owner, ``None`` elsewhere.

    Reveals: the table xor a mask that is used for nothing else, to the client. Cost: ``bits`` an entry, once.
    Raises: Overflow for an entry that does not fit, with room to be lifted.
    """
    rows, hidden = shape
    if value is not None and not value.abs().max() < 2.0 ** (bits - 2 - scale):  # nor NaN
        raise Overflow(
            f"an entry of the embedding is {value.abs().max():.3g}, and {bits} bits hold them below "
            f"{2.0 ** (bits - 2 - scale):.3g}"
        )
    step, parts = max(1, PIECE // hidden), []
    for start in range(0, rows, step):
        piece = (min(step, rows - start), hidden)
        mask = runtime.mask_of(OWNER, piece)
        words = None
        if value is not None:
            assert mask is not None, "the owner draws the mask of its table"
            own = low_bits((value[start : start + step].double() * 2**scale).round().long(), bits)
            words = own ^ mask
        (hidden_words,) = yield [Message(OWNER, piece, bits, words)]
        parts.append(own if value is not None else mask if hidden_words is None else hidden_words)
    return OwnedTable(torch.Size(shape), scale, bits, _joined(parts, bits))


def _joined(parts: list[Any], bits: int) -> Tensor | None:
    if parts[0] is None or parts[0].is_meta:
        return None
    return torch.cat([low_bits(part, bits).to(torch.int32) for part in parts])


def look_up(runtime: Runtime, ids: Tensor | None, count: int, table: OwnedTable) -> Protocol[Secret]:
    """The rows of ``count`` token ids, which only the client holds (``None`` elsewhere): [count, H] modulo 2^bits.

    Reveals: to the owner, a set of rows that is uniform; to both, each entry's bits xor a fresh mask. Error: none.
    Cost: 2 rounds; a token V bits from the client; an entry, of b bits, b each way, and dealer 32 + b (b + 1) / 2.
    Raises: ValueError for an id that is not in the vocabulary.
    Source: two-server private information retrieval (Chor et al., FOCS 1995), with the second server's copy masked and
    its answer corrected by the dealer; bits to integers as in ABY's B2A (NDSS 2015), with the dealer's bits.
    """
    vocabulary, hidden = table.shape
    shape, bits, kernels = (count, hidden), table.bits, runtime.kernels
    size = (count, -(-vocabulary // WORD))
    random = runtime.mask_of(CLIENT, size)
    asked = None
    if ids is not None:
        assert random is not None, "the client draws its sets"
        assert len(ids) == count, f"{len(ids)} token ids, {count} announced"
        for token in ids.tolist():
            if not 0 <= token < vocabulary:
                raise ValueError(f"token id {token} is not in a vocabulary of {vocabulary}")
        asked = random.clone()
        asked[torch.arange(count), ids // WORD] ^= torch.ones_like(ids) << ids % WORD
    (seen,) = yield [Message(CLIENT, size, WORD, asked)]

    def answer(rows: Tensor | None) -> Tensor:
        assert rows is not None and table.held is not None, "each knows its set and what it holds of the table"
        return kernels.xor_rows(table.held, rows)

    pad = runtime.deal_table(shape, HELD, lambda words: answer(random) ^ words)

    def padded(rows: Tensor | None) -> Tensor:
        assert pad is not None, "both have been given a pad"
        words = (answer(rows) ^ pad).long()
        return (words[..., None] >> torch.arange(bits, device=words.device)) & 1

    own = runtime.share((*shape, bits), lambda: padded(seen), lambda: padded(random))
    (wire,) = yield [Opening(Secret(own, 0, 1, 1), function=True)]
    dealt = [runtime.deal(shape, lambda j=j: wire.mask.held[..., j], bits - j).held for j in range(bits)]  # type: ignore[misc]

    def share() -> Tensor:
        total = torch.zeros(shape, dtype=torch.int64, device=runtime.device)
        for j, flip in enumerate(dealt):
            bit = wire.seen[..., j]
            total += (runtime.plus((1 - 2 * bit) * flip, bit)) << j
        return total

    return Secret(runtime.share(shape, share), table.scale, bits, bits - 2 - table.scale)
