"""``generate``: a private answer to a prompt, or to each of a file of prompts."""

from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import UsageError

HELP = "answer a prompt that nobody else sees, with weights that you do not see"


def options(parser: Parser) -> None:
    shared.add_model_and_prompt(parser)
    add = parser.add_argument
    add("--chat", action="store_true", help="apply the tokenizer's chat template to the text, as a user's message")
    add("--system", metavar="TEXT", help="a system message before it, with --chat")
    file = "a file of prompts, one JSON object a line: prompt or messages, and at will id and max_new_tokens"
    shared.add_public_prefix(parser)
    shared.add_public_system(parser)
    add("--prompts", metavar="F.jsonl", help=file)
    out = "where the answers go, one JSON object a line; those that are there already are kept"
    add("--out", metavar="F.jsonl", help=out)
    add("--batch-size", type=int, metavar="N", help="prompts of --prompts that share their rounds (default: 8)")
    shared.add_answer(parser)
    add("--logprobs", type=int, metavar="K", help="with --json, --out: each token's log-probability and the K best's")
    length = parser.add_mutually_exclusive_group().add_argument
    what = (
        "run all N steps, then show the answer at once: only the client knows its length (default with --json, --out)"
    )
    length("--hide-length", action="store_true", default=None, help=what)
    what = "end with the answer, whose length the others then learn (default where it is streamed)"
    length("--show-length", dest="hide_length", action="store_false", default=None, help=what)
    shared.add_policy(parser)
    add("--receipt", metavar="F.json", help="write what all parties sign of this answer (see verify)")
    parser.add_json()
    shared.add_helper(parser)
    shared.add_settings(parser)


def run(arguments: Any) -> None:
    if not shared.asks(arguments):
        return
    asked = shared.answer(arguments)
    asked |= {name: getattr(arguments, name) for name in ("chat", "system", "public_system", "logprobs", "hide_length")}
    if asked["hide_length"] is None:
        asked["hide_length"] = arguments.engine != "plain" and (arguments.json or arguments.prompts is not None)
    asked["public_prefix"] = shared.public_prefix(arguments)
    where = {"model": arguments.model, "tokenizer": arguments.tokenizer, **shared.settings(arguments)}
    if arguments.prompts is not None:
        _answer_file(arguments, asked, where)
        return
    if arguments.receipt is not None and arguments.engine == "plain":
        raise UsageError("--receipt is what parties sign, and engine 'plain' has one alone; leave it out")
    for option in ("out", "batch_size"):
        if getattr(arguments, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} belongs to a file of prompts; give that with --prompts")
    from crypten_llm.commands.show import show_generation
    from crypten_llm.session.request import Request

    show_generation(
        Request(**shared.prompt(arguments), **asked), as_json=arguments.json, receipt=arguments.receipt, **where
    )


def _answer_file(arguments: Any, asked: dict, where: dict) -> None:
    if any(given is not None for given in (arguments.prompt, arguments.prompt_file, arguments.prompt_ids)):
        raise UsageError("--prompts is a file of prompts; leave --prompt, --prompt-file and --prompt-ids out")
    if arguments.out is None:
        raise UsageError("--prompts needs --out F.jsonl, where the answers go")
    if arguments.json:
        raise UsageError("--json is of one answer; those of --prompts are in --out")
    if arguments.receipt is not None:
        raise UsageError("--receipt is of one answer; leave it out with --prompts")
    from crypten_llm.commands.prompts import answer_file

    answer_file(arguments.prompts, arguments.out, asked, arguments.batch_size, **where)
