"""What a server says of its work so far, for whoever asks: counts, no contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from slowllm.errors import ProtocolError


@dataclass(frozen=True)
class ServerStatus:
    """What a server has done since it was started, and what it holds now.

    Attributes:
        num_passages: stops that its carousel has served, each for all requests that waited there.
        read_bytes: from its disk; 0 where its blocks lie in memory.
        peak_rss_bytes: the largest resident set of its process.
        num_sessions: that are open.
        cache_tokens_free: for which there is room in sessions.
        waiting_tokens: of the requests that are under way or wait.
    """

    num_passages: int
    read_bytes: int
    peak_rss_bytes: int
    num_sessions: int
    cache_tokens_free: int
    waiting_tokens: int

    def to_meta(self) -> dict[str, Any]:
        """Return the meta of an answer."""
        return asdict(self)

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        """Return the status of an answer.

        Raises:
            ProtocolError: a count is missing, or none.
        """
        for entry in fields(cls):
            value = meta.get(entry.name)
            if type(value) is not int or value < 0:
                raise ProtocolError(f"a server's status has no count {entry.name}, but {str(value)[:40]!r}")
        return cls(**{entry.name: meta[entry.name] for entry in fields(cls)})
