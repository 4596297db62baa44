"""Owner, client and dealer as three threads of one process, for what is measured or debugged on one machine.

Owns the threads and the sockets between them. Nothing is private here: one process holds every share.
"""

import socket
import threading
from collections.abc import Callable
from typing import Any

from crypten_llm.errors import PartyError, public_words
from crypten_llm.links.transport import Transport
from crypten_llm.roles import role_names


def run_roles(job: Callable[[Transport], Any], timeout: float = 300.0) -> list:
    """``job(transport)`` in each of the three roles; returns their results by rank.

    A role that raises closes its links, so that the others stop; its error is raised here.
    """
    names = role_names(2)
    sockets: list[dict] = [{} for _ in names]
    for low in range(len(names)):
        for high in range(low + 1, len(names)):
            sockets[low][high], sockets[high][low] = socket.socketpair()
    results, errors = [None] * len(names), []

    def play(rank: int) -> None:
        transport = Transport(rank, names, sockets[rank], timeout=timeout)
        try:
            results[rank] = job(transport)
        except BaseException as error:
            errors.append(error)
            transport.abort(public_words(error))
        transport.close()

    threads = [threading.Thread(target=play, args=(rank,), name=name, daemon=True) for rank, name in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:  # the first cause; a lost peer is only its consequence
        raise next((error for error in errors if not isinstance(error, PartyError)), errors[0])
    return results
