"""The first thing to run: a private answer, checked against plaintext.

    python -m experiments.demo             # the shipped model, and then a published one if it is installed
    python -m experiments.demo --real      # the published one alone

The client asks a model about a document, or a question, that the owner must not see. Three processes on this machine
play owner, client and dealer; nothing is decrypted on the way but the answer's logits, at the client. Afterwards the
same prompt runs in the clear, and the tokens are compared.
"""

import argparse
import sys
from pathlib import Path
from time import perf_counter

from crypten_llm.commands.show import say, show_generation
from crypten_llm.session.api import PrivateLlama, Request
from experiments.tools import real_model
from experiments.tools.command import command

DOCUMENT = Path(__file__).parent / "demo_prompt.txt"
QUESTION = "What is the capital of France?"
TIMEOUT = 600.0  # seconds without a sign of a party: on a busy machine one is long at its own part


def ask(request: Request, model: str, progress: bool) -> bool:
    """Answers privately, then in the clear, and shows both; whether the tokens are the same."""
    say(request.prompt)
    say()
    started = perf_counter()
    private = show_generation(request, model, None, False, progress=progress, timeout=TIMEOUT)
    seconds = perf_counter() - started
    with PrivateLlama.from_pretrained(model, engine="plain") as llama:
        clear = llama.generate(**vars(request))
    same = private.token_ids == clear.token_ids
    say()
    say(f"privately:                   {private.text.strip()!r}, in {seconds:.1f} s with all that was loaded")
    say(f"the same prompt in the clear: {clear.text.strip()!r}; tokens {'equal' if same else 'DIFFER'}")
    return same


def ask_the_shipped_model(progress: bool) -> bool:
    return ask(Request(DOCUMENT.read_text("utf-8").rstrip("\n"), max_new_tokens=8), "shipped", progress)


def ask_the_real_model(progress: bool) -> bool:
    path = real_model.found()
    say(f"{real_model.NAME}, {path.stat().st_size / 1e6:.0f} MB of quantised weights, as published")
    say()
    return ask(Request(QUESTION, chat=True, max_new_tokens=12, do_sample=False), str(path), progress)


@command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help=f"ask {real_model.NAME}, which has to be installed")
    arguments = parser.parse_args()
    progress = sys.stderr.isatty()
    if arguments.real:
        return 0 if ask_the_real_model(progress) else 1
    same = ask_the_shipped_model(progress)
    say()
    if real_model.find() is None:
        say(real_model.ABSENT)
    else:
        same = ask_the_real_model(progress) and same
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
