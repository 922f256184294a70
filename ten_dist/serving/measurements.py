"""What the server tells Prometheus."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from ten_dist.serving.answer import Answer, Piece
from ten_dist.serving.prefix_cache import PrefixCache
from ten_dist.serving.worker import Worker

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
)


class Measurements:
    """Counters of one server.

    Args:
        worker: whose slots, queue and tokens are told.
        cache: whose use is told.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, worker: Worker, cache: PrefixCache) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ten_requests",
            "Requests by the status of their answer",
            ["status"],
            registry=self._registry,
        )
        self._first = self._histogram(
            "ten_first_token_seconds", "From a request to its first token"
        )
        self._each = self._histogram(
            "ten_token_seconds", "From a token to the next, on average over a request"
        )
        self._whole = self._histogram(
            "ten_request_seconds", "From a request to its last token"
        )
        self._gauge("ten_slots_used", "Sequences continued", lambda: worker.running)
        self._gauge("ten_queue_length", "Sequences that wait", lambda: worker.waiting)
        self._gauge("ten_cache_bytes", "Bytes of known states", lambda: cache.bytes)
        self._registry.register(
            _Totals(
                {
                    "ten_generated_tokens": ("Generated", lambda: worker.tokens),
                    "ten_prompt_tokens": ("Of prompts", lambda: worker.prompt_tokens),
                    "ten_steps": ("Steps of the model", lambda: worker.steps),
                    "ten_cache_hits": ("Beginnings known", lambda: cache.hits),
                    "ten_cache_saved_tokens": (
                        "Tokens not read again",
                        lambda: cache.tokens_saved,
                    ),
                }
            )
        )

    def count_request(self, status: int) -> None:
        """Take note of the status of an answer."""
        self._requests.labels(status=status).inc()

    async def pieces(self, answer: Answer) -> AsyncIterator[Piece]:
        """The pieces of an answer, and how long they took."""
        start = time.perf_counter()
        first: float | None = None
        tokens_at_first = 0
        async for piece in answer.pieces():
            if first is None:
                first, tokens_at_first = time.perf_counter(), answer.longest
                self._first.observe(first - start)
            yield piece
        end = time.perf_counter()
        self._whole.observe(end - start)
        if first is not None and answer.longest > tokens_at_first:
            self._each.observe((end - first) / (answer.longest - tokens_at_first))

    def text(self) -> bytes:
        """All of it, in the format of Prometheus."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_SECONDS, registry=self._registry)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(name, what, registry=self._registry).set_function(value)


class _Totals(Collector):
    """Counters that are kept elsewhere.

    Args:
        totals: what each counts, and its value now, by name.
    """

    def __init__(self, totals: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        """Their values now."""
        for name, (what, value) in self._totals.items():
            yield CounterMetricFamily(name, what, value())
