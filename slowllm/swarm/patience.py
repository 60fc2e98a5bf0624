"""How long a client of a swarm waits, and how often it tries: numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from slowllm.errors import InputError

# Bans double with every failure of a server until it has answered again, up to this.
MOST_BAN_SECONDS = 300.0
# A server that is well, but busy or too small for the work, is asked again after this time, however often it was.
SHORT_BAN_SECONDS = 1.0
# Of which calls the route is logged: all, those that keep a cache, or none.
ShownRoutes = Literal["all", "inference", "none"]
# Of any time that is given: systems take no much longer waits.
MOST_SECONDS = 1e9


def _is_number(value: Any, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_seconds(name: str, value: Any, *, zero: bool = False, endless: bool = False) -> None:
    """Refuse what is no time.

    Args:
        name: of the field or option, for the message.
        value: seconds.
        zero: whether 0 is allowed.
        endless: whether `math.inf` is allowed.
    Raises:
        InputError: it is no number, or one that is not allowed.
    """
    if _is_number(value) and (
        0 < value <= MOST_SECONDS or (zero and value == 0) or (endless and value == math.inf)
    ):
        return
    lowest = "from 0" if zero else "more than 0"
    raise InputError(
        f"{name}={value!r} is no time that can be used; give seconds, {lowest} and up to {MOST_SECONDS:.0e}"
        + (", or math.inf for no limit" if endless else "")
    )


def check_share(name: str, value: Any) -> None:
    """Refuse what is no share.

    Raises:
        InputError: it is no number from 0 to 1; the message has the name.
    """
    if not _is_number(value) or not 0 <= value <= 1:
        raise InputError(f"{name}={value!r} is no share; give a number from 0 to 1")


def check_patience(field: str, value: Any, name: str = "") -> None:
    """Refuse a value of a field of `Patience`.

    Args:
        field: its name here.
        value: for it.
        name: by which the message calls it; by default its name here.
    Raises:
        InputError: the field cannot have it.
    """
    name = name or field
    if field == "max_attempts":
        if value is not None and (not _is_number(value, Integral) or value < 1):
            raise InputError(
                f"{name}={value!r} is no number of attempts; give 1 or more, or None for no limit"
            )
    elif field == "shown_routes":
        if value not in get_args(ShownRoutes):
            raise InputError(
                f"{name}={value!r} is unknown; use {', '.join(map(repr, get_args(ShownRoutes)))}"
            )
    else:
        may_be_zero = field in ("ban_seconds", "min_wait_seconds", "max_wait_seconds")
        check_seconds(name, value, zero=may_be_zero, endless=field == "request_seconds")


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
        connect_seconds: for opening a connection to a server, within the silence after which it counts as dead.
        refresh_seconds: after which servers that have come or left are looked for, beside the work.
        open_seconds: for joining the swarm, within the time of a call.
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
        for own in fields(self):
            check_patience(own.name, getattr(self, own.name))

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
