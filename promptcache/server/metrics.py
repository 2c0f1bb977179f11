"""Serving metrics: what a server's cache did, in the form that Prometheus reads."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Gauges(NamedTuple):
    """Values that are read when the metrics are requested.

    Attributes:
        nbytes: By tier, the bytes that it holds.
        limits: By tier, the bytes that it may hold.
        evictions: By tier, how many entries were evicted.
        saves: By result, how many prefixes were to be stored.
        queued_nbytes: Bytes that wait for the disk.
        queued_saves: Prefixes that wait for it.
        active: Requests that are being read or answered.
        waiting: Requests that wait for others which read the same prefix.
        waits: Requests that had to wait so far.
    """

    nbytes: Mapping[str, int]
    limits: Mapping[str, int]
    evictions: Mapping[str, int]
    saves: Mapping[str, int]
    queued_nbytes: int
    queued_saves: int
    active: int
    waiting: int
    waits: int = 0


class ServingMetrics(Collector):
    """Counts events, and reads gauges on request."""

    def __init__(self, levels: Callable[[], Gauges]) -> None:
        self._levels = levels
        self._registry = CollectorRegistry()
        self._hits = self._counter("hits", "Prompts that had a cached prefix", "tier")
        self._misses = self._counter("misses", "Prompts that had none")
        self._reused = self._counter("tokens_reused", "Prompt tokens reused", "tier")
        self._prefilled = self._counter("tokens_prefilled", "Prompt tokens read")
        self._seconds = self._counter(
            "seconds_saved", "What reading the reused tokens would have taken"
        )
        self._registry.register(self)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"promptcache_{name}", text, labels, registry=self._registry)

    def hit(self, tier: str, cached_tokens: int, prefilled_tokens: int) -> None:
        """Count a prompt that had a cached prefix in a tier."""
        self._hits.labels(tier).inc()
        self._reused.labels(tier).inc(cached_tokens)
        self._prefilled.inc(prefilled_tokens)

    def miss(self, prefilled_tokens: int) -> None:
        """Count a prompt that had none."""
        self._misses.inc()
        self._prefilled.inc(prefilled_tokens)

    def save_seconds(self, seconds: float) -> None:
        """Count time that reading what was reused would have taken."""
        self._seconds.inc(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield the levels; called by the registry."""
        levels = self._levels()
        yield _gauge("bytes", "Bytes that a tier holds", levels.nbytes)
        yield _gauge("limit_bytes", "Bytes that a tier may hold", levels.limits)
        yield _total("evictions", "Entries that had to go", "tier", levels.evictions)
        yield _total("saves", "Prefixes that were to be stored", "result", levels.saves)
        for name, text, value in (
            (
                "writer_queue_bytes",
                "Bytes that wait for the disk",
                levels.queued_nbytes,
            ),
            ("writer_queue_saves", "Prefixes that wait for it", levels.queued_saves),
            ("active_requests", "Requests being read or answered", levels.active),
            ("waiting_requests", "Requests that wait for others", levels.waiting),
        ):
            yield GaugeMetricFamily(f"promptcache_{name}", text, value)
        yield CounterMetricFamily(
            "promptcache_single_flight_waits",
            "Prompts that waited for another with their prefix",
            levels.waits,
        )

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self._registry)


def _gauge(name: str, text: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(f"promptcache_{name}", text, labels=["tier"])
    for tier, value in values.items():
        family.add_metric([tier], value)
    return family


def _total(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"promptcache_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
