"""``deal``: a tape, which takes the dealer's place in a run."""

import sys
from typing import Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import UsageError

HELP = "write a tape: all that a dealer would send in a run of engine wire"


def options(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="shipped", help="a folder with its config.json, or as for generate (default: shipped)")
    add("--prompt-tokens", type=int, metavar="N", help="length of the prompt; the tape fits no other")
    shared.add_public_count(parser)
    add("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    parser.add_chunk()
    parser.add_padded()
    add("--requests", type=int, default=1, metavar="K", help="how many such requests in one session (default: 1)")
    add("--out", required=True, metavar="DIR", help="the new folder: 'owner' and 'client', each for that party alone")
    add("--tls", default="", metavar="DIR", help="sign with the dealer's key in this folder (see keys), for --tls")
    add("--device", default="cpu", metavar="DEVICE", help="where the dealer computes: cpu or cuda (default: cpu)")
    parser.add_offline_and_verbose()
    add("--bench", action="store_true", help="for a bench of these sizes instead of a model:")
    shared.add_bench_sizes(parser)
    shared.add_policy(parser)
    shared.add_policy_weights(parser)
    shared.add_reveal(parser)
    shared.add_precision(parser)


def run(arguments: Any) -> None:
    if not arguments.bench and arguments.prompt_tokens is None:
        raise UsageError("for how long a prompt? give --prompt-tokens N (or --bench and its sizes)")
    from crypten_llm.commands.deal import deal
    from crypten_llm.commands.show import say
    from crypten_llm.engines.wire import computing
    from crypten_llm.models import checkpoint
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.bench import Shape
    from crypten_llm.session.plan import Plan

    if arguments.bench:
        work: Plan | Shape = shared.bench_shape(arguments)
        config = None
    else:
        policy = shared.policy(arguments)
        prefix = shared.counted_prefix(arguments)
        facts = {"policy": policy, "public_prefix": prefix, "padded": arguments.padded, **shared.revealed(arguments)}
        work = Plan(arguments.prompt_tokens, arguments.max_new_tokens, arguments.chunk, **facts)
        config = LlamaConfig.from_folder(checkpoint.resolve_config(arguments.model, arguments.offline))
    device = computing.usable(arguments.device)
    precision = arguments.precision
    deal(work, arguments.out, config, arguments.requests, say, sys.stderr.isatty(), arguments.tls, device, precision)
