"""``doctor``: is this machine ready, and what does the link between two carry?"""

import argparse
from typing import Any

from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import CryptenLLMError, UsageError

HELP = "check this machine and run a tiny private inference; 'network A B': check the link between two parties"


def options(parser: Parser) -> None:
    add = parser.add_argument
    what = "network A B: of these two roles, such as owner dealer; both run it, with RANK 0 and 1 and WORLD_SIZE 2"
    placed = "check the GPUs on which --device of generate would place parties, and what lies between them"
    add("--device", default="", metavar="DEVICE", help=placed)
    add("--model", default="", metavar="M", help="whether this model fits there, or this machine")
    add("--tokens", type=int, default=2048, metavar="N", help="of --model: prompt and answer together (default: 2048)")
    add("what", nargs="*", metavar="network A B", help=what)
    add("--timeout", type=float, default=120.0, metavar="S", help=argparse.SUPPRESS)
    add("--tls", default="", metavar="DIR", help="of network: this party's key and both certificates (see keys)")
    add("--insecure-links", action="store_true", help="of network: plain TCP between hosts all the same")
    add("--host", default="", metavar="ADDRESS", help="of network: address at which the other party reaches this one")
    add("--megabytes", type=int, default=32, metavar="N", help="of network: sent each way (default: 32)")
    add("--idle", type=float, default=65.0, metavar="S", help="of network: silence to be outlasted (default: 65)")
    parser.add_verbose()


def run(arguments: Any) -> None:
    if arguments.what:
        _network(arguments)
        return
    from crypten_llm.commands import doctor

    if not (_devices(arguments) if arguments.device or arguments.model else doctor.run(arguments.timeout)):
        raise CryptenLLMError("the machine is not ready; mend the lines marked NO, from the top")


def _devices(arguments: Any) -> bool:
    from crypten_llm.commands import doctor_device
    from crypten_llm.models import checkpoint
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.settings import split

    placement = arguments.device or "cpu"
    split({"device": placement})  # raises for what names no devices
    if arguments.tokens < 3:
        raise UsageError(f"--tokens is {arguments.tokens}; give 3 or more")
    model = arguments.model and LlamaConfig.from_folder(checkpoint.resolve_config(arguments.model))
    return doctor_device.run(placement, arguments.timeout, model or None, arguments.tokens)


def _network(arguments: Any) -> None:
    word, *roles = arguments.what
    if word != "network":
        raise UsageError(f"doctor does not know {word!r}; say nothing for this machine, or network A B for a link")
    from crypten_llm.commands import doctor_network

    names = ("tls", "insecure_links", "host", "timeout", "megabytes", "idle")
    place = doctor_network.Place(**{name: getattr(arguments, name) for name in names})
    if not doctor_network.run(roles, place):
        raise CryptenLLMError("the link is not ready; mend the line marked NO, and run both ends again")
