"""``serve``: an endpoint at the client, with parties that stay up."""

from __future__ import annotations

from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import UsageError
from crypten_llm.serving.fair_queue import ROOM

HELP = "answer programs that know OpenAI's interface, and people at a page; the parties stay up in between"


def options(parser: Parser) -> None:
    parser.add_model()
    shared.add_tokenizer(parser)
    add = parser.add_argument
    add("--local", action="store_true", help="start all parties on this machine; refused where others started them")
    add("--listen", default="127.0.0.1", metavar="ADDRESS", help="where the endpoint listens (default: 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="P", help="its port, 0 for any that is free (default: 8000)")
    file = "a file with an API key a line, of which a request must bring one; or one in CRYPTEN_LLM_API_KEY"
    add("--api-keys", default="", metavar="F", help=file)
    add(
        "--https",
        nargs=2,
        metavar=("CERTIFICATE", "KEY"),
        help="files for HTTPS, which --listen beyond this host takes",
    )
    add("--queue", type=int, default=16, metavar="N", help="most requests of an API key that wait (default: 16)")
    add("--together", type=int, default=ROOM, metavar="N", help=f"answers that grow at the same time (default: {ROOM})")
    what = "conversations whose caches the parties keep for a further turn, 0 for none (default: 8)"
    add("--keep", type=int, default=8, metavar="N", help=what)
    what = "drop a conversation without a further turn for so long (default: 30)"
    add("--keep-minutes", type=float, default=30.0, metavar="M", help=what)
    what = "most memory of kept caches at a compute party; the oldest is dropped (default: 4)"
    add("--keep-gigabytes", type=float, default=4.0, metavar="G", help=what)
    what = "with --stock: take a block only where nobody else waits; others share rounds, and a dealer follows them"
    add("--stock-only-alone", action="store_true", help=what)
    add("--name", default="", metavar="NAME", help="what the model is called in requests (default: its folder's name)")
    add("--open", action="store_true", help="show the page in a browser")
    what = "end, with the error, where the parties have ended: for what starts it again (default: stay, and say so)"
    add("--end-with-parties", action="store_true", help=what)
    shared.add_public_system(parser)
    length = parser.add_mutually_exclusive_group().add_argument
    what = "of requests that do not say: run all steps, so that only the client knows the answer's length"
    length("--hide-length", action="store_true", default=None, help=f"{what} (default where it is not streamed)")
    what = "of requests that do not say: end with the answer, whose length the others then learn"
    length("--show-length", dest="hide_length", action="store_false", default=None, help=what)
    parser.add_chunk()
    shared.add_policy(parser)
    shared.add_helper(parser)
    shared.add_settings(parser)


def run(arguments: Any) -> None:
    from crypten_llm.session.launch import is_distributed

    if arguments.local and is_distributed():
        raise UsageError(
            "--local starts all parties here, but RANK or WORLD_SIZE says that they are started: leave it out"
        )
    policy = shared.policy(arguments)
    if not shared.asks(arguments):
        return
    from crypten_llm.commands.serve import Place, serve
    from crypten_llm.serving.asking import Usual
    from crypten_llm.serving.kept import Keeping

    keeping = Keeping(arguments.keep, arguments.keep_minutes, arguments.keep_gigabytes)
    same = {name: getattr(arguments, name) for name in ("listen", "port", "api_keys", "queue", "together", "name")}
    https = tuple(arguments.https) if arguments.https else None
    usual = Usual(policy, arguments.chunk, arguments.hide_length, arguments.public_system)
    where = {"model": arguments.model, "tokenizer": arguments.tokenizer, **shared.settings(arguments)}
    ends = arguments.end_with_parties
    apart = {"opens": arguments.open, "ends": ends, "keeping": keeping, "only_alone": arguments.stock_only_alone}
    serve(Place(**same, https=https, **apart), usual, **where)
