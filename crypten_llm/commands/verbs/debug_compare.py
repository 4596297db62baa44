"""``debug-compare``: the first operation of engine wire that errs. Insecure, and says so."""

from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import CryptenLLMError

HELP = "INSECURE, reveals everything: run plain and wire on one input and find the first operation that errs"


def options(parser: Parser) -> None:
    shared.add_policy(parser)
    shared.add_policy_weights(parser)
    shared.add_model_and_prompt(parser)
    add = parser.add_argument
    add("--steps", type=int, default=2, metavar="N", help="tokens to generate (default: 2)")
    add("--audit", action="store_true", help="also run engine wire as it is, with masks that may never hide two things")
    parser.add_json()
    parser.add_offline_and_verbose()


def run(arguments: Any) -> None:
    from crypten_llm.commands.debug_compare import audit, compare
    from crypten_llm.commands.show import say, show_audit, show_comparison
    from crypten_llm.models import checkpoint
    from crypten_llm.models.tokenizer import encode_prompt
    from crypten_llm.session.api import Request

    say("INSECURE: debug-compare reveals every value of the model and the prompt to this process")
    request = Request(**shared.prompt(arguments), max_new_tokens=arguments.steps, prefill_chunk=arguments.chunk)
    folder = checkpoint.resolve_model(arguments.model, arguments.offline)
    ids = request.input_ids
    if ids is None:
        tokenizer = checkpoint.load_tokenizer(arguments.tokenizer or folder, arguments.offline)
        assert request.prompt is not None, "what is asked is a text or ids"
        ids = encode_prompt(tokenizer, request.prompt)
    checked = audit(folder, ids, arguments.steps, arguments.chunk) if arguments.audit else None
    comparison = compare(folder, ids, arguments.steps, arguments.chunk, shared.policy(arguments))
    if checked:
        show_audit(checked)
    show_comparison(comparison, arguments.json, checked)
    if comparison.first_beyond:
        raise CryptenLLMError(f"{comparison.describe_first()}; look there first, later errors may follow from it")
