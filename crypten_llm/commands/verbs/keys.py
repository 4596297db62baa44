"""``keys``: a party's own key and certificate, the others' certificates, and how they change."""

from typing import Any

from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import UsageError

HELP = "make a role's key and certificate for encrypted links (--tls), pin those of the others, or rotate one's own"


def options(parser: Parser) -> None:
    parser.add_argument(
        "role", help="owner, client, dealer, or 'producer 1' and on ('compute 2' and on with more parties)"
    )
    parser.add_argument("--out", default="keys", metavar="DIR", help="folder of the files (default: keys)")
    what = parser.add_mutually_exclusive_group().add_argument
    what("--pin", metavar="F.crt", help="take that role's certificate into the folder; its fingerprint must be given")
    steps = "begin: the next key beside the present one; end: into its place, once the others have the new certificate"
    what("--rotate", choices=("begin", "end"), help=steps)
    parser.add_argument("--fingerprint", default="", metavar="HEX", help="of --pin, as that party reads it out")
    parser.add_verbose()


def run(arguments: Any) -> None:
    from crypten_llm.links import rotation, tls

    folder, role = arguments.out, arguments.role
    if arguments.fingerprint and not arguments.pin:
        raise UsageError("--fingerprint is of a certificate that is pinned; give that with --pin")
    if arguments.pin:
        print(f"{rotation.pin(folder, role, arguments.pin, arguments.fingerprint)}: links accept it from now on")
        return
    if arguments.rotate == "begin":
        made = rotation.begin(folder, role)
        print(
            f"{made.key}: the next key\n{made.certificate}: give it to the other parties, who pin it; then --rotate end"
        )
    elif arguments.rotate == "end":
        made = rotation.end(folder, role)
        print(f"{made.key}: the key in use from the next start on\n{made.certificate}: give it to the other parties")
    else:
        made = tls.make_key(folder, role)
        print(f"{made.key}: stays here, readable by you alone\n{made.certificate}: give it to the other parties")
    print(f"fingerprint, for them to compare: {made.fingerprint}")
