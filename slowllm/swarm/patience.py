"""How long a client of a swarm waits, and how often it tries: numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from slowllm.errors import InputError

# Bans double with every failure of a server until it has answered again, up to this.
MOST_BAN_SECONDS = 300.0
# A server that is well, but busy or too small for the work, is asked again after this time, however often it was.
SHORT_BAN_SECONDS = 1.0
# Of which calls the route is logged: all, those that keep a cache, or none.
ShownRoutes = Literal["all", "inference", "none"]


@dataclass(frozen=True)
class Patience:
    """How a client deals with servers that fail or are slow, beside the two timeouts of `SwarmOptions`.

    Attributes:
        max_attempts: servers that are tried for one passage before its error is raised; None for as many as the time allows.
        ban_seconds: in which a server that failed is not asked; twice as long at each further failure.
        min_wait_seconds: before the first new look for servers, where some blocks are served by nobody; twice as long each
            time.
        max_wait_seconds: between two looks, at most.
        request_seconds: for one answer, within the time of the passage; without a limit as long as the server gives signs of life.
        connect_seconds: for opening a connection to a server.
        refresh_seconds: after which servers that have come or left are seen, at the latest.
        open_seconds: for joining the swarm.
        shown_routes: of which calls the route is logged when it changes.
    Raises:
        InputError: a number cannot be used.
    """

    max_attempts: int | None = None
    ban_seconds: float = 5.0
    min_wait_seconds: float = 1.0
    max_wait_seconds: float = 1.0
    request_seconds: float = math.inf
    connect_seconds: float = 15.0
    refresh_seconds: float = 15.0
    open_seconds: float = 60.0
    shown_routes: ShownRoutes = "all"

    def __post_init__(self) -> None:
        if self.max_attempts is not None and self.max_attempts < 1:
            raise InputError(f"{self.max_attempts} attempts are none; give 1 at least, or None for no limit")
        for name in ("request_seconds", "connect_seconds", "open_seconds", "refresh_seconds"):
            seconds = getattr(self, name)
            if not seconds > 0:
                raise InputError(f"{name} of {seconds:g} s is no time; give more than 0")

    def wait_seconds(self, num_looks: int) -> float:
        """Return the seconds before the next look for servers, after `num_looks` in vain."""
        return float(min(self.max_wait_seconds, self.min_wait_seconds * 2.0 ** min(num_looks, 60)))

    def seconds_banned(self, num_failures: int, *, is_well: bool) -> float:
        """Return for how long a server is not asked.

        Args:
            num_failures: since it last answered.
            is_well: whether it only has no room, or takes less at a time.
        """
        if is_well:
            return SHORT_BAN_SECONDS
        return float(min(self.ban_seconds * 2.0 ** min(num_failures - 1, 60), MOST_BAN_SECONDS))
