"""Prefill and decode: the loop that turns secret prompts into tokens that only the client reads.

Owns the order of events of prompts that begin together, which is public and the same for all of one length. All compute
parties run it; the client alone has token ids, samples, and decides to stop. Several prompts are one pass, and one
prompt is several of which there is one. ``scheduler`` is the loop that others may join.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from msgspec import Meta

from crypten_llm import limits
from crypten_llm.records import Record
from crypten_llm.session.prompted import Answer, Progress, Prompted, Step, draw, extend, given, side_by_side

if TYPE_CHECKING:
    from crypten_llm.models.cache import KVCache
    from crypten_llm.session.party import Party
    from crypten_llm.session.plan import Plan, Turns
    from eviction.operations import Handle


def run(
    party: Party, plan: Plan, answer: Answer | None = None, cache: KVCache | None = None
) -> Generator[Progress | Step, None, None]:
    """``together`` of one prompt."""
    return together(party, [plan], None if answer is None else [answer], (), None if cache is None else [cache])


@torch.inference_mode()
def together(
    party: Party,
    plans: Sequence[Plan],
    answers: Sequence[Answer] | None = None,
    turns: Turns = (),
    caches: Sequence[KVCache] | None = None,
) -> Generator[Progress | Step, None, None]:
    """Follows ``plans`` on this party, side by side; at the client, which alone has ``answers``, yields their tokens.

    Once started it must be read to its end, or the parties lose step: see ``Answer.abandoned``. The others wait while
    a reader does something with a token, so one who hides the length reads all before (``PrivateLlama.stream``).

    turns: of conversations, whose caches the prompts follow. caches: or these; one that holds rows is gone on with.

    Reveals: to the client what the mode says of each generated token; to all the number of steps, unless hidden.
    Cost: the rounds of the longest prompt, then those of the longest answer; the bytes of all.
    Raises: UsageError for a policy that does not fit.
    """
    engine, meter = party.engine, party.engine.meter
    turns = turns or [None] * len(plans)
    caches = [party.cache(turn) for turn in turns] if caches is None else caches
    known: Sequence[Answer | None] = [None] * len(plans) if answers is None else answers
    each = zip(plans, known, caches, range(len(plans)), turns, strict=True)
    live = {place: Prompted(party, *its) for place, its in enumerate(each)}
    if len(plans) > 1:
        party.reveals.public(f"{len(plans)} prompts at once", "they share rounds")
    for prompted in live.values():
        prompted.begin()
    index, padded = 0, None
    while live:
        started = perf_counter()
        section = engine.section(f"request {party.numbered} token {index}")
        with meter.phase("decode" if index else "prefill"), section:
            if index == 0:
                for prompted in live.values():
                    prompted.begin_with_prefix()
                hidden = yield from _prefill(party, list(live.values()))
                values = draw(party, list(live.values()), hidden)
                if len(plans) == 1:
                    padded = party.padded_for(plans[0], live[0].cache)
            elif padded is not None:
                values = [live[0].open(padded.step(given(party, [live[0].newest()])))]
            else:
                hidden = extend(party, [prompted.newest() for prompted in live.values()])
                values = draw(party, list(live.values()), hidden)
        asked, ending = {}, set()
        for (place, prompted), value in zip(list(live.items()), values, strict=True):
            if step := prompted.take(value, started):
                yield step
            if prompted.is_last:
                ending.add(place)
            elif not prompted.plan.hide_length:
                asked[place] = prompted.answer
        index += 1
        if asked:
            with meter.phase("decode"), meter.operation("whether the answer goes on", "stop or go"):
                ending |= agree(party, asked)
        for place in sorted(ending):
            if padded is not None:
                padded.end()
            live.pop(place).end()


def _prefill(party: Party, prompts: list[Prompted]) -> Generator[Progress, None, Handle]:
    """Brings the prompts into their caches chunk by chunk, at the client yielding ``Progress``; returns the hidden
    states of their last tokens, [B, H].
    """
    done, total = 0, sum(prompted.plan.rows for prompted in prompts)
    last: dict[int, Handle] = {}
    while reading := [prompted for prompted in prompts if not prompted.is_read]:
        rows = [prompted.next_chunk() for prompted in reading]
        hidden = extend(party, rows)
        starts = itertools.accumulate((each.part.rows for each in rows), initial=0)
        for each, start in zip(reading, starts, strict=False):
            if (at := each.last_row) is not None:
                last[each.place] = hidden[start + at : start + at + 1]
        done += hidden.shape[0]
        if prompts[0].answer is not None:
            yield Progress(done, total)
    side_by_side(party, [prompted.end_prompt for prompted in prompts])
    in_order = [last[prompted.place] for prompted in prompts]
    return in_order[0] if len(in_order) == 1 else party.engine.cat(in_order, 0)


def agree(party: Party, answers: Mapping[int, Answer | None]) -> set[int]:
    """Which of these answers end here, by their place: the client's public decision, at every compute party.

    answers: by place; ``None`` at all parties but the client.
    """
    mine = None
    if None not in answers.values():
        mine = Decision([place for place, a in answers.items() if a and (a.finished or a.abandoned)] or False)
    if party.transport is not None:
        mine = party.transport.announce(party.client, party.peers, mine, Decision)
    assert mine is not None, "one process is the client too"
    ending = set(mine.stop or ())
    if not ending <= answers.keys():
        assert party.transport is not None, "what it says itself is right"
        raise party.transport.unexpected(party.client, "whether the answer goes on")
    return ending


class Decision(Record, frozen=True):
    """The client's: which of the answers that go on end here, by their place; False: none."""

    stop: Literal[False] | Annotated[list[int], Meta(min_length=1, max_length=limits.PROMPTS)]
