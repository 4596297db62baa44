"""What a split of heads keeps of a model's answers: needles in English text, and the text's perplexity, on ``plain``.

    python -m experiments.measure.far_heads --length 1024 --prompts 12
    python -m experiments.measure.far_heads --policy full --policy "head_split(far=0.5,weights=SmolLM2-135M-Instruct)"

The model is SmolLM2-135M-Instruct unless another is given. Needles are worded as RULER's (arXiv 2404.06654), and the
haystack is prose of Python's language reference: neither is what ranked the heads. ``single``: one needle;
``multikey``: four, of which one is asked for. An answer is right if each of its tokens is the likeliest after those
before it (teacher forcing). Perplexity is that of the text's first tokens.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from tqdm import tqdm

from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import resolve_model
from crypten_llm.models.llama import Llama
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.plan import DEFAULT_CHUNK, parse_policy
from eviction import Policy
from experiments.tools import real_model
from experiments.tools.command import command
from experiments.tools.tables import print_table

SMOL = f"weights={real_model.NAME}"
POLICIES = ("full", *(f"head_split(far={far},{SMOL})" for far in (0.2, 0.3, 0.5)))
TASKS = {"single": 1, "multikey": 4}  # needles
KEYS = ("amber", "basket", "canyon", "dolphin", "ember", "falcon", "garden", "hammer", "island", "jacket", "kettle")
PROSE = re.compile(r"[A-Z][^:\[\]{}=_|<>\\`]{80,}[.!?]")  # a paragraph without code


@dataclass(frozen=True)
class Prompt:
    """ids: of a prompt and its answer, whose tokens are the last ``asked``."""

    ids: list[int]
    asked: int


def haystack() -> str:
    """Paragraphs of Python's language reference (PSF licence), which comes with every Python."""
    paragraphs = (" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n"))
    return "\n".join(dict.fromkeys(part for part in paragraphs if PROSE.fullmatch(part)))


def draw(encode: Callable[[str], list[int]], needles: int, length: int, count: int) -> list[Prompt]:
    """Prompts of ``length`` tokens with their answers. Raises UsageError where there is no room."""
    text, drawn, found = encode(haystack()), random.Random(needles), []
    for _ in range(count):
        facts = [(key, str(drawn.randrange(10**6, 10**7))) for key in drawn.sample(KEYS, needles)]
        texts = [encode(f" One of the special magic numbers for {key} is: {number}.") for key, number in facts]
        about = f"the special magic number for {facts[0][0]} mentioned in the provided text"
        asked, said = encode(f"\nWhat is {about}? {about[0].upper()}{about[1:]} is"), encode(f" {facts[0][1]}")
        room = length - sum(map(len, texts)) - len(asked) - len(said)
        if room < needles:
            raise UsageError(f"--length is {length}; {needles} needles and their question need more")
        start = drawn.randrange(max(1, len(text) - room))
        filler, ids, before = (text[start:] + text)[:room], list[int](), 0
        for place, fact in zip(sorted(drawn.sample(range(room), needles)), drawn.sample(texts, needles), strict=True):
            ids, before = ids + filler[before:place] + fact, place
        found.append(Prompt(ids + filler[before:] + asked + said, len(said)))
    return found


@torch.inference_mode()
def logits(model: Llama, policy: Policy, ids: Sequence[int], last: int) -> torch.Tensor:
    """[last, V] of the last tokens, the others having been read as a prompt."""
    cache, size, kept = model.new_cache(), len(ids), list[torch.Tensor]()
    cache.follow(policy, size)
    for start in range(0, size, DEFAULT_CHUNK):
        rows = torch.tensor(ids[start : start + DEFAULT_CHUNK])
        kept.append(model.extend(model.engine.tokens(rows, len(rows), model.config.vocab_size), cache, size))
    return model.logits(torch.cat(kept)[-last:])


def is_right(model: Llama, policy: Policy, prompt: Prompt) -> bool:
    found = logits(model, policy, prompt.ids[:-1], prompt.asked).argmax(-1)
    return found.tolist() == prompt.ids[-prompt.asked :]


def perplexity(model: Llama, policy: Policy, ids: Sequence[int]) -> float:
    found = logits(model, policy, ids[:-1], len(ids) - 1).double().log_softmax(-1)
    return math.exp(-found.gather(-1, torch.tensor(ids[1:])[:, None]).mean().item())


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"(default: {real_model.NAME}, which 'make demo-real' installs)")
    parser.add_argument("--policy", action="append", metavar="P", help=f"repeatable (default: {', '.join(POLICIES)})")
    parser.add_argument("--length", type=int, default=1024, metavar="T", help="tokens of a prompt with its answer")
    parser.add_argument("--prompts", type=int, default=12, metavar="N", help="of each task")
    arguments = parser.parse_args()
    policies = [parse_policy(text) for text in arguments.policy or POLICIES]
    model = str(resolve_model(arguments.model or real_model.found()))
    with PrivateLlama.from_pretrained(model, engine="plain") as plain:

        def encode(text: str) -> list[int]:
            return plain.tokenizer(text, add_special_tokens=False)["input_ids"]

        prompts = {name: draw(encode, count, arguments.length, arguments.prompts) for name, count in TASKS.items()}
        text, rows, own = encode(haystack())[: arguments.length], [], plain.party.model
        for policy in tqdm(policies, unit="policy", disable=not sys.stderr.isatty()):
            right = {name: sum(is_right(own, policy, each) for each in asked) for name, asked in prompts.items()}
            rows.append({"policy": str(policy), **right, "of": arguments.prompts})
            rows[-1]["perplexity"] = perplexity(own, policy, text)
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows)


if __name__ == "__main__":
    sys.exit(main())
