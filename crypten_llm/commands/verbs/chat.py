"""``chat``: a conversation at the terminal."""

from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser

HELP = "talk with a model at the terminal; nobody else sees a word, and a turn costs its own tokens alone"


def options(parser: Parser) -> None:
    parser.add_model()
    shared.add_tokenizer(parser)
    parser.add_argument("--system", metavar="TEXT", help="a message of the system before all turns")
    shared.add_public_system(parser)
    parser.add_chunk()
    parser.add_padded(None)
    shared.add_answer(parser)
    shared.add_policy(parser)
    shared.add_helper(parser)
    shared.add_settings(parser)


def run(arguments: Any) -> None:
    if not shared.asks(arguments):
        return
    from crypten_llm.commands.chat import chat

    asked = {**shared.answer(arguments), "public_system": arguments.public_system}
    where = {"model": arguments.model, "tokenizer": arguments.tokenizer, **shared.settings(arguments)}
    chat(arguments.system, asked, **where)
