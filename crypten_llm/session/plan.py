"""What a request is to all parties: its public shape, which each follows, and where it stands in a conversation.

Owns ``Plan`` and ``Turn``, which travel as messages, and the reading of a policy's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

import eviction
from crypten_llm import limits
from crypten_llm.errors import UsageError
from crypten_llm.records import Count, Record, Tokens, Word
from crypten_llm.session.mode import ALL, HOTTEST, ID, Mode
from crypten_llm.session.prefix import check_policy

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig

DEFAULT_CHUNK = 128


class Turn(Record, frozen=True):
    """Where a request stands in a conversation, whose cache every party keeps; public.

    conversation: its number in this session. cached_tokens: that its cache holds already; 0 begins it anew.
    keeps_answer: whether the cache is kept with the answer, or as it was when the prompt had been read. One whose
    length is hidden cannot be: where it ended, the next turn's length would tell.
    """

    conversation: Count
    cached_tokens: Count = 0
    keeps_answer: bool = True


Turns = Sequence[Turn | None]
"""Of each plan, where it stands in a conversation; empty where none does."""


@dataclass(frozen=True)
class Plan:
    """The public shape of one request, which every compute party follows.

    prompt_tokens: length of the prompt. max_new_tokens: upper bound of the answer. chunk: rows per prefill pass.
    hide_length: run all ``max_new_tokens`` steps alike, so that nobody but the client learns the length of the answer.
    policy: the eviction policy as text, such as "mpcache" or "mpcache(static=0.25)"; kept in one canonical form, which
    parties compare. public_prefix: ids of tokens before the prompt, which are no secret (see ``prefix``). reveal: what
    the client learns of each step, a ``Mode`` as text; every party has its own, and refuses another. temperature: of
    what is drawn on shares (mode "tokens"), 0 for the likeliest. padded: while the answer grows, a cache that no policy
    acts on is counted as of a multiple of so many rows (``padded``); 0 for those that there are. pads: rows behind the
    prompt that stand for nothing, which no token of prompt or answer sees: with them it is as long as what was dealt.

    Raises UsageError for a policy or a mode that there is not, and a temperature that cannot be.
    """

    prompt_tokens: Tokens
    max_new_tokens: Tokens
    chunk: Tokens = DEFAULT_CHUNK
    hide_length: bool = False
    policy: Annotated[str, Meta(max_length=1000)] = "full"
    public_prefix: Annotated[tuple[Count, ...], Meta(max_length=limits.TOKENS)] = ()
    reveal: Word = ALL
    temperature: float = 0.0
    padded: Annotated[int, Meta(ge=0, le=limits.PADDED)] = 0
    pads: Annotated[int, Meta(ge=0, le=limits.PADDED)] = 0

    def __post_init__(self) -> None:
        mode, temperature = Mode.parse(self.reveal), self.temperature
        if not isinstance(self.padded, int) or not 0 <= self.padded <= limits.PADDED:
            raise UsageError(f"padded is {self.padded!r}; it must be 0 to {limits.PADDED:,} rows")
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not is_number or not 0 <= temperature <= (HOTTEST if mode.kind == ID else 0):
            raise UsageError(
                f"temperature is {temperature!r} in the plan; it must be 0 to {HOTTEST:g} with --reveal tokens, else 0"
            )
        object.__setattr__(self, "policy", str(parse_policy(self.policy)))
        object.__setattr__(self, "public_prefix", tuple(self.public_prefix))  # JSON has lists

    @property
    def rows(self) -> int:
        """Of the prompt, as it is read: with its pads."""
        return self.prompt_tokens + self.pads

    def facts(self) -> dict:
        """What decides how all messages look: of a public prefix, that is its length."""
        return {**asdict(self), "public_prefix": len(self.public_prefix)}

    def room(self, behind: int = 0) -> int:
        """Places for the rows of a padded cache, behind as many tokens that it holds before the prompt, but for the
        last token, which no step sees; 0 for a cache that grows.
        """
        if not self.padded or self.max_new_tokens == 1 or parse_policy(self.policy).acts:
            return 0
        most = behind + len(self.public_prefix) + self.rows + self.max_new_tokens - 1
        return -(-most // self.padded) * self.padded

    def check(self, config: LlamaConfig, turn: Turn | None = None) -> Plan:
        """Itself, if the model ``config`` can run it as this turn of a conversation; raises UsageError otherwise."""
        if self.prompt_tokens < 1:
            raise UsageError("the prompt is empty; give at least one token")
        if turn and turn.keeps_answer and self.hide_length:
            raise UsageError("an answer of hidden length is not kept in a conversation, whose next turn would tell it")
        behind = turn.cached_tokens if turn else 0
        policy, prefix = parse_policy(self.policy), len(self.public_prefix)
        check_policy(policy, prefix, self.prompt_tokens)
        if self.pads and (turn or policy.acts or config.windows or not (self.room() or self.max_new_tokens == 1)):
            raise UsageError("pads are of a request's own padded cache, of which all rows are kept")
        prompt = prefix + self.rows
        needed, context = behind + prompt + self.max_new_tokens, config.context
        if needed > context and behind:
            raise UsageError(
                f"the conversation has {behind + prompt} tokens and {self.max_new_tokens} more are asked "
                f"for, but the model's context is {context}; begin a new one (/reset) or lower max_new_tokens "
                "(--max-new-tokens)"
            )
        if needed > context:
            raise UsageError(
                f"the prompt has {prompt} tokens and {self.max_new_tokens} more are asked for, but the "
                f"model's context is {context}; shorten the prompt by {needed - context} tokens or lower "
                "max_new_tokens (--max-new-tokens)"
            )
        shortest = min((window for window in config.windows if window is not None), default=context)
        if needed > shortest and policy.acts:
            raise UsageError(
                f"policy {self.policy} chooses among all rows, but attention of this model looks back {shortest} "
                f"tokens at most, and prompt and answer together may have {needed}; use policy full (--policy full) "
                f"or shorten them by {needed - shortest}"
            )
        return self


@dataclass(frozen=True)
class Course:
    """What the cost of a request depends on: its plan, and what its cache has been through.

    behind: the plan of a prompt that leaves a cache of the same shape; None for an empty one.
    """

    plan: Plan
    behind: Plan | None = None

    @property
    def cached_tokens(self) -> int:
        return 0 if self.behind is None else len(self.behind.public_prefix) + self.behind.prompt_tokens


def turns_of(turns: Turns) -> tuple[Turn | None, ...]:
    """The same, empty where none of them is one."""
    return tuple(turns) if any(turns) else ()


def check_turns(turns: Turns, plans: int, running: Sequence[int]) -> None:
    """Raises UsageError where these are not the turns of so many plans, or two would go on with one conversation;
    running: those that a request goes on with now."""
    if turns and len(turns) != plans:
        raise UsageError(f"{len(turns)} turns are given for {plans} prompts")
    numbers = [*running, *(turn.conversation for turn in turns if turn)]
    if len(set(numbers)) < len(numbers):
        raise UsageError("two requests would go on with the same conversation")


def parse_policy(text: str, *assignments: str) -> eviction.Policy:
    """The policy that ``text`` names, with more ``setting=value`` texts.

    Raises UsageError when there is none of that name, or for a setting that it has not or that does not fit.
    """
    try:
        return eviction.parse(text, *assignments)
    except eviction.PolicyError as error:
        raise UsageError(str(error)) from None
