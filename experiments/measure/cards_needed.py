"""What each role's cards would hold with tensor parallelism inside a party, and how many cards it needs.

    python -m experiments.measure.cards_needed
    python -m experiments.measure.cards_needed --memory 80 --tokens 8192

A plan, not a measurement: nothing here runs on several cards a party. Bytes of weights and caches are those that
``cost`` counts. Matrices are split evenly: W_q, W_k, W_v, W_gate, W_up, the embedding and the logits' by rows of their
results, W_o and W_down by what they take; caches by kv heads, of which a card has one at least. After W_o and W_down
the cards of a role add up their parts of the shares: words of T rows by H, twice a layer, which no other party sees. A
card needs ``RESERVED`` bytes beside: the driver's, kernels, material and a pass's numbers.
"""

from __future__ import annotations

import argparse
import sys

from crypten_llm.commands.cost import WORD, predict
from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.plan import Plan
from experiments.tools.command import command
from experiments.tools.tables import print_table

SIZES = {
    "Llama-2-7B": {"hidden": 4096, "heads": 32, "kv_heads": 32, "ffn": 11008, "layers": 32, "vocab": 32000},
    "Llama-2-13B": {"hidden": 5120, "heads": 40, "kv_heads": 40, "ffn": 13824, "layers": 40, "vocab": 32000},
    "Llama-2-70B": {"hidden": 8192, "heads": 64, "kv_heads": 8, "ffn": 28672, "layers": 80, "vocab": 32000},
}
CARDS = (1, 2, 4, 8)
RESERVED = 6e9


def of_a_card(config: LlamaConfig, held: dict[str, int], cards: int) -> float:
    """Bytes on each of a role's ``cards``. held: of the role, weights and cache.

    Raises UsageError for a number that does not split heads and gates evenly.
    """
    for what, count in (("heads", config.num_attention_heads), ("gates", config.intermediate_size)):
        if count % cards:
            raise UsageError(f"{count} {what} do not split over {cards} cards")
    return held["weights"] / cards + held["cache"] / min(cards, config.num_key_value_heads)


def needed(config: LlamaConfig, held: dict[str, int], memory: float) -> int | None:
    """The fewest of ``CARDS`` of so many bytes that hold a role's part; None where none do."""
    return next((cards for cards in CARDS if of_a_card(config, held, cards) + RESERVED <= memory), None)


def reduced(config: LlamaConfig, rows: int) -> int:
    """Bytes of the shares that a role's cards add up in a pass of ``rows``; each card sends and receives about twice as
    many, less a card's part.
    """
    return 2 * config.num_hidden_layers * rows * config.hidden_size * WORD


def rows(name: str, tokens: int, memory: float) -> list[dict]:
    """A row a role."""
    config = LlamaConfig.from_sizes(**SIZES[name], context=tokens + 2)
    prediction = predict(config, Plan(tokens, 2))
    found = []
    for role, held in prediction.memory.items():
        row = {"model": name, "role": role, "weights GB": f"{held['weights'] / 1e9:.1f}"}
        row["cache GB"] = f"{held['cache'] / 1e9:.1f}"
        row |= {f"on {cards}": f"{of_a_card(config, held, cards) / 1e9:.1f}" for cards in CARDS}
        count = needed(config, held, memory)
        row[f"cards of {memory / 1e9:.0f} GB"] = "more" if count is None else str(count)
        found.append(row | {"added up a token": f"{reduced(config, 1) / 1e6:.1f} MB"})
    return found


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES), metavar="NAME")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="in the cache (default: 2048)")
    parser.add_argument("--memory", type=float, default=141.0, metavar="GB", help="of a card (default: 141, an H200's)")
    given = parser.parse_args()
    print_table([row for name in given.models for row in rows(name, given.tokens, given.memory * 1e9)])


if __name__ == "__main__":
    sys.exit(main())
