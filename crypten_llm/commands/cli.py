"""The command line: ``generate``, ``bench``, ``cost``, ``deal``, ``trace``, ``keys``, ``doctor``, and ``party``, which
only serves.

Owns the commands and their arguments. stdout carries the answer (and, with ``--json``, one JSON object as its last
line). torch is imported after the arguments have been read, so that a typing error is answered at once.
"""

import argparse
import json
import sys

from crypten_llm.commands.command_line import Parser, add_command, read_text, run, whole_numbers
from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.session.settings import DEFAULT_PRECISION_BITS

_SIZES = ("hidden", "heads", "kv-heads", "ffn", "layers", "vocab")  # of a model that is only counted


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    return run(_parser, argv)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m crypten_llm", description="Private Llama inference under secure multi-party computation."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    what = "answer a prompt that nobody else sees, with weights that you do not see"
    generate = add_command(commands, "generate", _generate, what)
    _model_and_prompt_options(generate)
    add = generate.add_argument
    add("--max-new-tokens", type=int, default=32, metavar="N", help="(default: 32)")
    add("--temperature", type=float, metavar="T", help="sample with this temperature instead of greedy decoding")
    add("--top-k", type=int, metavar="K", help="sample among the K best tokens")
    add("--top-p", type=float, metavar="P", help="sample among the best tokens that hold probability P")
    add("--seed", type=int, help="of the client's sampling; no secret depends on it")
    what = "run all N steps, then show the answer at once: only the client knows its length"
    add("--hide-length", action="store_true", help=what)

    bench = add_command(commands, "bench", _bench, "time decode steps on random weights and a secret cache")

    deal = add_command(commands, "deal", _deal, "write a tape: all that a dealer would send in a run of engine wire")
    add = deal.add_argument
    add("--model", default="shipped", help="a folder with its config.json, or as for generate (default: shipped)")
    add("--prompt-tokens", type=int, metavar="N", help="length of the prompt; the tape fits no other")
    add("--max-new-tokens", type=int, default=32, metavar="N", help="longest answer (default: 32)")
    deal.add_chunk()
    add("--requests", type=int, default=1, metavar="K", help="how many such requests in one session (default: 1)")
    add("--out", required=True, metavar="DIR", help="the new folder: owner.tape, client.tape and manifest.json")
    deal.add_offline_and_verbose()
    add("--bench", action="store_true", help="for a bench of these sizes instead of a model:")

    sizes = {"hidden": 256, "heads": 8, "kv-heads": 8, "ffn": 688, "layers": 1, "kv-len": 1024, "steps": 5}
    for command in (bench, deal):
        for name, default in sizes.items():
            command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")

    for command in (generate, bench, deal):
        _policy_options(command)
    for command in (generate, bench):
        command.add_json()
        _run_options(command)

    cost = add_command(commands, "cost", _cost, "count what a request will cost on engine wire, from a model's sizes")
    add = cost.add_argument
    add("--model", metavar="M", help="'shipped', a folder with its config.json, or a hub id; no weights are read")
    add("--config", metavar="F", help="a config.json instead of a model")
    for name in _SIZES:
        add(f"--{name}", type=int, metavar="N", help="or sizes as in bench" if name == _SIZES[0] else None)
    add("--prompt-tokens", type=int, required=True, metavar="N", help="length of the prompt")
    add("--new-tokens", type=int, default=2, metavar="N", help="length of the answer (default: 2)")
    cost.add_chunk()
    _policy_options(cost)
    add("--network", default="", metavar="lan|wan|RTTms,Mbit", help="the links between the parties (default: none)")
    cost.add_json()
    cost.add_offline_and_verbose()

    what = "INSECURE, reveals everything: run plain and wire on one input and find the first operation that errs"
    compare = add_command(commands, "debug-compare", _debug_compare, what)
    _policy_options(compare)
    _model_and_prompt_options(compare)
    add = compare.add_argument
    add("--steps", type=int, default=2, metavar="N", help="tokens to generate (default: 2)")
    add("--audit", action="store_true", help="also run engine wire as it is, with masks that may never hide two things")
    compare.add_json()
    compare.add_offline_and_verbose()

    what = "which positions a policy keeps and attends to; INSECURE with --engine wire, which then opens everything"
    trace = add_command(commands, "trace", _trace, what)
    add = trace.add_argument
    add("--policy", required=True, help="its name, or name(setting=value,...)")
    trace.add_policy_settings()
    trace.add_model()
    add("--prompt-ids", required=True, metavar="FILE", help="a file of token ids, separated by commas or space")
    add("--steps", type=int, default=4, metavar="N", help="decode steps (default: 4)")
    add("--engine", default="plain", help="plain or wire (default: plain)")
    trace.add_chunk()
    trace.add_json()
    add("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf")
    trace.add_offline_and_verbose()

    what = "serve as the party that RANK says (owner, compute or dealer) until the client is done"
    party = add_command(commands, "party", _party, what)
    party.add_argument("--model", default="", help="what the owner shares: 'shipped', a folder, or a hub id")
    party.add_argument("--end-with-parent", action="store_true", help=argparse.SUPPRESS)
    _run_options(party)

    what = "make a role's key and certificate for encrypted links (--tls); give the others the certificate"
    keys = add_command(commands, "keys", _keys, what)
    keys.add_argument("role", help="owner, client or dealer ('compute 2' and on with more parties)")
    keys.add_argument("--out", default="keys", metavar="DIR", help="folder of the files (default: keys)")
    keys.add_argument("--verbose", action="store_true", help="show tracebacks")

    doctor = add_command(commands, "doctor", _doctor, "check this machine and run a tiny private inference")
    doctor.add_argument("--timeout", type=float, default=120.0, metavar="S", help=argparse.SUPPRESS)
    doctor.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser


def _model_and_prompt_options(parser: Parser) -> None:
    parser.add_model()
    what = "the client's tokenizer: a folder or hub id (default: the model's)"
    parser.add_argument("--tokenizer", help=what)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the client's text")
    file = "a file with the client's text, one newline at its end left out; - for standard input"
    prompt.add_argument("--prompt-file", metavar="F", help=file)
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="the client's token ids; a file of ids after @")
    parser.add_chunk()


def _policy_options(parser: Parser) -> None:
    what = "KV-cache eviction policy (default: full); python -m eviction list shows all"
    parser.add_argument("--policy", default="full", help=what)
    parser.add_policy_settings()


def _policy(arguments) -> str:
    """The policy and its settings as the text that parties agree on."""
    from crypten_llm.session.generation import parse_policy

    return str(parse_policy(arguments.policy, *arguments.set))


def _run_options(parser: Parser) -> None:
    parser.add_offline_and_verbose(shown="tracebacks and what the other parties print")
    add = parser.add_argument_group("run").add_argument
    add("--engine", default="wire", help="plain (no privacy), crypten or wire (default: wire)")
    add("--parties", type=int, default=2, metavar="N", help="compute parties; the dealer comes on top (default: 2)")
    what = f"fractional bits of a secret on engine crypten (default: {DEFAULT_PRECISION_BITS})"
    add("--precision-bits", type=int, default=DEFAULT_PRECISION_BITS, metavar="F", help=what)
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds any wait may last (default: 300)")
    add("--network", default="", metavar="lan|wan|RTTms,Mbit", help="emulate a network between local parties")
    add("--threads", type=int, default=0, metavar="N", help="torch threads (default: cores / local processes)")
    add("--host", default="", metavar="ADDRESS", help="address at which the other parties reach this process")
    add("--tls", default="", metavar="DIR", help="this party's key and all certificates (see keys): encrypted links")
    what = "this party's file of a tape, or its folder: takes the dealer's place (see deal)"
    add("--tape", default="", metavar="PATH", help=what)


def _settings(arguments) -> dict:
    """Keyword arguments of ``settings.split``."""
    return {
        "engine": arguments.engine,
        "compute_parties": arguments.parties,
        "precision_bits": arguments.precision_bits,
        "tape": arguments.tape,
        "progress": sys.stderr.isatty(),
        **{name: getattr(arguments, name) for name in ("timeout", "network", "threads", "host", "tls")},
        **{name: getattr(arguments, name) for name in ("offline", "verbose")},
    }


def _asks(arguments) -> bool:
    """Whether this process is the client. In a torchrun job the others run the same command, and serve here."""
    from crypten_llm.session import launch, settings

    protocol, _ = settings.split(_settings(arguments))
    if launch.is_client(protocol):
        return True
    if protocol.is_private:
        _serve(arguments)
    return False


def _party(arguments) -> None:
    if arguments.engine == "plain":
        raise UsageError("engine 'plain' runs in one process and has no other parties; use 'generate'")
    if arguments.end_with_parent:
        from crypten_llm.session.lifeline import end_with_parent

        end_with_parent()
    _serve(arguments)


def _serve(arguments) -> None:
    from crypten_llm.session.api import PrivateLlama

    PrivateLlama.serve(getattr(arguments, "model", ""), **_settings(arguments))


def _generate(arguments) -> None:
    if not _asks(arguments):
        return
    from crypten_llm.commands.show import show_generation
    from crypten_llm.session.api import Request

    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    request = Request(
        **_prompt(arguments),
        **sampling,
        do_sample=bool(sampling),
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        hide_length=arguments.hide_length,
        prefill_chunk=arguments.chunk,
        policy=_policy(arguments),
    )
    show_generation(request, arguments.model, arguments.tokenizer, arguments.json, **_settings(arguments))


def _prompt(arguments) -> dict:
    """The client's prompt as arguments of ``Request``."""
    if arguments.prompt_file is not None:
        return {"prompt": _prompt_text(arguments.prompt_file)}
    if arguments.prompt_ids is not None:
        given = arguments.prompt_ids
        text = read_text("--prompt-ids", given[1:]) if given.startswith("@") else given
        return {"input_ids": whole_numbers("--prompt-ids", text)}
    if arguments.prompt is None:
        raise UsageError("no prompt; give --prompt TEXT, --prompt-file F or --prompt-ids 1,2,3")
    return {"prompt": arguments.prompt}


def _prompt_text(path: str) -> str:
    """The file's text without the newline that an editor or ``echo`` ends it with: it would be a token of its own."""
    text = sys.stdin.read() if path == "-" else read_text("--prompt-file", path)
    return text.removesuffix("\n")


def _bench(arguments) -> None:
    if not _asks(arguments):
        return
    from crypten_llm.commands.show import show_bench

    show_bench(_shape(arguments), arguments.json, **_settings(arguments))


def _shape(arguments):
    from crypten_llm.session.bench import Shape

    names = ("hidden", "heads", "kv_heads", "ffn", "layers", "kv_len", "steps")
    return Shape(**{name: getattr(arguments, name) for name in names}, policy=_policy(arguments))


def _deal(arguments) -> None:
    if not arguments.bench and arguments.prompt_tokens is None:
        raise UsageError("for how long a prompt? give --prompt-tokens N (or --bench and its sizes)")
    from crypten_llm.commands.deal import deal
    from crypten_llm.commands.show import say
    from crypten_llm.models import checkpoint
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.generation import Plan

    if arguments.bench:
        work, config = _shape(arguments), None
    else:
        work = Plan(arguments.prompt_tokens, arguments.max_new_tokens, arguments.chunk, policy=_policy(arguments))
        config = LlamaConfig.from_folder(checkpoint.resolve_config(arguments.model, arguments.offline))
    deal(work, arguments.out, config, arguments.requests, say, progress=sys.stderr.isatty())


def _cost(arguments) -> None:
    from crypten_llm.commands.cost import predict
    from crypten_llm.commands.show import show_cost
    from crypten_llm.links.network import parse_network
    from crypten_llm.session.generation import Plan

    plan = Plan(arguments.prompt_tokens, arguments.new_tokens, arguments.chunk, policy=_policy(arguments))
    network = parse_network(arguments.network) if arguments.network else None
    show_cost(predict(_config(arguments), plan, network), arguments.json)


def _config(arguments):
    """The model that ``cost`` is asked about: of a model, of a file, or of sizes."""
    from crypten_llm.models import checkpoint
    from crypten_llm.models.config import LlamaConfig

    sizes = {name: getattr(arguments, name.replace("-", "_")) for name in _SIZES}
    given = [name for name in ("model", "config") if getattr(arguments, name)]
    given += ["hidden"] if any(sizes.values()) else []
    if len(given) != 1:
        raise UsageError("which model? give one of --model M, --config F, or its sizes (--hidden, --heads, ...)")
    if arguments.model:
        return LlamaConfig.from_folder(checkpoint.resolve_config(arguments.model, arguments.offline))
    if arguments.config:
        return LlamaConfig.from_file(arguments.config)
    for name in ("hidden", "heads", "ffn", "layers"):
        if sizes[name] is None:
            raise UsageError(f"--{name} is missing; give --hidden, --heads, --ffn and --layers")
    sizes["kv_heads"] = sizes.pop("kv-heads") or sizes["heads"]
    sizes["vocab"] = sizes["vocab"] or 32000
    return LlamaConfig.from_sizes(**sizes, context=arguments.prompt_tokens + arguments.new_tokens)


def _debug_compare(arguments) -> None:
    from crypten_llm.commands.debug_compare import audit, compare
    from crypten_llm.commands.show import say, show_audit, show_comparison
    from crypten_llm.models import checkpoint
    from crypten_llm.session.api import Request

    say("INSECURE: debug-compare reveals every value of the model and the prompt to this process")
    request = Request(**_prompt(arguments), max_new_tokens=arguments.steps, prefill_chunk=arguments.chunk)
    folder = checkpoint.resolve_model(arguments.model, arguments.offline)
    ids = request.input_ids
    if ids is None:
        tokenizer = checkpoint.load_tokenizer(arguments.tokenizer or folder, arguments.offline)
        ids = list(tokenizer(request.prompt)["input_ids"])
    checked = audit(folder, ids, arguments.steps, arguments.chunk) if arguments.audit else None
    comparison = compare(folder, ids, arguments.steps, arguments.chunk, _policy(arguments))
    if checked:
        show_audit(checked)
    show_comparison(comparison, arguments.json, checked)
    if comparison.first_beyond:
        raise CryptenLLMError(f"{comparison.describe_first()}; look there first, later errors may follow from it")


def _keys(arguments) -> None:
    from crypten_llm.links import tls

    made = tls.make_key(arguments.out, arguments.role)
    print(f"{made.key}: stays here, readable by you alone\n{made.certificate}: give it to the other parties")
    print(f"fingerprint, for them to compare: {made.fingerprint}")


def _doctor(arguments) -> None:
    from crypten_llm.commands import doctor

    if not doctor.run(arguments.timeout):
        raise CryptenLLMError("the machine is not ready; mend the lines marked NO, from the top")


def _trace(arguments) -> None:
    from crypten_llm.commands.trace import trace
    from crypten_llm.models import checkpoint
    from crypten_llm.session.generation import parse_policy

    policy = parse_policy(arguments.policy, *arguments.set)
    if arguments.steps < 1:
        raise UsageError(f"--steps is {arguments.steps}; it must be 1 or more")
    ids = _ids(arguments.prompt_ids)
    if arguments.engine == "wire":
        print("INSECURE: this trace reveals every choice of the policy to this process", file=sys.stderr)
    folder = checkpoint.resolve_model(arguments.model, arguments.offline)
    found = trace(folder, policy, ids, arguments.steps, arguments.engine, arguments.chunk)
    if arguments.plot:
        from crypten_llm.commands.plot import save

        try:
            save(found, arguments.plot)
        except ValueError as error:
            raise UsageError(f"--plot {arguments.plot}: {error}") from None
    print(json.dumps(found.to_dict()) if arguments.json else _summary(found))


def _ids(path: str) -> list[int]:
    ids = whole_numbers(f"--prompt-ids {path}", read_text("--prompt-ids", path))
    if not ids:
        raise UsageError(f"--prompt-ids: {path} is empty; give at least one token id")
    return ids


def _summary(found) -> str:
    """Rows kept and attended to, and the mass recovered, by layer."""
    lines = [f"{found.policy} on {found.engine}, {found.prompt_tokens} prompt tokens"]
    lines.append("layer  kept  attended  mass recovered")
    for index, record in enumerate(found.layers):
        mass = sum(record.mass) / len(record.mass)
        lines.append(f"{index:5}  {record.kept[0].shape[1]:4}  {record.attended[-1].shape[1]:8}  {mass:14.4f}")
    return "\n".join(lines)
