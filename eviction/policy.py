"""What a policy is: validated settings, facts about itself, and the hooks that the model calls.

Owns the interface, and with it all that others know of a policy: who counts its costs, compares it, tunes it or draws
it asks the policy. A policy is a frozen dataclass and keeps no state; what it must remember of a request it writes into
``Layer.notes``. It computes through ``ops`` alone (see ``operations``), so it cannot know where values live.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from eviction.operations import Choice, Handle, Layer, Operations, Seen
from eviction.settings import PolicyError, written


@dataclass(frozen=True)
class HeadGroup:
    """Some of a layer's kv heads, with rows of their own.

    heads: their indices. policy: what becomes of their rows. window: how many tokens, its own among them, a token sees,
    also while a prompt is read; ``None`` for all. sinks: tokens at the beginning that it sees beyond them.
    """

    heads: tuple[int, ...]
    policy: "Policy"
    window: int | None = None
    sinks: int = 0


@dataclass(frozen=True)
class Policy:
    """Class facts: ``name``; ``paper`` and ``arxiv`` id; ``when`` it acts (prefill, step or both); ``shared_over``, who
    has one choice in common (all, layer, kv head); ``reveals``, what anybody learns beyond the public settings and
    lengths; ``cost``, per step in words; ``uses``, the operations that an engine must have to run it.

    acts: whether it does anything at all. One that does not is shown nothing, and all layers are alike under it.
    goes_on: whether it can go on with the cache of an earlier turn of a conversation, whose rows it then leaves as they
    are (see the hook ``go_on``). why_not: in words, where it cannot.
    rebuilds_cache: whether the rows that it makes with ``fixed`` are the cache's own, not others beside them.
    cuts_prompts: whether it drops rows while a prompt is read, so that the cache is never as long as that.
    reads_scores: whether it reads the scores of rows that a prompt's token may not see.
    uneven: whether the steps of a period differ among themselves, see ``period``. budget_means: in words, what a budget
    is where it is not the rows that a step reads. held: settings that a search leaves alone, and the values that they
    have meanwhile, ``None`` for the default. style: colour, marker and line in charts, in matplotlib's words; without
    one a policy gets what others have left.

    Raises PolicyError for a setting that does not fit.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    when: ClassVar[str] = ""
    shared_over: ClassVar[str] = ""
    reveals: ClassVar[str] = "nothing"
    cost: ClassVar[str] = ""
    uses: ClassVar[tuple[str, ...]] = ()
    acts: ClassVar[bool] = True
    goes_on: ClassVar[bool] = False
    why_not: ClassVar[str] = "it would choose again among rows of which it has chosen"
    rebuilds_cache: ClassVar[bool] = False
    cuts_prompts: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False
    uneven: ClassVar[bool] = False
    budget_means: ClassVar[str] = ""
    held: ClassVar[Mapping[str, object]] = {}
    style: ClassVar[tuple[str, str, str] | None] = None

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            try:
                value = setting.metadata["read"](value)
            except (ValueError, TypeError, OverflowError):
                what = setting.metadata["what"]
                raise PolicyError(f"policy {self.name}: {setting.name} is {value!r}; it must be {what}") from None
            object.__setattr__(self, setting.name, value)

    def __str__(self) -> str:
        """The public text that all parties agree on: the name, and the settings that are not defaults."""
        changed = [
            f"{setting.name}={written(getattr(self, setting.name))}"
            for setting in fields(self)
            if getattr(self, setting.name) != setting.default
        ]
        return f"{self.name}({','.join(changed)})" if changed else self.name

    def refuse(self, why: str) -> PolicyError:
        """An error of this policy, to be raised."""
        return PolicyError(f"policy {self.name}: {why}")

    # What others ask of it.

    @property
    def period(self) -> int:
        """Decode steps after which costs come round: one of so many does more, as when a cluster of the cache fills.

        1 where every step is alike. Where a policy is ``uneven`` the others differ too, and only a whole period tells
        the mean.
        """
        return 1

    def fills(self, prompt_tokens: int) -> bool:
        """Whether the first step after a prompt of this length is the one of its ``period`` that does more."""
        return False

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict:
        """Settings with which a decode step reads ``rows`` rows, in each layer and for each of ``heads`` query heads.

        Where a policy rounds to pages or clusters that holds on average over steps, where it treats layers unlike on
        average over layers. changed: settings that have these values; those that depend on them follow. To be said by
        each policy that acts and has no setting ``budget`` to be this alone.
        """
        return {"budget": rows, **changed}

    def without_idle(self) -> Self:
        """The same policy: settings that have no effect beside the others are as they are by default."""
        idle = self.idle()
        return replace(self, **{setting.name: setting.default for setting in fields(self) if setting.name in idle})

    def idle(self) -> set[str]:
        """Names of settings that have no effect beside the others."""
        return set()

    def watches(self, prompt_tokens: int) -> int:
        """How many tokens at the end of a prompt of this length it must be shown.

        What comes before them may be a public prefix, whose rows are in the cache from the beginning: of these tokens
        the policy sees neither queries nor attention.
        """
        return prompt_tokens if self.acts else 0

    def key_scale(self, layer: Layer) -> Handle | None:
        """What the cache's rows are to be multiplied by to give the model's keys, as a handle that broadcasts to them.

        Attention's queries have been multiplied by it already. ``None`` where the rows are the keys.
        """
        return None

    def split(self, layer: Layer) -> tuple[HeadGroup, ...]:
        """Groups that have each of the layer's kv heads once, none of them empty; () to leave the heads together.

        Each group's own policy then has the hooks below, on a ``Layer`` of its heads alone. Groups share their rounds.
        """
        return ()

    # Hooks, for each layer, in the order in which they are called. After an answer a further turn of the conversation
    # may come, if the policy ``goes_on``: then ``go_on`` takes the place of ``begin``.

    def begin(self, ops: Operations, layer: Layer) -> None:
        """Before the first token."""

    def go_on(self, ops: Operations, layer: Layer, turn_tokens: int) -> None:
        """Before the first token of a further turn, of ``turn_tokens``; ``layer.prompt_tokens`` counts all of all."""

    def enter(
        self, ops: Operations, layer: Layer, query: Handle, key: Handle, value: Handle
    ) -> tuple[Handle, Handle, Handle]:
        """The rotated query [heads, T, D] and the rows [G, T, D] that join the cache, as attention will use them."""
        return query, key, value

    def choose(self, ops: Operations, layer: Layer, query: Handle, query_before: Handle) -> Choice | None:
        """At a decode step, when the new row has joined: what it attends to; ``None`` for all rows.

        query: rotated, [G, group, D]. query_before: the same before the rotary embedding.
        """
        return None

    def leave(self, ops: Operations, layer: Layer, mixed: Handle) -> Handle:
        """The mixed values [G, M, D] as the model goes on with them."""
        return mixed

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        """After each pass over a piece of the prompt."""

    def evict(self, ops: Operations, layer: Layer) -> None:
        """At the end of the prompt."""

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        """After each decode step."""
