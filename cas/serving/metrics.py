"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cas.serving.engine import Engine
from cas.serving.requests import Finished

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class _Now:
    """What the engine knows by itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """(prometheus_client) The figures."""
        engine, cache = self.engine, self.engine.answerer.cartridges
        yield GaugeMetricFamily("cas_requests_waiting", "Requests in the queue", engine.queued)
        yield GaugeMetricFamily("cas_requests_decoding", "Requests that decode", engine.decoding)
        yield GaugeMetricFamily("cas_cartridge_cache_bytes", "Cartridges in memory", cache.bytes)
        yield CounterMetricFamily("cas_answer_tokens", "Tokens of answers", engine.decoded)
        yield CounterMetricFamily("cas_cartridge_cache_hits", "Cartridges that were in memory", cache.hits)
        yield CounterMetricFamily("cas_cartridge_cache_misses", "Cartridges read from the store", cache.misses)


class Metrics:
    """What happened since the start, and what happens now; without any text."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(engine))
        self._requests = Counter("cas_requests", "Requests by their HTTP status", ["status"], registry=self.registry)
        self._prompt = Counter("cas_prompt_tokens", "Tokens of prompts", ["kind"], registry=self.registry)
        self._times = {
            name: Histogram(f"cas_{name}_seconds", about, registry=self.registry, buckets=_SECONDS)
            for name, about in (("first_token", "From request to first token"), ("request", "From request to answer"))
        }

    def count(self, status: int) -> None:
        """A request that ended with a status; 499 is a client that left."""
        self._requests.labels(str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """An answer has begun."""
        self._times["first_token"].observe(seconds)

    def answered(self, finished: Finished, seconds: float) -> None:
        """An answer is complete."""
        self._times["request"].observe(seconds)
        self._prompt.labels("cartridge").inc(finished.answer.tokens["cartridge"])
        self._prompt.labels("own").inc(finished.answer.tokens["prompt"])

    def text(self) -> bytes:
        """As Prometheus reads them."""
        return generate_latest(self.registry)
