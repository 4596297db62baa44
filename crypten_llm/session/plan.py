"""What a request is to all parties: its public shape, which each follows, and where it stands in a conversation.

Owns ``Plan`` and ``Turn``, which travel as messages, and the reading of a policy's text.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

import eviction
from crypten_llm import limits
from crypten_llm.errors import UsageError
from crypten_llm.records import Count, Tokens, Word
from crypten_llm.session.mode import ALL, HOTTEST, ID, Mode
from crypten_llm.session.prefix import check_policy

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig

DEFAULT_CHUNK = 128


@dataclass(frozen=True)
class Plan:
    """The public shape of one request, which every compute party follows.

    prompt_tokens: length of the prompt. max_new_tokens: upper bound of the answer. chunk: rows per prefill pass.
    hide_length: run all ``max_new_tokens`` steps alike, so that nobody but the client learns the length of the answer.
    policy: the eviction policy as text, such as "mpcache" or "mpcache(static=0.25)"; kept in one canonical form, which
    parties compare. public_prefix: ids of tokens before the prompt, which are no secret (see ``prefix``). reveal: what
    the client learns of each step, a ``Mode`` as text; every party has its own, and refuses another. temperature: of
    what is drawn on shares (mode "tokens"), 0 for the likeliest. padded: while the answer grows, a cache that no policy
    acts on is counted as of a multiple of so many rows (``padded``); 0 for those that there are.

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

    def facts(self) -> dict:
        """What decides how all messages look: of a public prefix, that is its length."""
        return {**asdict(self), "public_prefix": len(self.public_prefix)}

    def room(self, behind: int = 0) -> int:
        """Places for the rows of a padded cache, behind as many tokens that it holds before the prompt, but for the
        last token, which no step sees; 0 for a cache that grows.
        """
        if not self.padded or self.max_new_tokens == 1 or parse_policy(self.policy).acts:
            return 0
        most = behind + len(self.public_prefix) + self.prompt_tokens + self.max_new_tokens - 1
        return -(-most // self.padded) * self.padded

    def check(self, config: LlamaConfig, behind: int = 0) -> Plan:
        """Itself, if the model ``config`` can run it after ``behind`` tokens; raises UsageError otherwise."""
        if self.prompt_tokens < 1:
            raise UsageError("the prompt is empty; give at least one token")
        policy, prefix = parse_policy(self.policy), len(self.public_prefix)
        check_policy(policy, prefix, self.prompt_tokens)
        prompt = prefix + self.prompt_tokens
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
class Turn:
    """Where a request stands in a conversation, whose cache every party keeps; public.

    conversation: its number in this session. cached_tokens: that its cache holds already; 0 begins it anew.
    """

    conversation: Count
    cached_tokens: Count = 0


def parse_policy(text: str, *assignments: str) -> eviction.Policy:
    """The policy that ``text`` names, with more ``setting=value`` texts.

    Raises UsageError when there is none of that name, or for a setting that it has not or that does not fit.
    """
    try:
        return eviction.parse(text, *assignments)
    except eviction.PolicyError as error:
        raise UsageError(str(error)) from None
