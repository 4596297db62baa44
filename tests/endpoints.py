"""Endpoints of a tiny model on engine ``plain``, in this process: the real session, queue and routes."""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import closing, contextmanager
from functools import partial

from programs import Program
from starlette.testclient import TestClient

from crypten_llm import PrivateLlama
from crypten_llm.commands.cost import predict_open
from crypten_llm.serving.app import Endpoint
from crypten_llm.serving.asking import Usual
from crypten_llm.serving.fair_queue import ROOM, FairQueue
from crypten_llm.serving.guard import Guard
from crypten_llm.serving.metrics import Metrics
from crypten_llm.serving.pricing import Pricer
from crypten_llm.serving.server import Server, listen
from crypten_llm.serving.service import Service, State
from crypten_llm.session.open_batch import Joined
from crypten_llm.session.prompted import Progress, Step

predicted = partial(predict_open, room=ROOM)
SERVE = ["-m", "crypten_llm", "serve", "--offline", "--threads", "1", "--port", "0"]


@contextmanager
def service(open_session, room=4, predict=None, engine="plain", **options):
    """One that is available."""
    queue = FairQueue(room)
    metrics = Metrics(lambda: len(queue), lambda: len(made.running))
    made = Service(open_session, queue, metrics, Pricer(predict, engine), **options)
    made.start()
    until(lambda: made.state is not State.PROGRESSING)
    try:
        yield made
    finally:
        made.stop()
        made.join()


def endpoint(made, keys=(), model="tiny", **usual):
    return Endpoint(made, Guard(keys), model, Usual(**usual))


def client(made, keys=(), **headers):
    """A client in this process, which names the host as one on this machine would."""
    return TestClient(endpoint(made, keys).app(), base_url="http://localhost", headers=headers)


def opened(folder, **settings):
    return lambda: PrivateLlama.from_pretrained(str(folder), **{"engine": "plain", "threads": 1, **settings})


class Paced:
    """Opens a session whose events come one for each permit."""

    def __init__(self, folder):
        self._open, self.permits = opened(folder), threading.Semaphore(0)
        self.begun = self.steps = 0

    def __call__(self):
        self.llama = llama = self._open()
        open_batch = llama.open_batch

        def opened_batch(*arguments):
            batch = open_batch(*arguments)
            run = batch.run

            def paced():
                with closing(run()) as events:
                    for event in events:
                        if isinstance(event, Joined):
                            self.begun += 1
                        elif isinstance(event, (Progress, Step)):
                            assert self.permits.acquire(timeout=10)
                            self.steps += 1
                        yield event

            batch.run = paced
            return batch

        llama.open_batch = opened_batch
        return llama

    def permit(self, count):
        for _ in range(count):
            self.permits.release()


@contextmanager
def listening(made):
    """The address of a server in a thread."""
    sock = listen("127.0.0.1", 0, False, False)
    server = Server(endpoint(made).app(), made)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname()
    finally:
        server.should_exit = True
        thread.join(10)
        sock.close()


def send(address, path, body):
    """A connection over which this request was sent, and nothing read."""
    sock = socket.create_connection(address, timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return sock


@contextmanager
def program(*options, **environment):
    """``serve`` as a program, and its URL."""
    with Program(*SERVE, *options, **environment) as started:
        (url,) = re.findall(r"endpoint (\S+)/v1", started.read_until("endpoint "))
        yield started, url


def until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.005)
