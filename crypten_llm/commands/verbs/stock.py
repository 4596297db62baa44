"""``stock``: a party's stock of material, to which producers deliver."""

from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser

HELP = "keep a party's stock of material that producers deal ahead of requests (see produce)"


def options(parser: Parser) -> None:
    parser.add_argument("role", choices=("owner", "client"), help="whose stock it is")
    add = parser.add_argument
    add("--stock", required=True, metavar="DIR", help="folder of the stock, which a party's --stock names too")
    add("--show", action="store_true", help="print what is in stock, a JSON object a line, and end")
    add("--listen", default="127.0.0.1", metavar="ADDRESS", help="where producers deliver (default: 127.0.0.1)")
    add("--port", type=int, default=0, metavar="P", help="at which port (default: any that is free)")
    what = 'at the client, what is wanted: [{"prompt_tokens": 512, "max_new_tokens": 64, "blocks": 4}, ...]'
    add("--levels", default="", metavar="F.json", help=what)
    what = "most disk that its halves may take (default: 50)"
    add("--most-gigabytes", type=float, default=50.0, metavar="G", help=what)
    shared.add_delivery(parser)


def run(arguments: Any) -> None:
    from crypten_llm.commands import stock

    if arguments.show:
        stock.show(arguments.role, arguments.stock)
        return
    given = arguments.role, arguments.stock, arguments.listen, arguments.port, arguments.levels
    stock.keep(*given, arguments.most_gigabytes, shared.delivery(arguments))
