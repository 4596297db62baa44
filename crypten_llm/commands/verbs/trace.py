"""``trace``: the positions that a policy keeps and attends to."""

import json
import sys
from typing import Any

from crypten_llm.commands.command_line import Parser, read_text, whole_numbers
from crypten_llm.errors import UsageError

HELP = "which positions a policy keeps and attends to; INSECURE with --engine wire, which then opens everything"


def options(parser: Parser) -> None:
    add = parser.add_argument
    add("--policy", required=True, help="its name, or name(setting=value,...)")
    parser.add_policy_settings()
    parser.add_model()
    add("--prompt-ids", required=True, metavar="FILE", help="a file of token ids, separated by commas or space")
    add("--steps", type=int, default=4, metavar="N", help="decode steps (default: 4)")
    add("--engine", default="plain", help="plain or wire (default: plain)")
    parser.add_chunk()
    parser.add_json()
    add("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf")
    parser.add_offline_and_verbose()


def run(arguments: Any) -> None:
    from crypten_llm.commands.trace import trace
    from crypten_llm.models import checkpoint
    from crypten_llm.session.plan import parse_policy

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


def _summary(found: Any) -> str:
    """Rows kept and attended to, and the mass recovered, by layer."""
    lines = [f"{found.policy} on {found.engine}, {found.prompt_tokens} prompt tokens"]
    wide = max(5, *(len(record.label) for record in found.layers))
    lines.append(f"{'layer':>{wide}}  kept  attended  mass recovered")
    for record in found.layers:
        mass = sum(record.mass) / len(record.mass)
        lines.append(
            f"{record.label:>{wide}}  {record.kept[0].shape[1]:4}  {record.attended[-1].shape[1]:8}  {mass:14.4f}"
        )
    return "\n".join(lines)
