"""Whether a client asked for one row a token: a sketch of what it sent, checked before anything is revealed.

Owns ``Labels`` and ``Sketches``: a step against clients that deviate. One that follows the program passes always.

A client sends bits A xor m, which with the mask m, known to the dealer too, are a set A of rows (``embedding``). Each
row v has a secret label r_v, uniform in GF(2^64), which the owner and the dealer know. The owner adds up what belongs
to the bits of A xor m, the dealer what belongs to those of m. Together these are sums over A,

    z = sum of r_v,   t = sum of (r_v^3 + kappa),   F = z^3 + t + kappa,

and F = 0 where A is one row. For any other set F is a polynomial of degree 3 in the labels and the secret kappa, and
not a constant one: of an even number of rows kappa is left, of two rows u and v the term r_u^2 r_v. So F is a
number that a client expects with probability 3 / 2^64 at most (Schwartz and Zippel).

The owner sends its sums behind masks, w = z + a and y = t + b. F, times a secret factor rho of every token, is then
linear in what the dealer shares:

    rho F = [rho] (w^3 + y) + [rho a] w^2 + [rho a^2] w + [rho (a^3 + b + kappa)].

A party's shares for all tokens add up to one word, which equals the other party's if all F are 0, and else differs
from it by a uniform one. The client tells the owner its word. The same with other factors goes the other way: an owner
might alter w and y so that F is 0 for the token that it guesses, and would else be the only one to see the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crypten_llm.errors import PartyError
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.flags import TELLS, Gathered, differ, folded
from crypten_llm.protocols.opening import Message
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.roles import CLIENT, OWNER

NOT_ONE_ROW = (
    "rank 1 (client) asked for something else than one row of the embedding for each of its tokens; the run ends here, "
    "before its next logits: ask the client for an unchanged program, and start all parties again"
)
NOT_ITS_SUMS = (
    "rank 0 (owner) answered the check of the client's tokens with other numbers than this program gives; the run ends "
    "here: ask the owner for an unchanged program, and start all parties again"
)
_FAILED = (NOT_ONE_ROW, NOT_ITS_SUMS)  # what it means that a share differs which the client tells, or the owner


@dataclass(frozen=True)
class Labels:
    """What the rows of a table are called in sketches. words: int32 [V, 4], r_v and r_v^3 + kappa in halves."""

    words: Tensor
    kappa: Tensor

    def sums(self, runtime: Runtime, chosen: Tensor) -> Tensor:
        """Words [2, T]: z and t of the rows whose bits are set in words [T, V / 64 rounded up]."""
        halves = runtime.kernels.xor_rows(self.words, chosen)
        return halves.flatten().view(torch.int64).view(-1, 2).t().contiguous()


def labels_of(runtime: Runtime, rows: int) -> Labels | None:
    """Fresh ones, for as long as the table is held; ``None`` at the client, and where only shapes are counted.

    They may serve all its sketches: nothing that a client sees depends on them but that it passed.
    """
    drawn = runtime.mask_of(OWNER, (rows + 1,))
    if drawn is None or drawn.is_meta:
        return None
    times, label, kappa = runtime.kernels.multiply_field, drawn[:-1], drawn[-1:]
    cubes = times(times(label, label), label)
    return Labels(torch.stack([label, cubes ^ kappa], 1).view(torch.int32), kappa)


class Sketches(Gathered):
    """One role's words of what has been asked for since they were last checked."""

    def note(self, labels: Labels | None, count: int, seen: Tensor | None, mask: Tensor | None) -> None:
        """What a client asked for: bits xor a mask, words [count, V / 64 rounded up]; the sums go with the next
        message. seen: the bits so hidden, at the owner. mask: at the dealer.

        Reveals: two words xor uniform ones a token, to the client. Error: any other set than one row passes with
        probability 2^-62 at most. Cost: no round of its own; the owner sends 16 bytes a token, dealer 48.
        Source: sketches of one-hot vectors (Boyle et al., CCS 2016; Boneh et al., S&P 2021), of bits shared by xor, and
        therefore with cubes where those have squares, which are linear here.
        """
        self._rounds.start(self._noted(labels, count, seen, mask))

    def _noted(self, labels: Labels | None, count: int, seen: Tensor | None, mask: Tensor | None) -> Protocol[None]:
        runtime, times = self._runtime, self._runtime.kernels.multiply_field
        hiding = runtime.mask_of(OWNER, (2, count))
        owner, client = (runtime.mask_of(party, (len(TELLS), 1, count)) for party in (OWNER, CLIENT))

        def dealt(words: Tensor) -> Tensor:
            assert labels is not None and mask is not None and hiding is not None, "the dealer knows what hides"
            assert owner is not None and client is not None, "and both parts of the factors"
            a, b = labels.sums(runtime, mask) ^ hiding
            square = times(a, a)
            return words ^ times(owner ^ client, torch.stack([a, square, times(square, a) ^ b ^ labels.kappa]))

        def hidden() -> Tensor:
            assert labels is not None and seen is not None and hiding is not None, "the owner was asked"
            return labels.sums(runtime, seen) ^ hiding

        shared = runtime.deal_table((len(TELLS), 3, count), 64, dealt)
        sent = None if seen is None else hidden()
        (received,) = yield [Message(OWNER, (2, count), 64, sent)]
        sums = sent if received is None else received
        own = client if owner is None else owner
        if sums is None or shared is None or own is None:
            return
        first, second = sums
        square = times(first, first)
        factors = torch.stack([times(square, first) ^ second, square, first])
        terms = torch.cat([times(torch.cat([own, shared[:, :2]], 1), factors), shared[:, 2:]], 1)
        self._words = self._words ^ folded(terms.flatten(1))[:, 0]

    def checked(self) -> Protocol[None]:
        """Whether all that was noted was one row a token; forgets it.

        Reveals: that, to each party; nothing while both follow the program, for it is so. Cost: 1 round of 8 bytes each
        way. Raises: PartyError, at the owner where it was not, at the client where the owner's sums were others.
        """
        for is_other, failed in zip((yield from differ(self.take())), _FAILED, strict=True):
            if is_other:
                raise PartyError(failed)
