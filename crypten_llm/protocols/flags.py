"""Whether anything has left its domain: many secret bits, of which one is shown.

Owns ``Flags``. A flag is a bit that says of one value, or one row, that a protocol's result is wrong; it comes for next
to nothing from what the protocol knows. Flags are gathered into two words, of each of which one party tells the other
its share: the shares are equal if no flag is set, and differ by a uniform word otherwise, so that which, how many and
where stays secret. There are two, so that a party which sends back what it was sent hides nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.opening import Message, Opening
from crypten_llm.protocols.rounds import Protocol, Rounds
from crypten_llm.protocols.secret import Secret, Wire
from crypten_llm.roles import CLIENT, OWNER

TELLS = (CLIENT, OWNER)  # who tells the other its share of each word


class Gathered:
    """One role's shares of words into which something is gathered by xor; each party tells its share of one of them."""

    def __init__(self, runtime: Runtime, rounds: Rounds) -> None:
        self._runtime, self._rounds = runtime, rounds
        self._words = torch.zeros(len(TELLS), dtype=torch.int64, device=runtime.device)

    @property
    def current(self) -> Tensor:
        """The words so far."""
        return self._words

    def take(self) -> Tensor:
        """The words so far; from now on there are new ones."""
        words, self._words = self._words, torch.zeros_like(self._words)
        return words

    def join(self, words: Tensor) -> None:
        """Notes what other words note."""
        self._words = self._words ^ words


class Flags(Gathered):
    """One role's shares of what has been noted since it was last shown."""

    def note(self, bits: Tensor) -> None:
        """XOR shares of flags, words 0 or 1: opened behind a mask with the next message, and noted."""
        self._rounds.start(self._opened(bits))

    def _opened(self, bits: Tensor) -> Protocol[None]:
        (wire,) = yield [Opening(Secret(bits, 0, 1, 1), function=True)]
        self.note_opened(wire)

    def note_opened(self, wire: Wire) -> None:
        """Flags that were opened modulo 2, behind a mask; local.

        Cost: dealer 16 bytes a flag. Error: set flags are not seen with probability 2^-64. Source: a random linear
        combination, as MAC checks are batched in SPDZ (Damgard et al., CRYPTO 2012), of bits with the dealer's factors.
        """
        runtime, count = self._runtime, wire.shape.numel()
        shape = (len(TELLS), count)
        owner, client = (runtime.mask_of(party, shape) for party in (OWNER, CLIENT))

        def times(words: Tensor) -> Tensor:
            assert owner is not None and client is not None, "the dealer knows both factors"
            return ((owner ^ client) * wire.mask.held.reshape(-1)) ^ words

        dealt = runtime.deal_table(shape, 64, times)
        own = client if owner is None else owner
        if wire.public is not None and dealt is not None and own is not None:
            self._words = self._words ^ folded((own * wire.public.reshape(-1)) ^ dealt)[:, 0]

    def any_set(self) -> Protocol[bool]:
        """Whether any flag was set since the last time; at the dealer, who is not told, never.

        Reveals: that one bit, to both parties. Cost: 1 round of 8 bytes each way.
        """
        return any((yield from differ(self.take())))


def differ(words: Tensor) -> Protocol[list[bool]]:
    """Whether this party's share of a word, [2], is another than the one that it is told; of the word that it tells
    itself, and at the dealer, False.

    Reveals: shares of one word to each party. Cost: 1 round of 8 bytes each way.
    """
    own = words.split(1)
    told = yield [Message(party, (1,), 64, word) for party, word in zip(TELLS, own, strict=True)]
    return [theirs is not None and bool((theirs != word).any()) for theirs, word in zip(told, own, strict=True)]


def folded(words: Tensor) -> Tensor:
    """The exclusive or of all words along the last dimension: [..., N] to [..., 1]."""
    while words.shape[-1] > 1:
        half = words.shape[-1] // 2
        rest = words[..., 2 * half :]
        words = torch.cat([words[..., :half] ^ words[..., half : 2 * half], rest], -1)
    return words if words.shape[-1] else words.new_zeros(*words.shape[:-1], 1)
