"""What each token of an answer takes on a device, and whether the tokens are those of engine ``plain``.

    python -m experiments.measure.token_seconds --model FILE.gguf --device cuda --prompt-tokens 512 --tokens 32
    python -m experiments.measure.token_seconds --device cuda --peer-memory --hide-length --requests 2

The prompt is from the project's own docs/wire.md, and so many tokens long; a further request begins some words on. The
first steps of an answer may compile kernels and capture the others: prints the seconds of the first token, which holds
the prompt, of the three behind it, and the median, the least and the most of all others.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

from crypten_llm.commands.options import PADDED_ON_A_GPU
from crypten_llm.precisions import DEFAULT, PRECISIONS
from crypten_llm.session.api import PrivateLlama
from experiments.tools.command import command
from experiments.tools.real_model import resolved
from experiments.tools.tables import print_table

TEXT = Path(__file__).parents[2] / "docs" / "wire.md"
SKIPPED = 7  # tokens of the text, from one request to the next
SETTLED = 4  # tokens behind which every step is like the last


def asked(llama: PrivateLlama, ids: list[int], tokens: int, **options) -> tuple[list[int], list[float]]:
    """The tokens of a greedy answer that nothing ends, and what each took."""
    found, seconds = [], []
    for event in llama.stream(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=(), **options):
        if hasattr(event, "token_id"):
            found.append(event.token_id)
            seconds.append(event.seconds)
    return found, seconds


def measure(
    model: str,
    device: str,
    prompt_tokens: int,
    tokens: int,
    requests: int,
    peer_memory: bool,
    hide_length: bool,
    precision: str,
) -> list[dict]:
    """A row for each request of one session."""
    options = {"prefill_chunk": prompt_tokens, "padded": PADDED_ON_A_GPU if "cuda" in device else 0}
    with PrivateLlama.from_pretrained(model, engine="plain") as llama:
        ids = llama.tokenizer(TEXT.read_text("utf-8"))["input_ids"]
        prompts = [ids[SKIPPED * k : SKIPPED * k + prompt_tokens] for k in range(requests)]
        expected = [asked(llama, prompt, tokens)[0] for prompt in prompts]
    rows = []
    started = time.perf_counter()
    settings = {"device": device, "peer_memory": peer_memory, "precision": precision}
    with PrivateLlama.from_pretrained(model, engine="wire", **settings) as llama:
        loading = time.perf_counter() - started
        for prompt, due in zip(prompts, expected, strict=True):
            found, seconds = asked(llama, prompt, tokens, hide_length=hide_length, **options)
            rest = seconds[SETTLED:]
            alike = next((k for k, pair in enumerate(zip(found, due, strict=True)) if pair[0] != pair[1]), len(due))
            row = {"loading": f"{loading:.1f}", "first": f"{seconds[0]:.2f}"}
            row["next"] = " ".join(f"{each:.3f}" for each in seconds[1:SETTLED])
            row |= {"median": f"{median(rest):.4f}", "least": f"{min(rest):.4f}", "most": f"{max(rest):.4f}"}
            rows.append(row | {"alike from the first": f"{alike} of {len(due)}"})
    return rows


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shipped", help="as of generate, or SmolLM2-135M-Instruct where installed")
    parser.add_argument("--device", default="cpu", help="as of generate (default: cpu)")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="length of the prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="of each answer, above 4 (default: 24)")
    parser.add_argument("--requests", type=int, default=1, metavar="N", help="one after another (default: 1)")
    parser.add_argument("--peer-memory", action="store_true", help="as of generate")
    parser.add_argument("--hide-length", action="store_true", help="show the tokens after the last step")
    parser.add_argument("--precision", default=DEFAULT, choices=PRECISIONS, help="as of generate")
    given = parser.parse_args()
    if given.tokens <= SETTLED:
        parser.error(f"--tokens is {given.tokens}; give more than {SETTLED}")
    sizes = given.prompt_tokens, given.tokens, given.requests
    print_table(
        measure(resolved(given.model), given.device, *sizes, given.peer_memory, given.hide_length, given.precision)
    )


if __name__ == "__main__":
    sys.exit(main())
