"""A server's status comes back as it was sent, or is refused."""

from __future__ import annotations

from typing import Any

import pytest

from slowllm.errors import ProtocolError
from slowllm.swarm.status import ServerStatus

STATUS = ServerStatus(1, 2, 3, 4, 5, 6)


def test_a_status_comes_back() -> None:
    assert ServerStatus.from_meta(STATUS.to_meta()) == STATUS


@pytest.mark.parametrize("wrong", [None, -1, 1.5, True, "7"])
def test_a_status_without_a_count_is_refused(wrong: Any) -> None:
    with pytest.raises(ProtocolError, match="has no count num_sessions, but"):
        ServerStatus.from_meta({**STATUS.to_meta(), "num_sessions": wrong})
