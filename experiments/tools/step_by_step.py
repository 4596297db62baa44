"""One role of engine ``wire``, of whichever checkout it is started in: decode steps of ``bench``, each when it is told.

Owns what one process of ``experiments.measure.two_trees`` does. It is started with the checkout first on its path,
which may be an older one, and so imports nothing but that checkout's ``crypten_llm``. Its arguments are a job in JSON;
it prints a line when it is ready, runs a step for each line that it reads, and prints the step's seconds in JSON.
"""

import contextlib
import inspect
import json
import os
import sys
import time


def play(rank: int, port: int, sizes: dict, steps: int, tape: str) -> None:
    """sizes: a ``Shape``'s. tape: its folder, or nothing where a dealer runs along."""
    say = os.fdopen(os.dup(1), "w", buffering=1)
    import torch

    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.links import rendezvous
    from crypten_llm.protocols.dealer.tape import Tape
    from crypten_llm.roles import role_names
    from crypten_llm.session import bench
    from crypten_llm.session.party import Party

    torch.set_num_threads(1)
    shape = bench.Shape(**sizes, steps=steps)
    names = role_names(2)[: 2 if tape else 3]
    more = known(rendezvous.connect, is_master=rank == 0)
    transport = rendezvous.connect(rank, len(names), names, "127.0.0.1", port, timeout=600.0, **more)
    with contextlib.closing(transport), torch.inference_mode():
        material = Tape(tape, rank, transport, **known(Tape.__init__, is_local=True)) if tape else None
        party = Party(WireEngine(transport, material=material), transport, compute_parties=2)
        party.start_request()
        engine, name = party.engine, f"bench {party.requests}"  # sections are named as ``bench`` does: a tape has names
        with engine.section(f"{name} weights"):
            built = bench._build(engine, shape.config(), shape)
        source = built.source(party.owner, party.client)
        say.write("ready\n")
        for step in range(steps):
            sys.stdin.readline()
            given = bench._given(shape, step) if rank == source else None
            started = time.perf_counter(), time.process_time()
            with engine.meter.phase("decode"), engine.section(f"{name} step {step}"):
                built.decode(given, False)
            took = {"wall": time.perf_counter() - started[0], "cpu": time.process_time() - started[1]}
            say.write(json.dumps(took) + "\n")


def known(function, **options) -> dict:
    """Those of the options that this checkout's function has."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def deal(sizes: dict, steps: int, out: str) -> None:
    """A tape of this checkout's program."""
    from crypten_llm.commands import deal as dealing
    from crypten_llm.session.bench import Shape

    dealing.deal(Shape(**sizes, steps=steps), out, say=lambda line: None)


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    (deal if "out" in job else play)(**job)
