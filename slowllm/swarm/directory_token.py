"""How the directory's requests prove the swarm's token: hivemind's seam for it, an authorizer, with a shared secret.

hivemind signs what is asked and answered, but does not say to whom: a proof holds for one request, for a minute, and once at
each peer. So a member that asks a stranger shows it one request that the stranger could repeat at another member, and see
records of servers by it; computing needs the proof of `slowllm.swarm.shared_token`, which is bound to both peers.

Knows the fields of hivemind's messages; imports nothing of hivemind. Used on the network's loop.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from slowllm.swarm.shared_token import SharedToken

PROOF_SECONDS = 60.0
_NONCE_BYTES = 16


class DirectoryToken:
    """An authorizer of hivemind's DHT.

    Args:
        token: of the swarm.
        clock: Unix time in seconds.
    """

    def __init__(self, token: SharedToken, clock: Callable[[], float] = time.time) -> None:
        self._token, self._clock = token, clock
        self._seen: dict[bytes, float] = {}

    async def sign_request(self, request: Any, service_public_key: object) -> None:
        """Put a proof into a request."""
        request.auth.time, request.auth.nonce = self._clock(), secrets.token_bytes(_NONCE_BYTES)
        request.auth.signature = self._token.proof("ask", request.SerializeToString(deterministic=True))

    async def validate_request(self, request: Any) -> bool:
        """Whether a request has a proof that was not seen before. Takes it out of the request."""
        auth, now = request.auth, self._clock()
        proof, auth.signature = auth.signature, b""
        if not self._token.is_proof(proof, "ask", request.SerializeToString(deterministic=True)):
            return False
        nonce = bytes(auth.nonce)
        if abs(auth.time - now) > PROOF_SECONDS or nonce in self._seen:
            return False
        # Only those who know the token add to it, and what is too old to be taken again is forgotten.
        self._seen = {old: at for old, at in self._seen.items() if at > now - 2 * PROOF_SECONDS}
        self._seen[nonce] = now
        return True

    async def sign_response(self, response: Any, request: Any) -> None:
        """Put a proof into the answer to a request."""
        response.auth.nonce = request.auth.nonce
        response.auth.signature = self._token.proof("say", response.SerializeToString(deterministic=True))

    async def validate_response(self, response: Any, request: Any) -> bool:
        """Whether an answer has the proof that it is one to this request."""
        if response is None:
            return False
        auth = response.auth
        proof, auth.signature = auth.signature, b""
        return auth.nonce == request.auth.nonce and self._token.is_proof(
            proof, "say", response.SerializeToString(deterministic=True)
        )
