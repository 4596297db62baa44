"""Faults under load: parties and links of an endpoint fail at random while requests are answered.

    python -m experiments.measure.faults --seconds 3600
    python -m experiments.measure.faults --seconds 60 --only kill cut

All parties are on this machine, on plain links, the endpoint in this process, which three callers keep asking, whole
and streamed. At a random moment one thing fails: owner or dealer is killed or frozen, or the client's link to one of
them is cut or has a bit changed in what arrives. Then each request has to end in the right answer or one error of one
line, within the time that a wait may last; every party's process has to end, and so draws no mask any more; and what is
asked afterwards has to be refused at once. Then a new session begins. Prints counts by kind; what was not as it has to
be is printed, and the command fails.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from crypten_llm.errors import CryptenLLMError
from crypten_llm.roles import DEALER, OWNER
from crypten_llm.serving.app import Endpoint
from crypten_llm.serving.fair_queue import FairQueue
from crypten_llm.serving.guard import Guard
from crypten_llm.serving.job import Job
from crypten_llm.serving.kept import Keeping, Kept
from crypten_llm.serving.metrics import Metrics
from crypten_llm.serving.pricing import Pricer
from crypten_llm.serving.server import Server, listen
from crypten_llm.serving.service import Service, State
from crypten_llm.session.api import PrivateLlama
from experiments.tools.command import command
from experiments.tools.tables import print_table

DOCUMENT = "Document 1: Kenji has a job at Indigo.\nDocument 2: The head office of Indigo is in Bristol.\n"
PROMPTS = [f"{DOCUMENT}Question: In which city does Kenji work?\nAnswer:", "The passkey is 4711.", "Document 1: A"]
TOKENS = 4
CALLERS = 3
GRACE = 30.0  # seconds on top of the timeout, for all to end on a busy machine
Answers = dict[str, str]


@dataclass
class Load:
    """What callers have seen. wrong: what must not be, in words."""

    port: int
    right: Answers
    answered: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def keep_asking(self, seed: int, limit: float) -> None:
        """Until something is refused, which nothing is before the fault."""
        drawn = random.Random(seed)
        while not self.ended.is_set():
            prompt, streams = drawn.choice(PROMPTS), drawn.random() < 0.5
            try:
                text, error = ask(self.port, prompt, streams, limit)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as problem:
                self.wrong.append(f"a request ended in {problem!r}")
                return
            if error is not None:
                self.refused += 1
                if not error or not error.isprintable():
                    self.wrong.append(f"an error that is no line: {error!r}")
                return
            self.answered += 1
            if text != self.right[prompt]:
                self.wrong.append(f"answered {text!r}, and {self.right[prompt]!r} is right")


def ask(port: int, prompt: str, streams: bool, limit: float) -> tuple[str, str | None]:
    """The answer, and the error that came in its place. Raises OSError where neither comes in time."""
    body = json.dumps({"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": streams})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        data = reply.read().decode()
    finally:
        connection.close()
    if not streams or reply.status != 200:
        found = json.loads(data)
        if reply.status != 200:
            return "", found["error"]["message"]
        return found["choices"][0]["text"], None
    pieces = [json.loads(line[6:]) for line in data.splitlines() if line.startswith("data: {")]
    if errors := [piece["error"]["message"] for piece in pieces if "error" in piece]:
        return "", errors[0] if len(errors) == 1 else ""
    if "data: [DONE]" not in data:
        raise ValueError("a stream that ends without a word")
    return "".join(piece["choices"][0]["text"] for piece in pieces), None


def kill(llama: PrivateLlama, rank: int, drawn: random.Random) -> None:
    os.kill(_pid(llama, rank), signal.SIGKILL)


def freeze(llama: PrivateLlama, rank: int, drawn: random.Random) -> None:
    os.kill(_pid(llama, rank), signal.SIGSTOP)


def cut(llama: PrivateLlama, rank: int, drawn: random.Random) -> None:
    assert llama.party.transport is not None
    llama.party.transport._links[rank].sock.shutdown(socket.SHUT_RDWR)


def corrupt(llama: PrivateLlama, rank: int, drawn: random.Random) -> None:
    """One bit of what arrives, whichever message it is in."""
    assert llama.party.transport is not None
    link = llama.party.transport._links[rank]
    receive, left = link.receive_into, [drawn.randrange(1, 40)]

    def altering(views: list[memoryview]) -> int:
        view = views[0]
        came = receive(views)
        left[0] -= bool(came)
        if came and left[0] == 0:
            view[drawn.randrange(min(came, view.nbytes))] ^= 1 << drawn.randrange(8)
        return came

    link.receive_into = altering  # type: ignore[method-assign]


KINDS: dict[str, Callable[[PrivateLlama, int, random.Random], None]] = {
    "kill": kill,
    "freeze": freeze,
    "cut": cut,
    "corrupt": corrupt,
}


def _pid(llama: PrivateLlama, rank: int) -> int:
    assert llama._children is not None
    return llama._children.processes[rank].pid


@contextmanager
def served(model: str, timeout: float) -> Iterator[tuple[Service, int]]:
    """An endpoint that answers, and its port."""
    queue: FairQueue[Job] = FairQueue(16)
    opening = lambda: PrivateLlama.from_pretrained(model, engine="wire", timeout=timeout, threads=1)  # noqa: E731
    kept = Kept(Keeping(), queue)
    metrics = Metrics(lambda: len(queue), lambda: len(service.running), lambda: len(kept))
    service: Service = Service(opening, queue, metrics, Pricer(None, "wire"), kept)
    sock = listen("127.0.0.1", 0, False, False)
    server = Server(Endpoint(service, Guard(), "model").app(), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    service.start()
    try:
        while service.state is State.PROGRESSING:
            time.sleep(0.05)
        yield service, sock.getsockname()[1]
    finally:
        server.should_exit = True
        service.stop()
        service.join()
        thread.join()
        sock.close()


def one(model: str, right: Answers, kind: str, seed: int, timeout: float) -> Load:
    """One session, until that kind of fault has ended it."""
    drawn = random.Random(seed)
    with served(model, timeout) as (service, port):
        load, llama = Load(port, right), service.llama
        if llama is None or llama._children is None:
            raise CryptenLLMError(f"the session could not be opened: {service.reason}")
        processes = list(llama._children.processes.values())
        limit = 2 * timeout + GRACE
        callers = [threading.Thread(target=load.keep_asking, args=(seed + n, limit)) for n in range(CALLERS)]
        for caller in callers:
            caller.start()
        before = drawn.randrange(7)  # answers
        while load.answered < before and any(caller.is_alive() for caller in callers):
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 1))
        KINDS[kind](llama, drawn.choice([OWNER, DEALER]), drawn)
        deadline = time.monotonic() + limit
        for caller in callers:
            caller.join(max(0.0, deadline - time.monotonic()))
        if any(caller.is_alive() for caller in callers):
            load.wrong.append("a request hangs")
        load.ended.set()
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        if any(process.poll() is None for process in processes):
            load.wrong.append("a party goes on")
        if service.state is not State.FAILED:
            load.wrong.append(f"the endpoint is {service.state}")
        elif ask(port, PROMPTS[0], False, limit)[1] is None:
            load.wrong.append("it is answered what was asked after the end")
    return load


def run(seconds: float, kinds: list[str], timeout: float, seed: int, model: str = "shipped") -> list[dict]:
    """A row for each kind. Raises CryptenLLMError where something was not as it has to be."""
    with PrivateLlama.from_pretrained(model, engine="plain", threads=1) as llama:
        right = {prompt: llama.generate(prompt, max_new_tokens=TOKENS).text for prompt in PROMPTS}
    found = {kind: Counter[str]() for kind in kinds}
    started, count, wrong = time.monotonic(), 0, list[str]()
    while time.monotonic() - started < seconds or count < len(kinds):
        kind = kinds[count % len(kinds)]
        load = one(model, right, kind, seed + 10 * count, timeout)
        found[kind].update(faults=1, answered=load.answered, refused=load.refused, wrong=len(load.wrong))
        wrong += [f"{kind}, seed {seed + 10 * count}: {words}" for words in load.wrong]
        count += 1
        print(f"{count} faults, {len(wrong)} wrong", end="\r", file=sys.stderr, flush=True)
    if wrong:
        raise CryptenLLMError("; ".join(wrong))
    return [{"fault": kind, **counts} for kind, counts in found.items()]


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="S", help="how long (default: an hour)")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), help="kinds of fault")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="of every wait (default: 10)")
    parser.add_argument("--seed", type=int, default=None, help="of what fails when (default: drawn, and printed)")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr)
    print_table(run(arguments.seconds, arguments.only, arguments.timeout, seed))


if __name__ == "__main__":
    sys.exit(main())
