"""The directory is read beside the work, and waited for only where what is known does not do."""

from __future__ import annotations

import time
from concurrent.futures import Future

import pytest

from slowllm.errors import DirectoryError, MissingBlocksError, NetworkError
from slowllm.modeling.remote_spans import Need
from slowllm.swarm.hops import Hops
from slowllm.swarm.known_servers import KnownServers
from slowllm.swarm.patience import Patience
from slowllm.swarm.records import ServerRecord
from slowllm.swarm.routing import Wishes

A, B = "1" * 20, "2" * 20
NEVER, ALWAYS = 1e9, -1.0  # seconds after which the directory is read again


def record(peer: str, first: int = 0, end: int = 4) -> ServerRecord:
    return ServerRecord(
        peer=peer, first=first, end=end, state="online", dtype="float32", version="1", addresses=(), model="m-4",
        block_hashes=("a",) * (end - first), decode_seconds=0.01, forward_tokens_per_second=9.0, max_batch_tokens=99,
        cache_tokens_free=99, has_backward=True,
    )  # fmt: skip


class Directory:
    """A directory that answers when it is told to."""

    def __init__(self) -> None:
        self.looks: list[Future[list[ServerRecord]]] = []

    def look(self) -> Future[list[ServerRecord]]:
        self.looks.append(Future())
        return self.looks[-1]

    def known(self, refresh_seconds: float) -> KnownServers:
        """Return what has found the server `A`."""
        known = KnownServers(self.look, refresh_seconds)
        with pytest.raises(DirectoryError, match="the swarm's directory has not answered in time"):
            known.records(deadline=time.monotonic())
        self.looks[-1].set_result([record(A)])
        return known


def peers(known: KnownServers) -> list[str]:
    return [one.peer for one in known.records()]


def test_a_directory_that_hangs_holds_up_nobody_who_knows_servers() -> None:
    directory = Directory()
    known = directory.known(ALWAYS)
    assert [peers(known) for _ in range(3)] == [[A]] * 3
    assert len(directory.looks) == 2, "one look at a time"
    directory.looks[-1].set_result([record(B)])
    assert peers(known) == [B]
    assert known.get(A) is None
    assert known.get(B) == record(B)


def test_what_was_found_lately_is_not_looked_for_again() -> None:
    directory = Directory()
    known = directory.known(NEVER)
    assert [peers(known) for _ in range(3)] == [[A]] * 3
    assert len(directory.looks) == 1


def test_a_new_look_is_waited_for_until_the_deadline() -> None:
    directory = Directory()
    known = directory.known(NEVER)
    with pytest.raises(DirectoryError, match="the swarm's directory has not answered in time"):
        known.renew(deadline=time.monotonic() + 0.01)
    directory.looks[-1].set_result([record(B)])
    assert peers(known) == [B]


def test_a_directory_that_fails_is_said_once_while_servers_are_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = Directory()
    known = directory.known(ALWAYS)
    for _ in range(3):
        assert peers(known) == [A]
        directory.looks[-1].set_exception(DirectoryError("no peer of the swarm answers any more"))
    assert peers(known) == [A]
    (said,) = [one.getMessage() for one in caplog.records]
    assert said == "no peer of the swarm answers any more; the servers that were known before are asked"
    directory.looks[-1].set_result([record(B)])
    assert peers(known) == [B]
    directory.looks[-1].set_exception(DirectoryError("no peer of the swarm answers any more"))
    assert len(caplog.records) == 2


def test_the_error_of_a_look_reaches_who_waits_for_it() -> None:
    def fails() -> Future[list[ServerRecord]]:
        looked: Future[list[ServerRecord]] = Future()
        looked.set_exception(DirectoryError("no peer of the swarm answers any more"))
        return looked

    def is_closed() -> Future[list[ServerRecord]]:
        raise NetworkError("the network was closed")

    for look, said in ((fails, "no peer of the swarm answers"), (is_closed, "the network was closed")):
        known = KnownServers(look, NEVER)
        for _ in range(2):
            with pytest.raises(NetworkError, match=said):
                known.records()


def hops_of(directory: Directory) -> Hops:
    hops = Hops(directory.look, None, lambda work: None, 4, Wishes(), Patience(refresh_seconds=1e-9))  # type: ignore[arg-type]
    with pytest.raises(DirectoryError):
        hops.route(0, Need(1, 1), deadline=time.monotonic())
    directory.looks[-1].set_result([record(A)])
    return hops


def test_routes_are_taken_among_the_servers_that_are_known_while_the_directory_hangs() -> None:
    directory = Directory()
    hops = hops_of(directory)
    assert [hop.peer for hop in hops.route(0, Need(1, 1))] == [A]
    assert len(directory.looks) == 2
    assert not directory.looks[-1].done()


def test_a_route_that_is_not_known_is_waited_for_until_the_deadline_only() -> None:
    directory = Directory()
    hops = hops_of(directory)
    hops.ban(A, float("inf"))
    with pytest.raises(
        MissingBlocksError,
        match=r"nobody serves blocks 0:4 .*; the swarm's directory has not answered in time$",
    ):
        hops.route(0, Need(1, 1), deadline=time.monotonic() + 0.01)
    directory.looks[-1].set_result([record(A), record(B)])
    assert [hop.peer for hop in hops.route(0, Need(1, 1))] == [B]
