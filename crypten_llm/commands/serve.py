"""An endpoint for programs that know OpenAI's interface, and a page for people, in front of one session.

Owns what is put together: parties, queue, price and page. stderr says where it is and how the parties fare.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from crypten_llm.commands.cost import predict, predict_open, predict_turns
from crypten_llm.commands.show import say, say_outside, who
from crypten_llm.errors import UsageError
from crypten_llm.links.network import parse_network
from crypten_llm.serving.app import Endpoint
from crypten_llm.serving.asking import Usual
from crypten_llm.serving.fair_queue import ROOM, FairQueue
from crypten_llm.serving.guard import Guard, read_keys
from crypten_llm.serving.job import Job
from crypten_llm.serving.kept import Keeping, Kept
from crypten_llm.serving.metrics import Metrics
from crypten_llm.serving.pricing import Pricer
from crypten_llm.serving.server import Server, check_https, listen
from crypten_llm.serving.service import Service
from crypten_llm.serving.stocking import Stocking
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.launch import is_distributed
from crypten_llm.session.settings import LaunchConfig, ProtocolConfig, split


@dataclass(frozen=True)
class Place:
    """Where the endpoint is and for whom. api_keys: a file. https: certificate and key. name: of the model. opens:
    whether a browser shows the page. ends: whether the parties' end is the endpoint's.
    only_alone: see ``Stocking``.
    """

    listen: str = "127.0.0.1"
    port: int = 8000
    api_keys: str = ""
    https: tuple[str, str] | None = None
    queue: int = 16
    together: int = ROOM
    name: str = ""
    opens: bool = False
    ends: bool = False
    keeping: Keeping = Keeping()
    only_alone: bool = False


def serve(place: Place, usual: Usual, model: str, tokenizer: str | None, **settings: Any) -> None:
    """Until Ctrl-C; settings as for ``from_pretrained``. Raises UsageError for what cannot be served."""
    protocol, launched = split(settings)
    if protocol.tape:
        raise UsageError("a tape is dealt for one request, and an endpoint answers many; leave --tape out")
    for name in ("queue", "together"):
        if (count := getattr(place, name)) < 1:
            raise UsageError(f"--{name} is {count}; it must be 1 or more")
    keys = read_keys(place.api_keys)
    if place.https:
        check_https(*place.https)
    sock = listen(place.listen, place.port, bool(place.https), bool(keys))
    room = 1 if launched.is_thin else place.together  # a helper takes one prompt at a time
    queue: FairQueue[Job] = FairQueue(place.queue)
    kept = Kept(place.keeping, queue)
    metrics = Metrics(lambda: len(queue), lambda: len(service.running), lambda: len(kept))
    pricer = Pricer(_counted(protocol, launched, room), protocol.engine)
    alone = Pricer(_counted_from_stock(protocol, launched) if protocol.engine == "wire" else None, protocol.engine)
    stocking = Stocking(alone, pricer, metrics, place.only_alone)
    reopens = not is_distributed()
    opening = partial(PrivateLlama.from_pretrained, model, tokenizer=tokenizer, shielded=True, **settings)
    calls = _opened, lambda: server.end()
    given = opening, queue, metrics, pricer, kept, room, reopens, place.ends
    service: Service = Service(*given, *calls, stocking=stocking)
    endpoint = Endpoint(service, Guard(keys, [place.listen]), place.name or name_of(model), usual)
    server: Server = Server(endpoint.app(), service, place.https)
    host = f"[{place.listen}]" if ":" in place.listen else place.listen
    url = f"http{'s' if place.https else ''}://{host}:{sock.getsockname()[1]}"
    say(who(protocol))
    say(f"endpoint {url}/v1, page {url}/; {_asks(keys)}; Ctrl-C ends it and the parties")
    if place.opens and _has_screen():
        webbrowser.open(url)
    server.serve_at(sock)


def name_of(model: str) -> str:
    """What a model goes by: its hub id, or the name of its folder or file, never where that is."""
    return Path(model).resolve().name if os.path.exists(model) else model


def _opened(llama: PrivateLlama) -> None:
    say(f"model shared in {llama.load_seconds:.1f} s: requests are answered")
    say_outside(llama)


def _counted(protocol: ProtocolConfig, launched: LaunchConfig, room: int) -> Any:
    if protocol.engine != "wire":
        return None
    network = parse_network(launched.network) if launched.network else None
    return (
        partial(predict_turns, network=network, precision=protocol.precision)
        if launched.is_thin
        else partial(predict_open, room=room, network=network, precision=protocol.precision)
    )


def _counted_from_stock(protocol: ProtocolConfig, launched: LaunchConfig) -> Any:
    network = parse_network(launched.network) if launched.network else None
    return lambda config, courses: predict(
        config, courses[0].plan, network, from_stock=True, precision=protocol.precision
    )


def _asks(keys: list[str]) -> str:
    if keys:
        return f"{len(keys)} API key{'s' if len(keys) > 1 else ''}"
    return "no API key: every program of this machine may ask"


def _has_screen() -> bool:
    """Whether a browser would be a window: one in the terminal would take it over."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))
