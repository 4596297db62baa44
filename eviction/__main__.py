"""``python -m eviction list``: the table of policies.

Owns what is printed. What one of them does with a prompt is shown by ``python -m crypten_llm trace``.
"""

import argparse
import sys
from dataclasses import fields

from eviction import POLICIES
from eviction.settings import written


def table() -> str:
    """All policies as a Markdown table."""
    names = ("policy", "paper", "when", "shared over", "reveals", "cost per step", "settings")
    lines = [f"| {' | '.join(names)} |", "| " + " | ".join("---" for _ in names) + " |"]
    for kind in POLICIES.values():
        paper = f"[{kind.paper}](https://arxiv.org/abs/{kind.arxiv})" if kind.arxiv else "–"
        settings = ", ".join(f"`{setting.name}={written(setting.default)}`" for setting in fields(kind)) or "–"
        cells = (f"`{kind.name}`", paper, kind.when, kind.shared_over, kind.reveals, kind.cost, settings)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eviction", description="KV-cache eviction policies.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    what = "all policies, what they reveal, cost and can be set to, as a Markdown table"
    commands.add_parser("list", help=what, description=what)
    parser.parse_args(argv)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
