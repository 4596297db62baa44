"""The first thing to run: a private answer about a document, checked against plaintext.

    python -m experiments.demo

The client asks the shipped model about a document that the owner must not see. Three processes on this machine
play owner, client and dealer; nothing is decrypted on the way but the answer's logits, at the client. Afterwards the
same prompt runs in the clear, and the tokens are compared.
"""

import sys
from pathlib import Path

from crypten_llm.commands.show import say, show_generation
from crypten_llm.session.api import PrivateLlama, Request
from experiments.tools.command import command

DOCUMENT = Path(__file__).parent / "demo_prompt.txt"


@command
def main() -> int:
    request = Request(DOCUMENT.read_text("utf-8").rstrip("\n"), max_new_tokens=8)
    say(request.prompt)
    say()
    private = show_generation(request, "shipped", None, False, progress=sys.stderr.isatty())
    with PrivateLlama.from_pretrained("shipped", engine="plain") as llama:
        clear = llama.generate(**vars(request))
    same = private.token_ids == clear.token_ids
    say()
    say(f"the same prompt in the clear: {clear.text.strip()!r}; tokens {'equal' if same else 'DIFFER'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
