"""``produce``: a dealer that deals ahead of requests, for a stock."""

from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser

HELP = "deal blocks of material ahead of requests, and deliver each party its half; any number of these may run"


def options(parser: Parser) -> None:
    add = parser.add_argument
    add("--owner", required=True, metavar="HOST:PORT", help="where the owner's stock listens")
    add("--client", required=True, metavar="HOST:PORT", help="where the client's stock listens")
    what = "with --tls, which producer this is: its key is that of keys 'producer N'"
    add("--producer", type=int, default=0, metavar="N", help=what)
    add("--blocks", type=int, default=0, metavar="K", help="end after so many (default: 0, never)")
    add("--scratch", default="", metavar="DIR", help="where a block lies until it is delivered (default: $TMPDIR)")
    add("--device", default="cpu", metavar="DEVICE", help="where it computes: cpu or cuda (default: cpu)")
    shared.add_delivery(parser)


def run(arguments: Any) -> None:
    from crypten_llm.commands.produce import produce
    from crypten_llm.engines.wire import computing

    own = f"producer {arguments.producer}" if arguments.producer else ""
    device = computing.usable(arguments.device)
    places = arguments.owner, arguments.client
    produce(*places, shared.delivery(arguments), own, arguments.blocks, arguments.scratch, device)
