"""How many files of this project run for one decode step: `python -m experiments.tools.decode_files`.

Counts the files of `crypten_llm` and `eviction` in which a function runs at the client between one token of
`generation.run` and the next, on a tiny random model; what was only imported does not count, and compiled loops, whose
Python is not run, neither. `--list` shows them with their lines.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import crypten_llm
import eviction
from crypten_llm.commands.doctor import write_tiny
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.errors import UsageError
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.roles import CLIENT
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan, parse_policy
from crypten_llm.session.prompted import Answer, Step
from experiments.tools.command import command

ROOT = Path(crypten_llm.__file__).parents[1]
PACKAGES = tuple(Path(package.__file__).parent for package in (crypten_llm, eviction))
PROMPT = list(range(1, 25))
POLICY = "mpcache_spread(budget=0.5,block=2,ends=4)"
"""Of those that choose at every step the one with most of its own; it leaves out some of so few rows."""

RUNS = {"plain": ("plain", "full"), "wire": ("wire", "full"), f"wire with {POLICY}": ("wire", POLICY)}


def files_of_a_step(engine: str, policy: str = "full") -> list[Path]:
    """The files in which a function runs for the second token, at the client; sorted, relative to the project."""
    if engine not in ("plain", "wire"):
        raise UsageError(f"engine is {engine!r}; files are counted on 'plain' or 'wire'")
    plan = Plan(len(PROMPT), 2, policy=str(parse_policy(policy)))
    with tempfile.TemporaryDirectory() as folder:
        write_tiny(Path(folder))
        if engine == "plain":
            return _at_the_client(Party(PlainEngine()), plan, folder)
        return run_roles(lambda transport: _play(transport, plan, folder))[CLIENT]


def _play(transport, plan: Plan, folder: str) -> list[Path] | None:
    party = Party(WireEngine(transport), transport, compute_parties=2)
    if party.is_client:
        return _at_the_client(party, plan, folder)
    party.serve(folder if party.is_owner else None)


def _at_the_client(party: Party, plan: Plan, folder: str) -> list[Path]:
    party.request_load(folder)
    events = party.request_generate(plan, Answer(PROMPT, lambda logits: int(logits.argmax())))
    next(event for event in events if isinstance(event, Step))
    files = _files_run_by(lambda: next(events))
    for _ in events:
        pass
    party.close()
    return sorted(path.relative_to(ROOT) for path in files)


def _files_run_by(step) -> set[Path]:
    """The project's files in which a function is entered, or a generator resumed, on this thread during ``step``."""
    names: set[str] = set()

    def note(frame, event, _):
        if event == "call":
            names.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    return {path for path in map(Path, names) if any(path.is_relative_to(package) for package in PACKAGES)}


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Files of the project that run for one decode step at the client.")
    parser.add_argument("--list", action="store_true", help="show the files, with their lines")
    shown = parser.parse_args(argv).list
    for name, (engine, policy) in RUNS.items():
        files = files_of_a_step(engine, policy)
        lines = {path: len((ROOT / path).read_text("utf-8").splitlines()) for path in files}
        print(f"{name}: {len(files)} files, {sum(lines.values()):,} lines")
        for path, count in lines.items() if shown else ():
            print(f"  {count:5}  {path}")


if __name__ == "__main__":
    sys.exit(main())
