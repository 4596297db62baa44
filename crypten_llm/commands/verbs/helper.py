"""``helper``: a second compute party for thin clients, which are none; with it owner and dealer."""

import argparse
from dataclasses import asdict
from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import UsageError

HELP = "compute for thin clients, one after another, which share their prompts between owner and this party"


def options(parser: Parser) -> None:
    parser.add_argument(
        "--model", default="shipped", help="what the owner shares: 'shipped', a folder, GGUF file or hub id"
    )
    what = "start owner, helper and dealer on this machine: to try it out; refused where others started them"
    parser.add_argument("--local", action="store_true", help=what)
    parser.add_argument("--child", metavar="JSON", help=argparse.SUPPRESS)  # in the place of all other options
    shared.add_settings(parser)


def run(arguments: Any) -> None:
    from crypten_llm.session.launch import is_client, is_distributed
    from crypten_llm.session.settings import split

    if arguments.child:
        _serve_parent(arguments)
        return
    settings = {**shared.settings(arguments), "helper": True}
    protocol, _ = split(settings)
    if arguments.local == is_distributed():
        raise UsageError(
            "--local starts all parties here, but RANK or WORLD_SIZE says that they are started: leave it out"
            if arguments.local
            else "a helper is one of three parties: start each with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, "
            "this one as rank 1; or all of them here with --local"
        )
    if not is_client(protocol):
        from crypten_llm.session.api import PrivateLlama

        PrivateLlama.serve(arguments.model, **settings)
        return
    from crypten_llm.commands.helper import serve

    serve(arguments.model, **settings)


def _serve_parent(arguments: Any) -> None:
    told = shared.told_by_parent(arguments)
    from crypten_llm.commands.helper import serve

    serve(told.model, **asdict(told.protocol), **asdict(told.launch))
