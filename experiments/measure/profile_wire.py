"""Where the time of engine ``wire`` goes: a sampling profile of owner, client and dealer, in processes of their own.

    python -m experiments.measure.profile_wire                  # one decode step of a layer, d = 256, T = 1,024
    python -m experiments.measure.profile_wire --hidden 4096 --heads 32 --ffn 11008 --kv-len 512 --steps 3
    python -m experiments.measure.profile_wire --prompt-tokens 512 --steps 8  # the shipped model: prefill, steps

Each process is interrupted every few milliseconds of its own processor time and notes where it was: in the
compiled loops over words (products and openings, numbers of several words, softmax's exponents, fits, bits at secret
places, comparisons), the key streams, the messages, or the Python and torch calls around them. What remains of the wall
clock is waiting: for the other party, for the dealer, for a core.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.links import rendezvous
from crypten_llm.models import checkpoint
from crypten_llm.roles import role_names
from crypten_llm.session import bench, generation
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Answer
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.tables import print_table

EVERY_SECONDS = 1e-3  # asked for; the system's clock may tick less often
ROLES = role_names(2)
# By file, but for functions named after their file: compiled loops are counted at their callers in Python.
PARTS = {
    "cpu.py": "products and openings",
    "ring.py": "products and openings",
    "limbs.py": "wide numbers",
    "lifted.py": "wide numbers",
    "ones.py": "exponents",
    "exponents.py": "exponents",
    "trigonometry.py": "fits",
    "places.py": "places",
    "dcf.py": "comparisons",
    "payloads.py": "comparisons",
    "chacha.py": "comparisons",
    "tables.py": "comparisons",
    "cpu.py KeyStream.fill": "key streams",
    "randomness.py": "key streams",
    "transport.py": "messages",
    "material.py": "messages",
    "tape.py": "messages",
}
REST = "Python and torch"


def part_of(code) -> str:
    """What a function's time is counted as."""
    file = Path(code.co_filename).name
    return PARTS.get(f"{file} {code.co_qualname}") or PARTS.get(file, REST)


@contextlib.contextmanager
def sampling(party, samples: collections.Counter):
    """Processor seconds by (phase, part), estimated from samples of this process's main thread."""

    def note(_, frame):
        samples[party.engine.meter.cell[0], part_of(frame.f_code)] += 1

    started = time.process_time()
    signal.signal(signal.SIGPROF, note)
    signal.setitimer(signal.ITIMER_PROF, EVERY_SECONDS, EVERY_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        tick = (time.process_time() - started) / max(1, samples.total())
        for key in samples:
            samples[key] *= tick


def play(rank: int, port: int, job: dict, results) -> None:
    """One role, in a process of its own; puts (rank, samples, counters by phase) or the error's text."""
    try:
        torch.set_num_threads(1)
        transport = rendezvous.connect(rank, 3, ROLES, "127.0.0.1", port, timeout=600.0)
        with contextlib.closing(transport):
            party = Party(WireEngine(transport), transport, compute_parties=2)
            samples = collections.Counter()
            with sampling(party, samples):
                run(party, job)
            table = party.engine.meter.table()
        results.put((rank, dict(samples), table))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def run(party, job: dict) -> None:
    if "shape" in job:
        bench.run(party, bench.Shape(**job["shape"]))
        return
    party.load(job["model"])
    party.start_request()
    plan = Plan(job["prompt_tokens"], job["steps"] + 1, hide_length=True)
    ids = [5 + 7 * i % 400 for i in range(plan.prompt_tokens)]
    answer = Answer(ids, lambda logits: int(logits.argmax())) if party.is_client else None
    for _ in generation.run(party, plan, answer):
        pass


def profile(job: dict) -> list[dict]:
    """One row per phase and role: seconds of wall clock, of processor time by part, and of waiting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=play, args=(rank, port, job, results), daemon=True) for rank in range(3)]
    for process in processes:
        process.start()
    rows = []
    for _ in processes:
        rank, samples, table = results.get(timeout=1800)
        if table is None:
            sys.exit(f"{ROLES[rank]} failed:\n{samples}")
        for phase in ("prefill", "decode"):
            wall = sum(row["seconds"] for row in table if row["phase"] == phase)
            if not wall:
                continue
            parts = {part: samples.get((phase, part), 0.0) for part in (*dict.fromkeys(PARTS.values()), REST)}
            busy = sum(parts.values())
            row = {"phase": phase, "role": ROLES[rank], "seconds": wall, "busy": busy / wall}
            rows.append(row | {part: seconds / max(busy, 1e-9) for part, seconds in parts.items()})
    for process in processes:
        process.join()
    return sorted(rows, key=lambda row: (row["phase"] != "prefill", ROLES.index(row["role"])))


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="(default: as heads)")
    parser.add_argument("--ffn", type=int, default=688)
    parser.add_argument("--kv-len", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, help="profile a model on such a prompt instead")
    parser.add_argument("--model", default="shipped", help="which one (default: shipped)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.prompt_tokens:
        model = str(checkpoint.resolve_model(arguments.model))
        job = {"prompt_tokens": arguments.prompt_tokens, "steps": arguments.steps, "model": model}
    else:
        sizes = {name: getattr(arguments, name) for name in ("hidden", "heads", "ffn", "kv_len", "steps")}
        job = {"shape": sizes | {"kv_heads": arguments.kv_heads or arguments.heads}}
    rows = profile(job)
    kept.save(arguments.json, {"job": job, "rows": rows})
    print_table(
        [{key: value if isinstance(value, str) else round(value, 3) for key, value in row.items()} for row in rows]
    )


if __name__ == "__main__":
    sys.exit(main())
