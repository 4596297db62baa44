"""Engine ``wire`` on the shipped model with outliers, each as large as a real model's, against the same in the clear.

    python -m experiments.measure.outliers --json runs/outliers.json

Real models have attention scores of -85, hidden states of 2^16 at a token that others lean on, single gates and values
in the hundreds. The shipped model has none of these, so they are put into its weights, one kind after another: queries
of a layer are scaled; a channel of values is scaled, and what reads it is scaled back; two neurons get gates that see
one token; and a neuron is made to see the prompt's first token alone, which it answers with a hidden state of that
size. The table says how far the model's numbers then go, and of how many tokens of its stories the likeliest next one
is the same. As in ``natural_text``, **INSECURE** by purpose: all logits are opened to this process.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.models.checkpoint import load_weights, resolve_model
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama, prepare
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.calibration import PROSE, Ranges
from crypten_llm.session.calibration import measure as ranges_of
from experiments.measure import natural_text
from experiments.model.corpus import Encoder, sample
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table

Weights = dict[str, torch.Tensor]
Measured = Callable[[Weights], Ranges]
FIRST, LAYER, NEXT = "model.layers.0", "model.layers.2", "model.layers.3"
SCORES, VALUES, GATES, STATES = (-85.0, 50.0), 200.0, 200.0, 2.0**16
NEAR = 0.97  # of what is wanted, at least
EXCITED = 12.0  # a gate and what it is multiplied with
USUAL = 7.0  # of the model's own gates, the largest
NEURON = 0  # of a layer's mlp
SEEN = 20  # the token that gates are made to see
CHANNEL = 3  # of each head's values, and of hidden states


def until(make: Callable[[float], Weights], size: Callable[[Weights], float]) -> Weights:
    """What ``make`` gives for the factor at which ``size`` is 1, or little less.

    Raises RuntimeError where none is found.
    """
    low, high = 0.0, 1.0
    while size(make(high)) < 1 and high < 2.0**20:
        low, high = high, 2 * high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if size(make(middle)) < 1 else (low, middle)
        if size(made := make(low)) > NEAR:
            return made
    raise RuntimeError("no factor makes the model's numbers that large")


def with_scores(weights: Weights, measured: Measured) -> Weights:
    """Queries of one layer reversed and scaled until a score reaches the lower end of ``SCORES``, and of the next one
    scaled until one reaches the upper end.
    """
    for end, layer, direction in ((0, LAYER, -1), (1, NEXT, 1)):
        name = f"{layer}.self_attn.q_proj.weight"

        def make(factor: float, given: Weights = weights, name: str = name, sign: int = direction) -> Weights:
            return given | {name: given[name] * (sign * factor)}

        def size(made: Weights, end: int = end) -> float:
            return measured(made).limited["softmax"][end] / SCORES[end]

        weights = until(make, size)
    return weights


def with_values(weights: Weights, measured: Measured, config: LlamaConfig) -> Weights:
    """A channel of each head's values scaled, and W_o's columns for it scaled back."""
    value, out = f"{LAYER}.self_attn.v_proj.weight", f"{LAYER}.self_attn.o_proj.weight"

    def make(factor: float) -> Weights:
        rows, columns = weights[value].clone(), weights[out].clone()
        rows[CHANNEL :: config.head_dim] *= factor
        columns[:, CHANNEL :: config.head_dim] /= max(factor, 1e-9)
        return weights | {value: rows, out: columns}

    return until(make, lambda made: max(map(abs, measured(made).limited["mix"])) / VALUES)


def with_gates(weights: Weights, seen: torch.Tensor) -> Weights:
    """Two neurons whose gates are ``GATES`` and ``-GATES`` at one token, and what they add scaled back. seen: what the
    layer's mlp reads, [T, H].
    """
    norm = weights[f"{LAYER}.post_attention_layernorm.weight"]
    before = seen[SEEN] / norm  # no other row with this product is so short, as the range of gates asks for
    row = GATES * before / norm / before.square().sum()
    gate, down = f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.down_proj.weight"
    rows, columns = weights[gate].clone(), weights[down].clone()
    rows[NEURON], rows[NEURON + 1] = row, -row
    columns[:, NEURON : NEURON + 2] *= USUAL / GATES
    return weights | {gate: rows, down: columns}


def with_states(weights: Weights, seen: torch.Tensor) -> Weights:
    """A neuron of the first layer that hardly any token but a prompt's first excites. seen: what its mlp reads, [T, H];
    the row of the first token comes first.
    """
    wanted, much = torch.zeros(len(seen)), torch.ones(len(seen))
    wanted[0], much[0] = EXCITED, 100.0
    ridge = 10.0 * torch.eye(seen.shape[1])  # keeps the row short, as the range of gates asks for
    rows, right = torch.cat([seen * much[:, None], ridge]), torch.cat([wanted * much, torch.zeros(len(ridge))])
    row = torch.linalg.lstsq(rows, right).solution
    made = {part: weights[f"{FIRST}.mlp.{part}_proj.weight"].clone() for part in ("gate", "up", "down")}
    made["gate"][NEURON] = made["up"][NEURON] = row
    made["down"][:, NEURON] = 0.0
    made["down"][CHANNEL, NEURON] = NEAR * STATES / (seen[0] @ row).item() ** 2
    return weights | {f"{FIRST}.mlp.{part}_proj.weight": value for part, value in made.items()}


class _Watch(PlainEngine):
    """The plain engine, keeping what is multiplied with one weight: [T, H] by prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: torch.Tensor | None = None
        self.seen: list[torch.Tensor] = []

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is self.weight:
            self.seen.append(x)
        return super().linear(x, weight, bias)


@torch.inference_mode()
def gates_see(config: LlamaConfig, weights: Weights, prompts: list[list[int]], layer: str) -> torch.Tensor:
    """What a layer's gates are computed of, [T, H]: of the first token, then of all that follow it."""
    engine = _Watch()
    held = {name: prepare(name, value, config) for name, value in weights.items()}
    engine.weight = held[f"{layer}.mlp.gate_proj.weight"]
    for ids in prompts:
        natural_text.all_logits(Llama(engine, config, held), ids)
    return torch.cat([engine.seen[0][:1], *(seen[1:] for seen in engine.seen)])


def kinds(config: LlamaConfig, weights: Weights, prompts: list[list[int]], others: Sequence[int]) -> dict[str, Weights]:
    """The weights with outliers of each kind. others: a text of tokens that are no outliers."""
    text = [token for ids in prompts for token in ids]

    def measured(made: Weights) -> Ranges:
        return ranges_of(config, {name: prepare(name, value, config) for name, value in made.items()}, text)

    return {
        "scores": with_scores(weights, measured),
        "values": with_values(weights, measured, config),
        "gates": with_gates(weights, gates_see(config, weights, prompts, LAYER)),
        "hidden states": with_states(weights, gates_see(config, weights, [*prompts, list(others)], FIRST)),
    }


def reached(config: LlamaConfig, weights: Weights, prompts: list[list[int]]) -> dict[str, str]:
    """The least and the largest of what outliers are injected into, over the prompts."""
    held = {name: prepare(name, value, config) for name, value in weights.items()}
    seen = [ranges_of(config, held, ids).limited for ids in prompts]
    columns = {"scores": "softmax", "mixed values": "mix", "gates": "swiglu gates", "hidden states": "residual"}
    return {
        column: f"{min(one[name][0] for one in seen):.0f} to {max(one[name][1] for one in seen):.0f}"
        for column, name in columns.items()
    }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="of each kind")
    parser.add_argument("--length", type=int, default=64, metavar="T", help="tokens of a prompt, at most")
    parser.add_argument("--json", type=Path, help="results are kept here; an interrupted run goes on from them")
    arguments = parser.parse_args()

    folder = resolve_model("shipped")
    with PrivateLlama.from_pretrained("shipped", engine="plain") as plain:
        config, encode = plain.config, Encoder(plain.tokenizer)
        prompts = [
            plain.encode(sample("stories", arguments.length, i, encode).prompt) for i in range(arguments.prompts)
        ]
        others = plain.encode(PROSE.read_text("utf-8"))[: config.context]
    weights = dict(load_weights(folder, config))
    result = kept.load(arguments.json)
    rows = result.setdefault("kinds", {})
    for kind, made in kinds(config, weights, prompts, others).items():
        key = f"{kind}, {len(prompts)} prompts of at most {arguments.length}"
        if key in rows:
            continue
        with tempfile.TemporaryDirectory() as place:
            changed = Path(place) / "model"
            shutil.copytree(folder, changed)
            save_file({name: value.contiguous() for name, value in made.items()}, changed / "model.safetensors")
            found: list[dict] = []
            with PrivateLlama.from_pretrained(str(changed), engine="plain") as plain:
                clear = {
                    str(i): (ids, natural_text.all_logits(plain.party.model, ids)) for i, ids in enumerate(prompts)
                }
            natural_text.measure(changed, WireConfig(), clear, lambda name, row, found=found: found.append(row))
        total = natural_text.summary(found)
        figures = {name: total[name] for name in ("tokens", "equal", "logit_error", "margins_lost")}
        rows[key] = {"kind": kind, **reached(config, made, prompts), **figures}
        sign(result)
        kept.save(arguments.json, result)
    print_table(list(rows.values()))


if __name__ == "__main__":
    sys.exit(main())
