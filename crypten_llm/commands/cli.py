"""The command line: which commands there are.

Owns their order and the parser around them; each has its options and its run in a file of ``verbs``. stdout carries
the answer (and, with ``--json``, one JSON object as its last line). torch is imported after the arguments have been
read, so that a typing error is answered at once.
"""

import crypten_llm
from crypten_llm.commands.command_line import Parser, add_command, run
from crypten_llm.commands.verbs import (
    bench,
    calibrate,
    chat,
    cost,
    deal,
    debug_compare,
    doctor,
    generate,
    helper,
    keys,
    party,
    produce,
    serve,
    stock,
    trace,
    verify,
)

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "deal": deal,
    "stock": stock,
    "produce": produce,
    "cost": cost,
    "calibrate": calibrate,
    "debug-compare": debug_compare,
    "trace": trace,
    "party": party,
    "helper": helper,
    "keys": keys,
    "verify": verify,
    "doctor": doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    return run(_parser, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m crypten_llm", description="Private Llama inference under secure multi-party computation."
    )
    version = f"crypten-llm {crypten_llm.__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version and end")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.options(add_command(commands, name, command.run, command.HELP))
    return parser
