"""Real parties for tests, cheap enough to start anew for each.

Owns the processes. They are forked from a server that has imported torch and CrypTen once, so three parties meet in a
fraction of a second instead of the seconds that their imports take. What they run is in ``party_jobs``, which
imports no more than a party does.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

TIMEOUT = 60.0


class PartyFailed(AssertionError):
    """A party raised; the message holds its traceback."""


def context():
    """The server, started with this folder and the project on its path: a context of ``multiprocessing``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prepared", "party_jobs", "crypten_llm.commands.cli", "crypten_llm.commands.show"])
    here, before = Path(__file__).parent, os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), before or ""])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


def run(
    job, *arguments, parties: int = 2, wire=False, elsewhere=False, at_dealer=None, timeout: float = TIMEOUT, **config
) -> list:
    """``job(engine, *arguments)`` at each of ``parties`` compute parties; returns their results by rank.

    wire: engine ``wire`` instead of ``crypten``; its dealer runs the job too, and its result is the last item.
    elsewhere: by CrypTen's own path for a GPU (``crypten_elsewhere``). config: fields of ``CryptenConfig``. at_dealer:
    called with the dealer's transport before it serves; what it returns is called when the dealer has stopped, and
    gives the last item of the results.
    """
    sockets = [{} for _ in range(parties + 1)]
    for low in range(parties + 1):
        for high in range(low + 1, parties + 1):
            sockets[low][high], sockets[high][low] = socket.socketpair()
    server = context()
    pipes, processes = [], []
    for rank in range(parties + 1):
        ours, theirs = server.Pipe()
        pipes.append(ours)
        # Pickled by hand: multiprocessing would pass tensors through shared memory that ends with the sender.
        served = rank == parties and not wire
        work = pickle.dumps((at_dealer, (), {}) if served else (job, arguments, config))
        processes.append(
            server.Process(target=_main, args=(rank, parties, sockets[rank], theirs, timeout, wire, elsewhere, work))
        )
    try:
        for process in processes:
            process.start()
        for mine in sockets:
            for sock in mine.values():
                sock.close()
        results = [_result(pipe, rank, timeout) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    errors = [error for _, error in results if error]
    if errors:  # the first to fail says why; the others only lost it
        raise PartyFailed(min(errors, key=lambda error: "PartyError" in error))
    values = [value for value, _ in results]
    return values if at_dealer or wire else values[:parties]


def _result(pipe, rank: int, timeout: float):
    if not pipe.poll(timeout + 10):
        return None, f"party {rank} said nothing for {timeout + 10:g} s"
    with suppress(EOFError):
        return pickle.loads(pipe.recv_bytes())
    return None, f"party {rank} died"


def _main(rank, parties, sockets, pipe, timeout, wire, elsewhere, work):
    import torch

    from crypten_llm.engines.crypten import bridge
    from crypten_llm.engines.crypten.domain import CryptenConfig
    from crypten_llm.engines.crypten.engine import CryptenEngine
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.links.transport import Transport
    from crypten_llm.roles import role_names

    torch.set_num_threads(1)
    device = torch.device("cpu")
    if elsewhere:
        import crypten_elsewhere

        device = crypten_elsewhere.put_in_place()
    transport = Transport(rank, role_names(parties), sockets, timeout=timeout)
    try:
        job, arguments, config = pickle.loads(work)
        if wire:
            answer = job(WireEngine(transport), *arguments)
        elif rank == parties:
            result = job(transport) if job else lambda: None
            bridge.start_dealer(transport, parties, device).serve()
            answer = result()
        else:
            settings = CryptenConfig(**{"precision_bits": 16, **config})
            engine = CryptenEngine(transport, parties, settings, device=device)
            answer = job(engine, *arguments)
            if rank == 0:
                engine.dealer.ask_stop()
        pipe.send_bytes(pickle.dumps((answer, None)))
    except BaseException as error:
        transport.abort(f"{type(error).__name__}")
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
    transport.close()
