"""What keepers of a stock and producers count, for Prometheus, at a port of their own.

Owns the names. Shapes, counts and rates alone are among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import GaugeMetricFamily

from crypten_llm.errors import UsageError
from crypten_llm.links.sockets import reason_of

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from crypten_llm.protocols.dealer.manifest import Facts

Shapes = dict[str, int]  # blocks by shape


def shape_of(plan: Facts) -> str:
    """A shape in a few words: lengths, and what is unusual."""
    usual = {"chunk": 128, "policy": "full", "public_prefix": 0, "reveal": "logits", "temperature": 0}
    more = [f"{name}={plan[name]}" for name, value in usual.items() if plan.get(name, value) != value]
    return " ".join([f"{plan.get('prompt_tokens')}+{plan.get('max_new_tokens')}", *more])


class ByShape:
    """A gauge with a value for each shape that there is now; count: asked at every scrape."""

    def __init__(self, name: str, what: str, count: Callable[[], Shapes]) -> None:
        self._name, self._what, self._count = name, what, count

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._what, labels=["shape"])
        for shape, blocks in sorted(self._count().items()):
            family.add_metric([shape], blocks)
        yield family


def by_shape(registry: CollectorRegistry, name: str, what: str, count: Callable[[], Shapes]) -> None:
    collector: Collector = ByShape(f"crypten_llm_{name}", what, count)
    registry.register(collector)


class KeeperMetrics:
    """have: blocks of all shapes that are there. wanted: by the levels. producers: that are connected now."""

    def __init__(self, have: Callable[[], Shapes], wanted: Callable[[], Shapes], producers: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        by_shape(registry, "stock_blocks", "halves in stock", have)
        by_shape(registry, "stock_wanted_blocks", "that are wanted in stock", wanted)
        Gauge("crypten_llm_stock_producers", "connected now", registry=registry).set_function(producers)
        self._settled = Counter("crypten_llm_stock_delivered_blocks", "since the start", registry=registry)
        self._bytes = Counter("crypten_llm_stock_delivered_bytes", "since the start", registry=registry)

    def settled(self, name: str, size: int) -> None:
        self._settled.inc()
        self._bytes.inc(size)


class SupplyMetrics:
    """At an endpoint, beside its own. have: blocks by shape that the client has for this session."""

    def __init__(self, registry: CollectorRegistry, have: Callable[[], Shapes]) -> None:
        by_shape(registry, "stock_blocks", "halves in stock at the client, of the session's weights", have)
        self._hits = Counter("crypten_llm_stock_hits", "requests answered from a block", registry=registry)
        what = "requests that a dealer followed although a stock is kept, by why"
        self._misses = Counter("crypten_llm_stock_misses", what, ["why"], registry=registry)
        what = "of requests from stock, in which the client waited for material"
        self._waits = Counter("crypten_llm_stock_wait_seconds", what, registry=registry)

    def hit(self, waited: float) -> None:
        self._hits.inc()
        self._waits.inc(waited)

    def missed(self, why: str) -> None:
        self._misses.labels(why).inc()


class ProducerMetrics:
    """Of one producer."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"crypten_llm_produced_{name}", what, labels, registry=registry)

        self._blocks = counter("blocks", "dealt and delivered, by shape", "shape")
        self._bytes = counter("bytes", "of both halves")
        self._seconds = counter("seconds", "of dealing and delivering")
        self._failed = counter("failed_blocks", "dealt or begun for nothing")
        self._missing = Gauge("crypten_llm_stock_missing_blocks", "that the client's keeper lacks", registry=registry)
        self._filled = Gauge("crypten_llm_stock_filled", "the emptiest shape's part of its level", registry=registry)

    def ordered(self, missing: int, filled: float) -> None:
        self._missing.set(missing)
        self._filled.set(filled)

    def made(self, shape: str, size: int, seconds: float) -> None:
        self._blocks.labels(shape).inc()
        self._bytes.inc(size)
        self._seconds.inc(seconds)

    def failed(self) -> None:
        self._failed.inc()


def expose(registry: CollectorRegistry, address: str, port: int) -> None:
    """Answers Prometheus from now on, in a thread. Raises UsageError for a port that cannot be had."""
    try:
        start_http_server(port, address, registry)
    except OSError as error:
        raise UsageError(f"--metrics-port {port}: cannot listen on {address} ({reason_of(error)})") from None
