"""What can be monitored of the server, in Prometheus's format: counts of requests and tokens, no contents and no names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slowllm.inference.service_types import ServiceStatus
from slowllm.runtime.streamed_lm import Report

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From a tiny model in memory to a large one that streams.
_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)


class Metrics:
    """Counts requests, and reads what the service and the carousel count. Used by any thread.

    Args:
        status: returns that of the service.
        report: returns that of the model.
    """

    def __init__(self, status: Callable[[], ServiceStatus], report: Callable[[], Report]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "slowllm_requests", "Requests that have ended, 499 where the client hung up.", ["endpoint", "status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "slowllm_request_seconds", "From a request to the end of its answer.", ["endpoint"], buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Readings(status, report))

    def count(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """Return all metrics of the moment."""
        return generate_latest(self._registry)


class _Readings(Collector):
    def __init__(self, status: Callable[[], ServiceStatus], report: Callable[[], Report]) -> None:
        self._status, self._report = status, report

    def collect(self) -> Iterator[Metric]:
        status, report = self._status(), self._report()
        for name, meaning, value in (
            ("riding", "Prompts that are being answered.", status.num_riding),
            ("waiting", "Prompts that wait for room.", status.num_waiting),
            (
                "held_tokens",
                "Tokens for which the prompts that are being answered have room.",
                status.held_tokens,
            ),
            ("max_tokens", "Tokens for which there is room in all.", status.max_tokens),
            ("peak_rss_bytes", "The largest resident set of the process.", report.peak_rss_bytes),
        ):
            yield GaugeMetricFamily(f"slowllm_{name}", meaning, value=value)
        for name, meaning, total in (
            ("sweeps", "Sweeps over the weights that have ended.", status.num_sweeps),
            ("prompt_tokens", "Tokens of prompts that have passed the model.", status.num_prompt_tokens),
            (
                "found_tokens",
                "Tokens of prompts whose keys and values were found in kept ones.",
                status.num_found_tokens,
            ),
            ("new_tokens", "Tokens that were made.", status.num_new_tokens),
            ("passages", "Stops that the carousel has served.", report.num_passages),
            ("read_bytes", "Bytes of weights read from the disk.", report.read_bytes),
            ("wait_seconds", "Seconds that the carousel waited for weights.", report.wait_seconds),
            ("compute_seconds", "Seconds that it computed.", report.compute_seconds),
        ):
            yield CounterMetricFamily(f"slowllm_{name}", meaning, value=total)
