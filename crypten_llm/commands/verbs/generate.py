"""``generate``: a private answer to a prompt."""

from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser

HELP = "answer a prompt that nobody else sees, with weights that you do not see"


def options(parser: Parser) -> None:
    shared.add_model_and_prompt(parser)
    add = parser.add_argument
    add("--chat", action="store_true", help="apply the tokenizer's chat template to the text, as a user's message")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="(default: 32)")
    add("--temperature", type=float, metavar="T", help="sample with this temperature instead of greedy decoding")
    add("--top-k", type=int, metavar="K", help="sample among the K best tokens")
    add("--top-p", type=float, metavar="P", help="sample among the best tokens that hold probability P")
    add("--seed", type=int, help="of the client's sampling; no secret depends on it")
    what = "run all N steps, then show the answer at once: only the client knows its length"
    add("--hide-length", action="store_true", help=what)
    shared.add_policy(parser)
    parser.add_json()
    shared.add_settings(parser)


def run(arguments: Any) -> None:
    if not shared.asks(arguments):
        return
    from crypten_llm.commands.show import show_generation
    from crypten_llm.session.api import Request

    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    request = Request(
        **shared.prompt(arguments),
        **sampling,
        do_sample=bool(sampling),
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        hide_length=arguments.hide_length,
        prefill_chunk=arguments.chunk,
        policy=shared.policy(arguments),
        chat=arguments.chat,
    )
    show_generation(request, arguments.model, arguments.tokenizer, arguments.json, **shared.settings(arguments))
