"""Which kv heads of a model look far, as its owner finds out in the clear: for the policy ``head_split``.

Owns the measurement and its file. A sentence with a word and a number (a needle) is put somewhere into prose, and asked
for at the end; a kv head's score is the attention that its queries, where the number is to be said, pay to the needle's
rows, the mean over its group and over prompts of several needles (after retrieval heads, Wu et al. 2024, arXiv
2404.15574). ``far_gates`` learns instead, which takes longer. The file has the order of the heads, not the scores.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import UsageError
from crypten_llm.models.llama import Llama

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig

PROMPTS = 12  # each with a needle elsewhere
LONGEST = 1024  # tokens of a prompt, or the model's context
LEAST = 64  # tokens of a prompt that has a needle beside its question
CHUNK = 128
WORDS = ("violin", "harbour", "lantern", "meadow", "copper", "winter", "saddle", "orchard", "ribbon", "granite")
NEEDLES = 3  # in a prompt, of which one is asked for


@dataclass(frozen=True)
class Needle:
    """ids: of a prompt and what is to be said. start, stop: where the needle's tokens are. asked: how many of the last
    tokens say it, the first of them being drawn at the token before."""

    ids: list[int]
    start: int
    stop: int
    asked: int


def needles(
    encode: Callable[[str], Sequence[int]],
    prose: str,
    length: int,
    count: int = PROMPTS,
    begin: Sequence[int] = (),
    seed: int = 0,
) -> list[Needle]:
    """``count`` prompts of ``length`` tokens in all, the same for a ``seed``.

    encode: a text as ids, without ``begin``, which begins a prompt. Raises UsageError where there is no room for a
    needle.
    """
    text = list(encode(prose))
    draw, found = random.Random(seed), []
    for place in range(count):
        words = draw.sample(WORDS, NEEDLES)
        facts = [(word, str(draw.randrange(10**6, 10**7))) for word in words]
        texts = [list(encode(f" The special number for {word} is {number}.")) for word, number in facts]
        word, number = facts[0]
        about = f"special number for {word}"
        question = encode(f"\n\nQuestion: What is the {about}?\nAnswer: The {about} is")
        said = encode(f" {number}")
        room = length - len(begin) - sum(map(len, texts)) - len(question) - len(said)
        if length < LEAST or room < NEEDLES:
            raise UsageError(f"a prompt of {length} tokens has no room for a needle; the model's context is too short")
        from_here = draw.randrange(len(text))
        filler = (text[from_here:] + text * (room // len(text) + 1))[:room]
        cuts = sorted(draw.sample(range(room), NEEDLES - 1))
        own = round(room * (place + 0.5) / count)
        pieces = sorted(zip([own, *cuts], texts, strict=True), key=lambda piece: piece[0])
        ids, before, start = list(begin), 0, 0
        for cut, fact in pieces:
            ids += filler[before:cut]
            if fact is texts[0]:
                start = len(ids)
            ids, before = ids + fact, cut
        found.append(
            Needle(ids + filler[before:] + list(question) + list(said), start, start + len(texts[0]), len(said))
        )
    return found


class _Watching(PlainEngine):
    """The plain engine, handing each layer's softmax weights on."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def softmax(self, scores: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        weights = super().softmax(scores, mask)
        self.weights.append(weights)
        return weights


@torch.inference_mode()
def attention_to(
    config: LlamaConfig,
    weights: Mapping[str, torch.Tensor],
    prompts: Sequence[Needle],
    beat: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Scores [layers, kv_heads], the larger the farther a head looks. beat: called with how many prompts are done."""
    engine = _Watching()
    model = Llama(engine, config, dict(weights))
    total = torch.zeros(config.num_hidden_layers, config.num_key_value_heads)
    for done, prompt in enumerate(prompts):
        cache, ids = model.new_cache(), prompt.ids[:-1]
        first = len(ids) - prompt.asked
        ends = [*range(CHUNK, first, CHUNK), first, len(ids)]
        for start, stop in zip([0, *ends], ends, strict=False):
            engine.weights = []
            rows = torch.tensor(ids[start:stop])
            model.extend(engine.tokens(rows, len(rows), config.vocab_size), cache, len(ids))
        for layer, paid in enumerate(engine.weights):
            gone = len(ids) - paid.shape[-1]  # rows that have left the layer's window
            own = paid[..., max(0, prompt.start - gone) : max(0, prompt.stop - gone)]
            total[layer] += own.sum(-1).mean(-1)
        beat(done + 1)
    return total / len(prompts)


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """int32 [layers, kv_heads]: 0 for the head of the largest score, and so on; ties to the lower index."""
    order = scores.flatten().argsort(descending=True, stable=True)
    return order.argsort().to(torch.int32).reshape(scores.shape)


def file(scores: torch.Tensor) -> bytes:
    """What ``--policy-weights`` takes, for the policy ``head_split``."""
    return save({"ranks": ranks(scores)})
