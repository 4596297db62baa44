"""``calibrate``: how far a model's numbers go beside an engine's ranges, for its owner."""

from typing import Any

from crypten_llm.commands.command_line import Parser
from crypten_llm.errors import UsageError
from crypten_llm.session.settings import DEFAULT_ENGINE, DEFAULT_PRECISION_BITS, ProtocolConfig

HELP = "measure a model of your own, in the clear and alone, beside the ranges in which an engine is right"

OUTPUTS = {  # files for policies
    "heads": "which kv heads look far, for --policy head_split",
    "filters": "the main direction of each kv head's queries, for --policy qfilters",
    "centers": "the mean of each kv head's queries, for --policy triattention",
    "scores": "linear scores that say which tokens will be looked at, for --policy kvzap_linear",
}


def options(parser: Parser) -> None:
    parser.add_model()
    add = parser.add_argument
    add("--engine", default=DEFAULT_ENGINE, help=f"wire or crypten (default: {DEFAULT_ENGINE})")
    bits = f"fractional bits of a secret on engine crypten (default: {DEFAULT_PRECISION_BITS})"
    add("--precision-bits", type=int, default=DEFAULT_PRECISION_BITS, metavar="F", help=bits)
    what = "text like what clients ask, measured to its end (default: the beginning of some prose)"
    add("--calibration-text", default="", metavar="FILE", help=what)
    for name, what in OUTPUTS.items():
        what = f"where to write {what} (--policy-weights FILE at every party)"
        add(f"--{name}-out", default="", metavar="FILE", help=what)
    what = "steps of learning by which --heads-out orders heads; 0 for a quicker look (default: 0)"
    add("--learn", type=int, default=0, metavar="STEPS", help=what)
    add("--device", default="cpu", metavar="DEVICE", help="where --learn computes: cpu or cuda (default: cpu)")
    parser.add_json()
    parser.add_offline_and_verbose()


def run(arguments: Any) -> None:
    protocol = ProtocolConfig(engine=arguments.engine, precision_bits=arguments.precision_bits)
    if not protocol.is_private:
        raise UsageError("engine 'plain' has no range that a model could leave; choose --engine wire or crypten")
    if arguments.learn < 0 or arguments.learn and not arguments.heads_out:
        raise UsageError(f"--learn is {arguments.learn}; give a number of steps, and --heads-out for what they find")
    from crypten_llm.commands.calibrate import Learning, Outputs, calibrate
    from crypten_llm.models import checkpoint

    calibrate(
        checkpoint.resolve_model(arguments.model, arguments.offline),
        protocol,
        arguments.calibration_text,
        arguments.json,
        Outputs(**{name: getattr(arguments, f"{name}_out") for name in OUTPUTS}),
        Learning(arguments.learn, arguments.device),
    )
