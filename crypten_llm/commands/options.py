"""Options that several commands have, and what they are read into.

Owns the options of a run, which are made from the fields of its settings, and those of models, prompts and policies.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from crypten_llm.commands.command_line import Parser, read_text, whole_numbers
from crypten_llm.errors import UsageError
from crypten_llm.precisions import DEFAULT, PRECISIONS
from crypten_llm.session.settings import LaunchConfig, ProtocolConfig

if TYPE_CHECKING:
    from crypten_llm.session.bench import Shape

PADDED_ON_A_GPU = 256
BENCH_SIZES = {
    "hidden": 256,
    "heads": 8,
    "kv_heads": 8,
    "ffn": 688,
    "layers": 1,
    "kv_len": 1024,
    "steps": 5,
    "vocab": 0,
    "sequences": 1,
}
_MEANINGS = {
    "vocab": "of so many, a whole token from its id to its logits ",
    "sequences": "that take each step together, a token each ",
}


def add_settings(parser: Parser) -> None:
    """An option for each setting that has one, under the setting's name in what is parsed."""
    group = parser.add_argument_group("run")
    for setting in _settings_with_options():
        option = setting.metadata["option"] or f"--{setting.name.replace('_', '-')}"
        given = {"dest": setting.name, "default": setting.default, "help": setting.metadata["help"]}
        if setting.type is bool:
            parser.add_argument(option, action="store_true", **given)
        else:
            group.add_argument(option, type=setting.type, metavar=setting.metadata["metavar"], **given)


def settings(arguments: Any) -> dict:
    """Keyword arguments of ``settings.split`` from what was parsed."""
    given = {setting.name: getattr(arguments, setting.name) for setting in _settings_with_options()}
    given |= {name: getattr(arguments, name) for name in ("helper_at", "owner_at") if hasattr(arguments, name)}
    return given | {"progress": sys.stderr.isatty()}


def add_helper(parser: Parser) -> None:
    """Of commands that a thin client can give."""
    group = parser.add_argument_group("thin client", "A client without weights or shares, for which a helper computes.")
    what = "where the helper takes clients; or local: start it, owner and dealer on this machine"
    group.add_argument("--helper", dest="helper_at", default="", metavar="HOST:PORT", help=what)
    what = "where the owner takes them"
    group.add_argument("--owner", dest="owner_at", default="", metavar="HOST:PORT", help=what)


def _settings_with_options() -> Any:
    return [setting for kind in (ProtocolConfig, LaunchConfig) for setting in fields(kind) if setting.metadata]


def add_model_and_prompt(parser: Parser) -> None:
    parser.add_model()
    add_tokenizer(parser)
    prompt = parser.add_mutually_exclusive_group()
    what = "the client's text, which the process list shows to this machine's users; --prompt-file is not seen"
    prompt.add_argument("--prompt", metavar="TEXT", help=what)
    file = "a file with the client's text, one newline at its end left out; - for standard input"
    prompt.add_argument("--prompt-file", metavar="F", help=file)
    prompt.add_argument("--prompt-ids", metavar="1,2,3", help="the client's token ids; a file of ids after @")
    parser.add_chunk()
    parser.add_padded(None)


def add_public_prefix(parser: Parser) -> None:
    """Of a request."""
    add = parser.add_mutually_exclusive_group().add_argument
    what = "a text before the prompt that all parties may read: no rounds, nothing of the dealer's; a file after @"
    add("--public-prefix", metavar="TEXT|@FILE", help=what)
    add("--public-prefix-ids", metavar="1,2,3", help="the same as token ids; a file of ids after @")


def public_prefix(arguments: Any) -> str | list[int] | None:
    """What ``add_public_prefix`` added, as ``Request`` takes it."""
    if arguments.public_prefix_ids is not None:
        return _ids("--public-prefix-ids", arguments.public_prefix_ids)
    given = arguments.public_prefix
    return _text("--public-prefix", given[1:]) if given is not None and given.startswith("@") else given


def add_public_system(parser: Parser) -> None:
    what = "all parties may read the system message and what else the chat template writes before a user's first word"
    parser.add_argument("--public-system", action="store_true", help=what)


def add_public_count(parser: Parser) -> None:
    """Of what is counted or dealt."""
    what = "tokens of a public prefix, which come before it (default: 0)"
    parser.add_argument("--public-prefix", type=int, default=0, metavar="N", help=what)


def add_reveal(parser: Parser) -> None:
    """Of what is counted or dealt."""
    what = "what the client learns of each step: tokens, top-K or logits (default: logits)"
    parser.add_argument("--reveal", default="logits", metavar="MODE", help=what)
    drawn = "of tokens that are drawn on shares, with --reveal tokens (default: 0, the likeliest)"
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help=drawn)


def add_precision(parser: Parser) -> None:
    """Of what is counted or dealt."""
    what = "bits of the numbers: default, or quantised (default: default)"
    parser.add_argument("--precision", default=DEFAULT, choices=PRECISIONS, help=what)


def revealed(arguments: Any) -> dict:
    """What ``add_reveal`` added, as arguments of ``Plan``."""
    return {"reveal": arguments.reveal, "temperature": arguments.temperature}


def counted_prefix(arguments: Any) -> tuple[int, ...]:
    """A public prefix of that many tokens: which they are makes no difference to what is sent and dealt."""
    if arguments.public_prefix < 0:
        raise UsageError(f"--public-prefix is {arguments.public_prefix}; it must be a number of tokens")
    return (0,) * arguments.public_prefix


def add_tokenizer(parser: Parser) -> None:
    what = "the client's tokenizer: a folder, GGUF file or hub id (default: the model's)"
    parser.add_argument("--tokenizer", help=what)


def add_answer(parser: Parser) -> None:
    """What ends an answer, and how its tokens are chosen."""
    group = parser.add_argument_group("answer", "Not given, as the client's copy of generation_config.json has it.")
    add = group.add_argument
    usual = "(default: 32, or 256 with a chat template)"
    add("--max-new-tokens", type=int, metavar="N", help=f"most tokens of an answer {usual}")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; repeatable")
    eos = "token ids that end the answer (default: the client's tokenizer's and folder's)"
    add("--eos-token-id", metavar="1,2", help=eos)
    add("--json-schema", metavar="FILE", help="a JSON schema that the answer follows")
    add("--greedy", action="store_true", help="take the likeliest token, whatever the model's own defaults are")
    add("--temperature", type=float, metavar="T", help="sample with this temperature")
    add("--top-k", type=int, metavar="K", help="sample among the K best tokens")
    add("--top-p", type=float, metavar="P", help="sample among the best tokens that hold probability P")
    add("--min-p", type=float, metavar="P", help="sample among tokens at least P times as likely as the best")
    add("--repetition-penalty", type=float, metavar="X", help="make tokens that were there less likely; 1 for none")
    add("--seed", type=int, help="of the client's sampling; no secret depends on it")


def answer(arguments: Any) -> dict:
    """What ``add_answer`` added, as arguments of ``Request``."""
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if arguments.greedy and sampling:
        raise UsageError(f"--greedy has no use for --{next(iter(sampling)).replace('_', '-')}; leave one out")
    found = {name: getattr(arguments, name) for name in ("max_new_tokens", "repetition_penalty", "seed")}
    if arguments.eos_token_id is not None:
        found["eos_token_id"] = whole_numbers("--eos-token-id", arguments.eos_token_id)
    if arguments.json_schema is not None:
        found["json_schema"] = _schema(arguments.json_schema)
    if arguments.greedy or sampling:
        found["do_sample"] = not arguments.greedy
    found |= {"prefill_chunk": arguments.chunk, "padded": padded(arguments)}
    return {**found, **sampling, "stop": arguments.stop, "policy": policy(arguments)}


def padded(arguments: Any) -> int:
    """Rows that the answer's cache is counted as a multiple of: as was asked, or as the device has it."""
    if arguments.padded is None:
        return PADDED_ON_A_GPU if "cuda" in arguments.device else 0
    return arguments.padded


def _schema(path: str) -> dict[str, Any]:
    from crypten_llm import records

    try:
        return records.decode(read_text("--json-schema", path), dict[str, Any])
    except records.Malformed as error:
        raise UsageError(f"--json-schema: {path} is {error}; give a file that holds a JSON schema") from None


def prompt(arguments: Any) -> dict:
    """The client's prompt as arguments of ``Request``."""
    if arguments.prompt_file is not None:
        path = arguments.prompt_file
        return {"prompt": sys.stdin.read().removesuffix("\n") if path == "-" else _text("--prompt-file", path)}
    if arguments.prompt_ids is not None:
        return {"input_ids": _ids("--prompt-ids", arguments.prompt_ids)}
    if arguments.prompt is None:
        raise UsageError("no prompt; give --prompt TEXT, --prompt-file F or --prompt-ids 1,2,3")
    return {"prompt": arguments.prompt}


def _text(option: str, path: str) -> str:
    """The file's text without the newline that an editor or ``echo`` ends it with: it would be a token of its own."""
    return read_text(option, path).removesuffix("\n")


def _ids(option: str, given: str) -> list[int]:
    return whole_numbers(option, read_text(option, given[1:]) if given.startswith("@") else given)


def add_policy(parser: Parser) -> None:
    what = "KV-cache eviction policy (default: full), such as recommended; python -m eviction list shows all"
    parser.add_argument("--policy", default="full", help=what)
    parser.add_policy_settings()


def add_device(parser: Parser) -> None:
    """Of commands that run without parties."""
    what = "where all parties compute: cpu, cuda or cuda:N; or owner's,client's,dealer's (default: cpu)"
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help=what)


def add_policy_weights(parser: Parser) -> None:
    """Of commands that run without parties; to all others it is a setting."""
    setting = LaunchConfig.__dataclass_fields__["policy_weights"]
    parser.add_argument("--policy-weights", default="", metavar="FILE", help=setting.metadata["help"])


def policy(arguments: Any) -> str:
    """The policy and its settings as the text that parties agree on."""
    from crypten_llm.session.plan import parse_policy
    from crypten_llm.session.weights import know_weights

    know_weights(arguments.policy_weights)
    return str(parse_policy(arguments.policy, *arguments.set))


def add_bench_sizes(parser: Parser) -> None:
    for name, default in BENCH_SIZES.items():
        option = f"--{name.replace('_', '-')}"
        meaning = f"{_MEANINGS.get(name, '')}(default: {default})"
        parser.add_argument(option, type=int, default=default, metavar="N", help=meaning)


def add_delivery(parser: Parser) -> None:
    """Of links between producers and stocks."""
    add = parser.add_argument
    for name in ("tls", "timeout"):
        setting = LaunchConfig.__dataclass_fields__[name]
        option = {"default": setting.default, "help": setting.metadata["help"], "metavar": setting.metadata["metavar"]}
        add(f"--{name}", type=type(setting.default), **option)
    insecure = ProtocolConfig.__dataclass_fields__["insecure_links"].metadata["help"]
    add("--insecure-links", action="store_true", help=insecure)
    add("--metrics-port", type=int, default=0, metavar="P", help="where Prometheus finds metrics (default: none)")
    what = "address of --metrics-port (default: 127.0.0.1)"
    add("--metrics-address", default="127.0.0.1", metavar="ADDRESS", help=what)
    parser.add_verbose()


def delivery(arguments: Any) -> Any:
    """What ``add_delivery`` added."""
    from crypten_llm.commands.stock import Where

    names = ("tls", "insecure_links", "timeout", "metrics_port", "metrics_address")
    return Where(**{name: getattr(arguments, name) for name in names})


def bench_shape(arguments: Any) -> Shape:
    """The ``bench.Shape`` that the sizes and the policy describe."""
    from crypten_llm.session.bench import Shape

    return Shape(**{name: getattr(arguments, name) for name in BENCH_SIZES}, policy=policy(arguments))


def asks(arguments: Any) -> bool:
    """Whether this process is the client. In a torchrun job the others run the same command, and serve here."""
    from crypten_llm.session.launch import is_client
    from crypten_llm.session.settings import split

    protocol, _ = split(settings(arguments))
    if is_client(protocol):
        return True
    if protocol.is_private:
        serve(arguments)
    return False


def told_by_parent(arguments: Any) -> Any:
    """At a process that another one has started with ``--child``: what it was told (``settings.Child``)."""
    from crypten_llm.links import keyring
    from crypten_llm.session.lifeline import end_with_parent
    from crypten_llm.session.settings import Child

    os.environ[keyring.VARIABLE] = end_with_parent()
    told = Child.from_json(arguments.child)
    arguments.verbose = told.launch.verbose
    if told.launch.shielded:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return told


def serve(arguments: Any) -> None:
    """Any party but the client, until it closes."""
    from crypten_llm.session.api import PrivateLlama

    PrivateLlama.serve(getattr(arguments, "model", ""), **settings(arguments))
