"""``bench``: decode steps on random weights."""

from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser

HELP = "time decode steps on random weights and a secret cache"


def options(parser: Parser) -> None:
    shared.add_bench_sizes(parser)
    shared.add_policy(parser)
    parser.add_json()
    shared.add_settings(parser)


def run(arguments: Any) -> None:
    if not shared.asks(arguments):
        return
    from crypten_llm.commands.show import show_bench

    show_bench(shared.bench_shape(arguments), arguments.json, **shared.settings(arguments))
