"""Where the time of a client's run went, as one table: a row for each server. Pure text; knows no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_HEADER = ("hop", "requests", "network s", "queue s", "compute s", "rebuilt")


@dataclass
class PeerTimes:
    """Where the time of the requests to one server went, as the client and the server have measured it.

    Attributes:
        name: of the server.
        num_requests: that were answered.
        network_seconds: neither waiting nor computing at the server.
        queue_seconds: waiting at the server for the first stop of the span.
        compute_seconds: passing through the span, the waits for weights included.
    """

    name: str
    num_requests: int = 0
    network_seconds: float = 0.0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0


def hop_table(times: Mapping[str, PeerTimes], rebuilt: Mapping[str, int]) -> str:
    """Return a table with a header, the servers that took longest first.

    Args:
        times: by the servers' ids.
        rebuilt: sessions that were rebuilt at a server after another one had failed, by the server's id.
    """
    order = sorted(times, key=lambda peer: -_seconds(times[peer]))
    rows = [_HEADER]
    for peer in order:
        one = times[peer]
        rows.append(
            (
                one.name, f"{one.num_requests:,}", f"{one.network_seconds:.2f}", f"{one.queue_seconds:.2f}",
                f"{one.compute_seconds:.2f}", f"{rebuilt.get(peer, 0):,}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _seconds(times: PeerTimes) -> float:
    return times.network_seconds + times.queue_seconds + times.compute_seconds
