"""What libp2p's process says in its log that is no fault: that connections are closed when a peer leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# hivemind reads what the process prints, and logs it under this name.
_LOGGER = "hivemind.p2p.p2p_daemon"
_CLOSED = "use of closed network connection"


@contextmanager
def without_faults_of_leaving() -> Iterator[None]:
    """Leave out, for the block, that libp2p's process met a connection that was closed, as it does whenever it ends."""

    def is_kept(record: logging.LogRecord) -> bool:
        return _CLOSED not in record.getMessage()

    logger = logging.getLogger(_LOGGER)
    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)
