"""What parties say to each other, each message one type: who hears another one, or sizes beyond its bounds, stops.

Owns the control plane's words. A message is read once, by ``records``, where it arrives; what of it must fit the model
and this machine, its hearer checks before anything of that size is made (``Party``). All of it is public.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from crypten_llm import limits
from crypten_llm.records import Count, Digest, Record, Word, Words
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan, Turn


class Message(Record, frozen=True, tag_field="verb"):
    """The client's, and the owner's while it loads: told apart by "verb"."""


# The client's requests.


class Load(Message, frozen=True, tag="load"):
    """Share the model."""


class Generate(Message, frozen=True, tag="generate"):
    """Answer prompts, whose plans these are, side by side; turns: where each stands in a conversation; is_open: others
    may join them; block: the id of what was dealt for it before, where the owner has said that it has it too."""

    plans: Annotated[tuple[Plan, ...], Meta(min_length=1, max_length=limits.PROMPTS)]
    turns: Annotated[tuple[Turn | None, ...], Meta(max_length=limits.PROMPTS)] = ()
    is_open: bool = False
    block: Word = ""


class Forget(Message, frozen=True, tag="forget"):
    """Drop the cache of a conversation."""

    conversation: Count


class Bench(Message, frozen=True, tag="bench"):
    """Time decode steps on random weights."""

    shape: Shape


class Statistics(Message, frozen=True, tag="statistics"):
    """Tell me your counters."""


class Offered(Message, frozen=True, tag="offered"):
    """To the owner alone: which of these do you have? They are blocks by id, with the digest of what was signed."""

    blocks: Annotated[tuple[tuple[Word, Digest], ...], Meta(min_length=1, max_length=limits.OFFERED)]


class Chosen(Record, frozen=True):
    """The owner's answer: the first of these that it has, which nobody will have again; or none."""

    block: Word = ""


class Stocks(Message, frozen=True, tag="stocks"):
    """To the owner, and back: which blocks are there."""

    ids: Annotated[tuple[Word, ...], Meta(max_length=limits.BLOCKS)]


class Close(Message, frozen=True, tag="close"):
    """The session ends."""


# A helper's, who asks for thin clients.


class Where(Message, frozen=True, tag="where"):
    """Tell me where the owner takes thin clients."""


class Enter(Message, frozen=True, tag="enter"):
    """A thin client comes, and will name this session to the owner."""

    session: Digest


class Leave(Message, frozen=True, tag="leave"):
    """It has gone."""


Request = Load | Generate | Forget | Bench | Offered | Stocks | Statistics | Close | Where | Enter | Leave


# The owner's, while its model is shared.


class Loading(Message, frozen=True, tag="loading"):
    """A sign of life: so many of the weights have been read."""

    loaded: Count
    total: Count


class Announced(Message, frozen=True, tag="model"):
    """The public facts of the model: config, as ``LlamaConfig`` takes it; norm_scales, a power of four by the name of a
    norm's weight; tokens: digest of the tokenizer's vocabulary; outside: which of the engine's ranges it leaves;
    series: which masks hide its weights, where blocks may have been dealt for them.
    """

    config: dict[str, Any]
    norm_scales: dict[Word, Annotated[float, Meta(gt=0, le=4.0**32)]]
    tokens: Digest | None = None
    outside: Words = ""
    series: Word = ""


OwnerSays = Loading | Announced
