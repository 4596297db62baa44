"""KV-cache eviction policies, each written once against a small set of operations.

Owns the table of policies and the text by which one is named: ``mpcache`` or ``mpcache(static=0.25,summary=mean)``.
It imports nothing from ``crypten_llm``: a policy is handed the operations it may use, so that the same code runs on
plaintext tensors and on secret shares. Elsewhere a policy's name stands in configurations alone.
"""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from eviction.attention_gate import AttentionGate
from eviction.expected_attention import ExpectedAttention
from eviction.far_blocks import FarBlocks
from eviction.full import Full
from eviction.h2o import H2O
from eviction.head_split import HeadSplit
from eviction.infllm import InfLLM
from eviction.kvzap_linear import KVzapLinear
from eviction.lazyeviction import LazyEviction
from eviction.locret import Locret
from eviction.longcache import LongCache
from eviction.mikv import MiKV
from eviction.mpcache import MPCache
from eviction.mpcache_spread import MPCacheSpread
from eviction.policy import Policy
from eviction.pyramidkv import PyramidKV
from eviction.qfilters import QFilters
from eviction.quest import Quest
from eviction.random import Random
from eviction.settings import PolicyError, UnknownPolicy
from eviction.snapkv import SnapKV
from eviction.streaming_llm import StreamingLLM
from eviction.tova import TOVA
from eviction.trained import register, registered
from eviction.triattention import TriAttention

_ALL = (
    *(Full, StreamingLLM, HeadSplit, FarBlocks, H2O, TOVA, SnapKV, PyramidKV, Quest, InfLLM, LongCache, MPCache),
    *(MPCacheSpread, ExpectedAttention, QFilters, TriAttention, KVzapLinear),
    *(LazyEviction, MiKV, Locret, AttentionGate, Random),
)
POLICIES = {policy.name: policy for policy in _ALL}
FULL = Full()  # what runs where no policy is asked for, and what all others are measured against
RECOMMENDED = "recommended"  # another name of the policy that this project would take

__all__ = ["FULL", "POLICIES", "RECOMMENDED", "Policy", "PolicyError", "UnknownPolicy", "parse", "policy", "register"]


def policy(name: str, **settings: Any) -> Policy:
    """A policy of the table; settings are Python values or text. ``recommended`` is ``far_blocks``, with the ranks of
    heads that this process was given, if it was given one file of them.

    Raises UnknownPolicy for a name that is not in the table, PolicyError for a setting that there is not or that does
    not fit.
    """
    if name == RECOMMENDED:
        name, settings = FarBlocks.name, _given_ranks() | settings
    if name not in POLICIES:
        raise UnknownPolicy(
            f"unknown policy {name!r}; {_near(name, POLICIES)}policies are {', '.join((RECOMMENDED, *POLICIES))}"
        )
    kind = POLICIES[name]
    known = [setting.name for setting in fields(kind)]
    for setting in settings:
        if setting not in known:
            there_are = f"it has {', '.join(known)}" if known else "it has none"
            raise PolicyError(f"policy {name} has no setting {setting!r}; {_near(setting, known)}{there_are}")
    return kind(**settings)


def parse(text: str, *assignments: str) -> Policy:
    """The policy that ``str(policy)`` wrote: a name, or name(setting=value,...), with more ``setting=value`` texts.

    Raises UnknownPolicy and PolicyError as ``policy`` does, and PolicyError for text that is neither.
    """
    name, bracket, rest = text.strip().partition("(")
    if bracket and not rest.endswith(")"):
        raise PolicyError(f"policy {text!r} has no closing bracket; write name(setting=value,setting=value)")
    settings = {}
    for assignment in [part for part in rest[:-1].split(",") if part] + list(assignments):
        setting, equals, value = assignment.partition("=")
        if not equals:
            raise PolicyError(f"policy {name}: {assignment!r} is no setting; write setting=value")
        settings[setting.strip()] = value.strip()
    return policy(name, **settings)


def _given_ranks() -> dict[str, str]:
    """The setting ``weights``, where this process knows one file of ranks beside those of the project."""
    given = registered("ranks")
    if len(given) > 1:
        raise PolicyError(f"ranks of heads are known from {', '.join(given)}; name one (weights=NAME)")
    return {"weights": given[0]} if given else {}


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
