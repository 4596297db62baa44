"""``party``: every party but the client, started by hand or by the client of a local run."""

import argparse
from dataclasses import asdict
from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import UsageError

HELP = "serve as the party that RANK says (owner, compute or dealer) until the client is done"


def options(parser: Parser) -> None:
    parser.add_argument("--model", default="", help="what the owner shares: 'shipped', a folder, GGUF file or hub id")
    parser.add_argument("--child", metavar="JSON", help=argparse.SUPPRESS)  # in the place of all other options
    shared.add_settings(parser)


def run(arguments: Any) -> None:
    if arguments.child:
        _serve_parent(arguments)
        return
    if arguments.engine == "plain":
        raise UsageError("engine 'plain' runs in one process and has no other parties; use 'generate'")
    shared.serve(arguments)


def _serve_parent(arguments: Any) -> None:
    told = shared.told_by_parent(arguments)
    from crypten_llm.session.api import PrivateLlama

    PrivateLlama.serve(told.model, **asdict(told.protocol), **asdict(told.launch))
