"""What a client's logits tell of the weights: the output matrix's column space, from about as many as it has columns.

    python -m experiments.measure.logit_leak --tokens 320 --engine wire --json runs/leak.json

A step's logits are W h for the output matrix W [V, H] and a hidden state h, so they lie in a space of H dimensions out
of V. The client keeps the logits of each token of one answer, and goes on with tokens drawn from all alike, so that the
hidden states differ. In the singular value decomposition of its H logit vectors or more, the first H directions are the
column space of W. The table has, for so many vectors, how much of W lies outside of the space found (Frobenius norm, of
1), and the ratio of the last singular value that belongs to it to the next, which tells H. What is left unknown of W
is an invertible A [H, H] in W A.

Source: Carlini et al., Stealing part of a production language model (ICML 2024), section 4; Finlayson et al. (2024).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from crypten_llm.models import checkpoint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.family import EMBEDDING, HEAD
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Answer
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import print_table

PROMPT = [5, 6, 7, 8]


def seen(llama: PrivateLlama, tokens: int) -> torch.Tensor:
    """Logits [tokens, V] as the client is shown them, of one answer whose tokens it draws uniformly from all."""
    rows: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)

    def choose(logits: torch.Tensor) -> int:
        rows.append(logits.double().clone())
        return int(torch.randint(len(logits), (), generator=generator))

    plan = Plan(len(PROMPT), tokens).check(llama.config)
    for _ in llama.party.request_generate(plan, Answer(PROMPT, choose)):
        pass
    return torch.stack(rows)


def leak(logits: torch.Tensor, weight: torch.Tensor) -> dict:
    """logits [n, V], weight: W [V, H], which the client does not have."""
    values, directions = torch.linalg.svd(logits, full_matrices=False)[1:]
    size = weight.shape[1]
    space = directions[:size]
    outside = weight - space.T @ (space @ weight)
    gap = (values[size - 1] / values[size]).item() if len(values) > size else None
    return {"logit vectors": len(logits), "outside": (outside.norm() / weight.norm()).item(), "gap": gap}


def output_matrix(folder: Path, config: LlamaConfig) -> torch.Tensor:
    """W [V, H], which the owner alone has."""
    name = f"{EMBEDDING if config.tie_word_embeddings else HEAD}.weight"
    return dict(checkpoint.load_weights(folder, config))[name].double()


def table(logits: torch.Tensor, weight: torch.Tensor) -> list[dict]:
    """``leak`` for fewer vectors than the matrix has columns, as many, and more, as far as there are."""
    size = weight.shape[1]
    counts = [size // 2, size - 16, size, size + 8, size + 16, size + 32, size + 64]
    return [leak(logits[:count], weight) for count in counts if count <= len(logits)]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shipped", help="folder, GGUF file or hub id (default: shipped)")
    parser.add_argument("--tokens", type=int, default=320, metavar="N", help="of one answer (default: 320)")
    parser.add_argument("--engine", default="wire", help="whose logits (default: wire)")
    parser.add_argument("--json", type=Path, help="results are kept here, by engine")
    arguments = parser.parse_args()

    folder = checkpoint.resolve_model(arguments.model)
    with PrivateLlama.from_pretrained(str(folder), engine=arguments.engine) as llama:
        logits, config = seen(llama, arguments.tokens), llama.config
    rows = table(logits, output_matrix(folder, config))
    print(f"{arguments.engine}: W is {config.vocab_size} x {config.hidden_size}", file=sys.stderr)
    print_table(rows)
    result = kept.load(arguments.json)
    result[arguments.engine] = {"vocabulary": config.vocab_size, "hidden": config.hidden_size, "rows": rows}
    sign(result)
    kept.save(arguments.json, result)


if __name__ == "__main__":
    sys.exit(main())
