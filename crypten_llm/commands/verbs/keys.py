"""``keys``: a party's own key and certificate."""

from typing import Any

from crypten_llm.commands.command_line import Parser

HELP = "make a role's key and certificate for encrypted links (--tls); give the others the certificate"


def options(parser: Parser) -> None:
    parser.add_argument("role", help="owner, client or dealer ('compute 2' and on with more parties)")
    parser.add_argument("--out", default="keys", metavar="DIR", help="folder of the files (default: keys)")
    parser.add_verbose()


def run(arguments: Any) -> None:
    from crypten_llm.links import tls

    made = tls.make_key(arguments.out, arguments.role)
    print(f"{made.key}: stays here, readable by you alone\n{made.certificate}: give it to the other parties")
    print(f"fingerprint, for them to compare: {made.fingerprint}")
