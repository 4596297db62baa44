"""``doctor``: is this machine ready?"""

import argparse
from typing import Any

from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import CryptenLLMError

HELP = "check this machine and run a tiny private inference"


def options(parser: Parser) -> None:
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help=argparse.SUPPRESS)
    parser.add_verbose()


def run(arguments: Any) -> None:
    from crypten_llm.commands import doctor

    if not doctor.run(arguments.timeout):
        raise CryptenLLMError("the machine is not ready; mend the lines marked NO, from the top")
