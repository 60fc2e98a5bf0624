"""A server says whether it reaches another one, only of servers that the directory names, and only so often."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from slowllm.errors import BusyError, InputError, PeerLostError
from slowllm.swarm.reach import DialBack

HERE, GONE = "Q" * 20, "R" * 20


class Request:
    """A request as far as `DialBack` knows it."""

    def __init__(self, peer: str, asked: object) -> None:
        self.peer, self.meta = peer, {"op": "reach", "peer": asked}
        self.answer: Future[dict[str, Any]] = Future()

    def respond(self, meta: dict[str, Any]) -> None:
        self.answer.set_result(meta)

    def fail(self, error: BaseException) -> None:
        self.answer.set_exception(error)


def ask(peer: str, meta: Any, *, timeout: float | None = None) -> Future[Any]:
    future: Future[Any] = Future()
    if peer == HERE:
        future.set_result(({}, {}))
    else:
        future.set_exception(PeerLostError(peer, "cannot be reached"))
    return future


@pytest.fixture
def reach() -> Any:
    now = SimpleNamespace(seconds=0.0)
    records: Any = [SimpleNamespace(peer=HERE), SimpleNamespace(peer=GONE)]
    with DialBack(lambda: records, ask, lambda: now.seconds) as made:
        made.now = now  # type: ignore[attr-defined]
        yield made


def look(reach: Any, asker: str, asked: object) -> dict[str, Any]:
    request = Request(asker, asked)
    reach.handle(request)
    return request.answer.result(60)


def test_it_says_whom_it_reaches_and_why_not(reach: Any) -> None:
    assert look(reach, "a", HERE) == {"reached": True, "seconds": 0.0, "why": ""}
    answer = look(reach, "a", GONE)
    assert (answer["reached"], answer["why"]) == (False, f"peer {GONE}: cannot be reached")


@pytest.mark.parametrize("asked", ["S" * 20, None, 7, "/ip4/192.0.2.1/tcp/80"])
def test_nobody_is_dialled_whom_the_directory_does_not_name(reach: Any, asked: object) -> None:
    with pytest.raises(InputError, match="is no server of this model that the directory names"):
        look(reach, "a", asked)


def test_one_who_asks_too_often_is_refused_and_later_not(reach: Any) -> None:
    for _ in range(8):
        look(reach, "a", HERE)
    with pytest.raises(BusyError, match="asked to reach others 8 times by this peer and 8 times in all"):
        look(reach, "a", HERE)
    look(reach, "b", HERE)
    reach.now.seconds = 10.0
    look(reach, "a", HERE)


def test_many_who_ask_are_refused_together(reach: Any) -> None:
    for number in range(32):
        look(reach, f"asker {number}", HERE)
    with pytest.raises(BusyError, match="0 times by this peer and 32 times in all"):
        look(reach, "another", HERE)
