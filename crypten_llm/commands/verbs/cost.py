"""``cost``: what a request will cost, from sizes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crypten_llm.commands import options as shared
from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import UsageError
from crypten_llm.session.settings import split

if TYPE_CHECKING:
    from crypten_llm.commands.machine import Card, Machine
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.plan import Plan

HELP = "count what a request will cost on engine wire, from a model's sizes"

_SIZES = ("hidden", "heads", "kv-heads", "ffn", "layers", "vocab")  # of a model that is only counted


def options(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", metavar="M", help="'shipped', a folder with its config.json, or a hub id; no weights are read")
    add("--config", metavar="F", help="a config.json instead of a model")
    for name in _SIZES:
        add(f"--{name}", type=int, metavar="N", help="or sizes as in bench" if name == _SIZES[0] else None)
    add("--prompt-tokens", type=int, required=True, metavar="N", help="length of the prompt")
    shared.add_public_count(parser)
    add("--new-tokens", type=int, default=2, metavar="N", help="length of the answer (default: 2)")
    parser.add_chunk()
    parser.add_padded(None)
    shared.add_policy(parser)
    shared.add_policy_weights(parser)
    shared.add_reveal(parser)
    shared.add_device(parser)
    add("--peer-memory", action="store_true", help="with --device cuda: owner and client are on GPUs of one host")
    add("--helper", action="store_true", help="of a thin client, whose own bytes are counted too")
    shared.add_precision(parser)
    add("--network", default="", metavar="lan|wan|RTTms,Mbit", help="the links between the parties (default: none)")
    parser.add_json()
    parser.add_offline_and_verbose()


def run(arguments: Any) -> None:
    from crypten_llm import memory
    from crypten_llm.commands.cost import check_fits, predict
    from crypten_llm.commands.machine import Card
    from crypten_llm.commands.show import show_cost
    from crypten_llm.links.network import parse_network
    from crypten_llm.session.plan import Plan

    policy = shared.policy(arguments)
    prefix = shared.counted_prefix(arguments)
    padded = shared.padded(arguments)
    facts = {"policy": policy, "public_prefix": prefix, "padded": padded, **shared.revealed(arguments)}
    plan = Plan(arguments.prompt_tokens, arguments.new_tokens, arguments.chunk, **facts)
    network = parse_network(arguments.network) if arguments.network else None
    named = arguments.device.split(",")
    machine = _machine(named, arguments.peer_memory, plan)
    asked = {"helper": arguments.helper, "precision": arguments.precision}
    prediction = predict(_config(arguments), plan, network, machine, **asked)
    show_cost(prediction, arguments.json)
    if isinstance(machine, Card):
        check_fits(prediction.memory, named, lambda device: machine.memory if device != "cpu" else memory.left(device))


def _machine(named: list[str], peer_memory: bool, plan: Plan) -> Machine | Card:
    """Whose seconds are predicted: a card's, where both parties are on GPUs, of this machine if it has one.

    Raises UsageError for a card that nobody measured.
    """
    from crypten_llm import devices
    from crypten_llm.commands.machine import PROCESSOR, card

    split({"device": ",".join(named), "peer_memory": peer_memory})  # raises for what names no devices
    if any(devices.card(name) is None for name in (named * 2)[:2]):
        return PROCESSOR
    found = card(devices.card(named[0]) or "", peer_memory)
    return found if plan.room() else found.from_python()


def _config(arguments: Any) -> LlamaConfig:
    """The model that is asked about: of a model, of a file, or of sizes."""
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
    return LlamaConfig.from_sizes(
        **sizes, context=arguments.public_prefix + arguments.prompt_tokens + arguments.new_tokens
    )
