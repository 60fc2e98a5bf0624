"""What a server counts of its work for monitoring, and how Prometheus reads it: text, one number a line.

Counts kinds, outcomes, tokens and seconds; no ids of clients and no contents. Knows no HTTP.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from slowllm.swarm.requests import PeerRequest
from slowllm.swarm.status import ServerStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A stranger's word must not become a label: each one would be a new series for ever.
KINDS = ("forward", "replay", "backward", "end_session", "status", "reach")
OTHER = "other"
OUTCOMES = (
    "answered", "cancelled", "BusyError", "SessionError", "InputError", "ProtocolError", "NonFiniteError",
)  # fmt: skip


class RequestCounts:
    """Counts the requests of a server by kind and outcome, and what they took. Used on any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.queue_seconds: Counter[str] = Counter()
        self.compute_seconds: Counter[str] = Counter()

    def watch(self, request: PeerRequest) -> None:
        """Count a request when it ends, however it does."""
        word = request.meta.get("op")
        kind = word if isinstance(word, str) and word in KINDS else OTHER
        hidden = request.tensors.get("hidden")
        num_tokens = hidden.shape[0] * hidden.shape[1] if hidden is not None and hidden.dim() > 1 else 0

        def ended(outcome: str, said: Mapping[str, Any]) -> None:
            with self._lock:
                self.requests[kind, outcome if outcome in OUTCOMES else OTHER] += 1
                if outcome == "answered":
                    self.tokens[kind] += num_tokens
                    self.queue_seconds[kind] += said.get("queue_seconds", 0.0)
                    self.compute_seconds[kind] += said.get("compute_seconds", 0.0)

        request.add_end_callback(ended)

    def copy(self) -> RequestCounts:
        """Return the counts of one moment."""
        with self._lock:
            other = RequestCounts()
            other.requests, other.tokens = self.requests.copy(), self.tokens.copy()
            other.queue_seconds, other.compute_seconds = (
                self.queue_seconds.copy(),
                self.compute_seconds.copy(),
            )
            return other


def metrics_text(status: ServerStatus, counts: RequestCounts, cache_tokens: int) -> str:
    """Return the metrics of a server in Prometheus's text format.

    Args:
        status: of the server now.
        counts: of its requests.
        cache_tokens: that its sessions may hold together.
    """
    counts = counts.copy()
    by_kind = sorted(counts.tokens)
    families: list[tuple[str, str, str, Iterable[tuple[str, float]]]] = [
        ("passages_total", "counter", "Stops that the carousel has served.", [("", status.num_passages)]),
        ("read_bytes_total", "counter", "Bytes of weights read from the disk.", [("", status.read_bytes)]),
        ("sessions", "gauge", "Open sessions.", [("", status.num_sessions)]),
        ("cache_tokens", "gauge", "Tokens that sessions may hold together.", [("", cache_tokens)]),
        ("cache_tokens_free", "gauge", "Tokens for which there is room in sessions.", [("", status.cache_tokens_free)]),
        ("waiting_tokens", "gauge", "Tokens of requests that are under way or wait.", [("", status.waiting_tokens)]),
        ("peak_rss_bytes", "gauge", "The largest resident set of the process.", [("", status.peak_rss_bytes)]),
        ("requests_total", "counter", "Requests that have ended.",
         [(f'{{kind="{kind}",outcome="{outcome}"}}', n) for (kind, outcome), n in sorted(counts.requests.items())]),
        ("tokens_total", "counter", "Tokens of requests that were answered.",
         [(f'{{kind="{kind}"}}', counts.tokens[kind]) for kind in by_kind]),
        ("queue_seconds_total", "counter", "Seconds that answered requests waited for their first stop.",
         [(f'{{kind="{kind}"}}', counts.queue_seconds[kind]) for kind in by_kind]),
        ("compute_seconds_total", "counter", "Seconds that answered requests took through the span.",
         [(f'{{kind="{kind}"}}', counts.compute_seconds[kind]) for kind in by_kind]),
    ]  # fmt: skip
    lines = []
    for name, kind, meaning, samples in families:
        lines += [f"# HELP slowllm_{name} {meaning}", f"# TYPE slowllm_{name} {kind}"]
        lines += [f"slowllm_{name}{labels} {value!r}" for labels, value in samples]
    return "\n".join(lines) + "\n"
