"""Who may open a stream to this peer: those whose ids are allowed, and who prove the swarm's token.

Who may not is told so in one sentence, before anything of its request is decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection
from dataclasses import dataclass

from slowllm.errors import RefusedError
from slowllm.swarm.messages import encode
from slowllm.swarm.shared_token import SharedToken, demand_proof, limited
from slowllm.swarm.streams import Stream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Admission:
    """The rule for streams of others.

    Attributes:
        own: id of this peer.
        token: that others must prove; None for none.
        allowed: ids of the only peers that are served; None for all.
        seconds: for the proof, and for a refused peer to read why.
    """

    own: str
    token: SharedToken | None = None
    allowed: Collection[str] | None = None
    seconds: float = 15.0

    async def admits(self, peer: str, stream: Stream) -> bool:
        """Whether a peer may use the stream that it has opened; where not, it was told why."""
        try:
            if self.allowed is not None and peer not in self.allowed:
                raise RefusedError(peer, "is not among the peers that this server was told to serve")
            if self.token is not None:
                await limited(demand_proof(stream, self.token, self.own, peer), peer, self.seconds)
        except RefusedError as refusal:
            log.info("%s", refusal)
            with contextlib.suppress(EOFError, OSError, TimeoutError):
                await self._tell(stream, refusal)
            return False
        except (EOFError, OSError):
            return False
        return True

    async def _tell(self, stream: Stream, refusal: RefusedError) -> None:
        async with asyncio.timeout(self.seconds):
            await stream.write(encode({"error": [type(refusal).__name__, refusal.problem]}))
            # Closing now, in either direction, could overtake the sentence: libp2p would refuse what the peer still writes,
            # and the peer would hear of that first. It closes when it has read it.
            await stream.discard()
