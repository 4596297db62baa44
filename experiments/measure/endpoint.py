"""What the endpoint adds to a token: a stream over HTTP beside the same steps in the session itself.

    python -m experiments.measure.endpoint --tokens 200 --repeats 5

The session is that of the shipped model on engine ``plain``, whose steps are the shortest there are, so that what the
endpoint takes is not lost in them. Prints milliseconds a token, medians.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from statistics import median
from time import perf_counter

from crypten_llm.session.api import PrivateLlama
from experiments.tools.command import command

PROMPT = "The passkey is 4711."


@contextmanager
def served():
    """The address of ``serve``, started with the shipped model."""
    start = [sys.executable, "-m", "crypten_llm", "serve", "--engine", "plain", "--threads", "1", "--port", "0"]
    with subprocess.Popen(start, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None, "it was opened with the process"
        port = 0
        try:
            for line in process.stderr:
                if found := re.search(r"endpoint http://127\.0\.0\.1:(\d+)", line):
                    port = int(found[1])
                if "requests are answered" in line:
                    break
            yield "127.0.0.1", port
        finally:
            process.terminate()


def over_http(address: tuple[str, int], tokens: int) -> float:
    """Seconds from the first piece to the last, a token."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "stream": True, "logprobs": 0})
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    times = []
    with socket.create_connection(address) as sock, sock.makefile("rb") as lines:
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        for line in lines:
            if line.startswith(b"data: {") and b'"finish_reason":null' in line:
                times.append(perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


def in_the_session(llama: PrivateLlama, tokens: int) -> float:
    times = []
    for event in llama.stream(PROMPT, max_new_tokens=tokens, logprobs=0):
        if hasattr(event, "token_id"):
            times.append(perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


@command
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    by_http, alone = [], []
    with served() as address, PrivateLlama.from_pretrained("shipped", engine="plain", threads=1) as llama:
        for _ in range(arguments.repeats):  # in turns, so that whatever else the machine does is in both
            by_http.append(over_http(address, arguments.tokens))
            alone.append(in_the_session(llama, arguments.tokens))
    figures = {"http": 1e3 * median(by_http), "session": 1e3 * median(alone)}
    print(f"{figures['http']:.2f} ms a token over HTTP, {figures['session']:.2f} in the session")
    print(f"the endpoint's own: {figures['http'] - figures['session']:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
