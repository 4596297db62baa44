"""``verify``: what of a receipt holds."""

from typing import Any

from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import CryptenLLMError, UsageError

HELP = "check a request's receipt: the parties' signatures, and that they have seen the same"


def options(parser: Parser) -> None:
    add = parser.add_argument
    add("receipt", metavar="RECEIPT", help="a file of generate --receipt, or of an endpoint's /v1/receipts")
    add("--keys", default="", metavar="DIR", help="folder with the certificates of all parties, as pinned (see keys)")
    what = "compare the owner's commitment with these weights, with its key in --keys, or an --opening"
    add("--model", default="", metavar="PATH", help=what)
    add("--opening", default="", metavar="HEX", help="of the commitment, as the owner tells it")
    parser.add_verbose()


def run(arguments: Any) -> None:
    from crypten_llm.session import verification

    if arguments.opening and not arguments.model:
        raise UsageError("--opening is of weights; give those with --model")
    receipts = verification.read(arguments.receipt).receipts
    failed = 0
    for number, receipt in enumerate(receipts, 1):
        if len(receipts) > 1:
            print(f"answer {number} of {len(receipts)}")
        found = list(verification.check(receipt, arguments.keys))
        if arguments.model:
            given = arguments.model, arguments.keys, arguments.opening
            found.append(verification.check_weights(receipt, *given))
        for finding in found:
            failed += not finding.holds
            print(f"{'ok' if finding.holds else 'NO'}  {finding.what:<22}{finding.words}")
    if failed:
        raise CryptenLLMError("the receipt does not hold; what does not is marked NO")
