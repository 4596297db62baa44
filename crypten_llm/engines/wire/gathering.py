"""Products with one-hot rows on engine ``wire``: what a choice attends to is gathered, and put back in its place.

Owns the operations of ``eviction.operations`` that gather and scatter, each with what is declared of it
(``operations``).
Shapes are those of ``eviction.operations.Operations``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.wire.handles import Handle, Picks, Weights, at, roomy, value
from crypten_llm.engines.wire.numbers import bits_for, whole_bytes
from crypten_llm.engines.wire.operations import operation, unit, valued
from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Opening, Request
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret, Wire, shares_of

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.insecure.tracked import Tracked, TrackedEngine
    from eviction.operations import Choice


@operation(bound=lambda engine, out, picks, x: picks.value @ x.error)
def gather(engine: WireEngine, picks: Secret, x: Handle) -> Protocol[Secret]:
    """Error: none. Cost: 1 round; x and, once, the picks, in rings of whole bytes that hold the result; dealer the bits
    of the ring an element of it.
    """
    x = yield from value(engine, x)
    growth = 0 if isinstance(picks, Picks) else bits_for(picks.shape[-1]) + picks.bits - 1
    if isinstance(picks, Picks) and isinstance(x, Picks):  # they will pick something, in a ring that holds it
        return Picks.of((yield from _pick(engine, picks, x, 1, engine.config.mixed_width)))
    return (yield from _pick(engine, picks, x, x.bits + growth))


def _gathered(engine: TrackedEngine, out: Tracked, choice: Choice, scores: Tracked) -> torch.Tensor:
    return engine.twin.gather_scores(valued(choice), scores.error + unit(engine.config.score))


@operation(bound=_gathered)
def gather_scores(engine: WireEngine, choice: Choice, scores: Secret) -> Protocol[Secret]:
    """Error: a unit of the scores that softmax sees, of which it sees no more than it opens, so that only these bits
    are gathered. Cost: that of ``gather`` for [G, k, C] by [G, C, M * size]; none without picks.
    """
    seen = engine.config.exponents.opened
    scores = _as_read(at(engine, scores, engine.config.score), seen)
    parts = [scores[..., engine.runtime.moved(choice.rows)]] if len(choice.rows) else []
    if choice.picks is not None:
        heads, queries, _ = scores.shape
        count, blocks = choice.picks.shape[-2:]
        stretch = scores[..., choice.first : choice.first + blocks * choice.size]
        stretch = stretch.reshape(heads, queries, blocks, choice.size).permute(0, 2, 1, 3)
        stretch = stretch.reshape(heads, blocks, queries * choice.size)
        found = yield from _pick(engine, choice.picks, stretch, 0, seen)
        found = found.reshape(heads, count, queries, choice.size).permute(0, 2, 1, 3)
        parts.append(found.reshape(heads, queries, count * choice.size))
    if len(parts) == 1:
        return parts[0]
    joined = torch.cat([part.share for part in parts], -1)
    return Secret(joined, scores.scale, min(part.width for part in parts), min(part.bits for part in parts))


def _scattered(engine: TrackedEngine, out: Tracked, choice: Choice, weights: Tracked, count: int) -> torch.Tensor:
    """None of its own."""
    return engine.twin.scatter_weights(valued(choice), weights.error, count)


@operation(bound=_scattered)
def scatter_weights(engine: WireEngine, choice: Choice, weights: Weights, count: int) -> Protocol[Weights]:
    """Error: none. ``mix`` divides by the sum.

    Cost: 1 round (none without picks): the G * M * count weights in their ring each way, and the picks where
    ``gather_scores`` has not opened them wide enough; dealer the bits of that ring for each of G * M * C * size.
    """
    runtime, width = engine.runtime, engine.config.mixed_width
    x, shape = weights.dense, torch.Size((*weights.shape[:-1], count))
    rows = runtime.moved(choice.rows)

    def placed(share: torch.Tensor, found: torch.Tensor | None = None) -> torch.Tensor:
        """The weights of public rows at those rows, and of blocks at theirs."""
        made = share.new_zeros(shape).index_add_(-1, rows, share[..., : len(rows)])
        if found is not None:
            made[..., choice.first : choice.first + found.shape[-1]] += found
        return made

    if choice.picks is None:
        share = runtime.share(shape, lambda: placed(x.share))
        return Weights(Secret(share.reshape(-1), x.scale, x.width, x.bits), shape)
    hot = yield from _hot_opening(engine, choice.picks, width)
    wire, *others = yield [Opening(x, ring=width, function=True), *([hot] if hot else [])]
    if hot:
        (choice.picks.opened,) = others
    fixed = len(choice.rows)
    (heads, queries, _), (kept, blocks) = x.shape, choice.picks.shape[-2:]

    def by_block(t: torch.Tensor) -> torch.Tensor:
        chosen = t[..., fixed:].reshape(heads, queries, kept, choice.size).permute(0, 2, 1, 3)
        return chosen.reshape(heads, kept, queries * choice.size)

    found = product(engine, choice.picks.opened.transpose(-1, -2), wire.map(by_block), x.bits)
    found = found.reshape(heads, blocks, queries, choice.size).permute(0, 2, 1, 3).reshape(heads, queries, -1)
    share = runtime.share(shape, lambda: placed(shares_of(runtime, wire), found.share))
    return Weights(Secret(share.reshape(-1), wire.scale, found.width, x.bits), shape)


def _as_read(scores: Secret, opened: int) -> Secret:
    """Scores as softmax reads them: modulo 2^``opened``, whatever their size."""
    return Secret(scores.share, scores.scale, min(scores.width, opened), 0)


def hot_wire(engine: WireEngine, picks: Secret, width: int) -> Protocol[Wire]:
    """One-hot rows as a wire of at least ``width`` bits: opened once."""
    opening = yield from _hot_opening(engine, picks, width)
    if opening is not None:
        (picks.opened,) = yield [opening]
    assert picks.opened is not None, "what is wide enough already has been opened"
    return picks.opened


def _hot_opening(engine: WireEngine, picks: Secret, width: int) -> Protocol[Opening | None]:
    if picks.opened is not None and picks.opened.width >= width:
        return None
    picks = yield from roomy(engine, picks, 0, "gather", width=width)
    return Opening(picks, ring=min(picks.width, max(width, engine.config.mixed_width)))


def _pick(engine: WireEngine, picks: Secret, x: Secret, bits: int, width: int = 0, spare: int = 2) -> Protocol[Secret]:
    """picks @ x, valid modulo 2^width at least; what has not been opened is opened together.

    bits: of the result. spare: bits of room beside it; 1 is for the sign, and no less than 2 can be lifted.
    """
    x = yield from roomy(engine, x, max(0, bits - x.bits), "gather", width)
    size = min(x.width, whole_bytes(max(width, bits + x.scale + spare)))
    unopened = x.opened is None or x.opened.width < size
    hot = yield from _hot_opening(engine, picks, size)
    openings: list[Request] = [Opening(x, ring=size, function=True)] if unopened else []
    openings += [hot] if hot else []
    wires = (yield openings) if openings else []
    if hot:
        picks.opened = wires[-1]
    wire = wires[0] if unopened else x.opened
    assert picks.opened is not None and wire is not None, "both have been opened"
    return product(engine, picks.opened, wire, bits)


def product(engine: WireEngine, hot: Wire, x: Wire, bits: int) -> Secret:
    """hot @ x, where one of them may be the same for all kv heads; local."""
    heads, shape = x.shape[:-2], x.shape
    if hot.shape[:-2] == heads:
        return products.matmul(engine.runtime, hot, x, transposed=False, bits=bits)
    if hot.shape[0] == 1:
        wide = x.map(lambda t: t.transpose(0, 1).reshape(1, shape[1], shape[0] * shape[2]))
        found = products.matmul(engine.runtime, hot, wide, transposed=False, bits=bits)
        return found.reshape(-1, shape[0], shape[2]).permute(1, 0, 2)
    each = x.map(lambda t: t.expand(*hot.shape[:-2], *shape[-2:]))
    return products.matmul(engine.runtime, hot, each, transposed=False, bits=bits)
