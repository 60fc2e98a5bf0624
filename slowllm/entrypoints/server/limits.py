"""What a client may take of the server before anything is computed: how it shows who it is, and how much it sends.

Bodies are read here, so that those of all clients together have a bound, and that a slow one ends.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request

from slowllm.errors import InputError
from slowllm.files import parse_object, read_secret
from slowllm.options import format_bytes

T = TypeVar("T")

# A key of fewer bytes could be guessed, and one of more is no key.
MIN_KEY_BYTES, MAX_KEY_BYTES = 16, 4096
# Bodies that are being read, at most so many times the largest one together.
BODIES_AT_ONCE = 4
# Of a body that is too large, so many times the limit is thrown away before the answer: many clients read nothing before
# they have sent it all.
DISCARDED = 32


@dataclass(frozen=True)
class ClientLimits:
    """How much one client may send.

    Attributes:
        body_bytes: of a request.
        body_seconds: in which it must have come.
        head_seconds: in which the head of a request must have come, from its first byte or the begin of the connection.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 60.0
    head_seconds: float = 20.0


class HTTPError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        kind: of the error, as OpenAI names it.
        param: field of the body that is wrong, if it is one.
        code: of the error, for programs.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None,
        kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})


def read_key(path: Path) -> bytes:
    """Return the key in a file, whose white space at both ends does not count.

    Raises:
        InputError: it cannot be read, others than its owner may read it, or it is too short, too long, or no ASCII.
    """
    make = f"make one with `head -c 32 /dev/urandom | base64 > {path.name}` and `chmod 600 {path.name}`"
    key = read_secret(path, MAX_KEY_BYTES, make).strip()
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise InputError(
            f"{path}: a key has {MIN_KEY_BYTES} to {MAX_KEY_BYTES:,} bytes, not {len(key):,}; {make}"
        )
    if any(not 33 <= byte <= 126 for byte in key):
        raise InputError(f"{path}: a key is one word of ASCII letters, which this is not; {make}")
    return key


def check_key(request: Request, key: bytes | None) -> None:
    """Refuse a request that does not bear the key, if there is one; takes as long for all wrong ones.

    Raises:
        HTTPError: 401.
    """
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key):
        raise HTTPError(
            401, "this server asks for its API key: send it as `Authorization: Bearer KEY`", "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


class BodyReader:
    """Reads the bodies of requests. Used on one event loop.

    Args:
        limits: of one request.
    """

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self._num_bytes = 0  # of all that are being read
        # One at a time: what Python makes of some MiB of JSON, and a tokenizer of a text, takes many times the memory.
        self._worker = ThreadPoolExecutor(1, "slowllm-bodies")

    def close(self) -> None:
        """Join the thread. Idempotent."""
        self._worker.shutdown()

    async def read(self, request: Request, make: Callable[[dict[str, Any]], T]) -> T:
        """Return what is made of the JSON object that a request sends.

        Args:
            request: whose body was not read yet.
            make: called on a thread that does nothing else; what it raises is raised here.
        Raises:
            HTTPError: the body is too large, comes too slowly, or is no such object.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page in a browser may send other kinds without asking, to the loopback, too.
            raise HTTPError(
                415,
                "the body must be JSON, with the header `Content-Type: application/json`",
                "unsupported_media_type",
            )
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                await self._receive(request, body)
            return await asyncio.get_running_loop().run_in_executor(self._worker, _made, bytes(body), make)
        except TimeoutError:
            raise HTTPError(
                408, f"the body has not come in {self._limits.body_seconds:g} s", "request_timeout",
                headers={"Connection": "close"},
            ) from None  # fmt: skip
        finally:
            self._num_bytes -= len(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        """Add to `body` what comes, and count it."""
        most, num_seen = self._limits.body_bytes, 0
        length = request.headers.get("content-length", "")
        is_large = length.isdecimal() and int(length[:20]) > most
        if is_large and "expect" in request.headers:
            raise self._too_large()
        async for part in request.stream():
            num_seen += len(part)
            if is_large or num_seen > most:
                is_large = True
                self._num_bytes -= len(body)
                body.clear()
                if num_seen > DISCARDED * most:
                    break
                continue
            if self._num_bytes + len(part) > BODIES_AT_ONCE * most:
                raise HTTPError(
                    503, "too many requests are being received; send it again later", "server_overloaded",
                    kind="server_error", headers={"Retry-After": "1", "Connection": "close"},
                )  # fmt: skip
            self._num_bytes += len(part)
            body += part
        if is_large:
            raise self._too_large()

    def _too_large(self) -> HTTPError:
        return HTTPError(
            413, f"the body is larger than {format_bytes(self._limits.body_bytes)}", "request_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip


def _made(body: bytes, make: Callable[[dict[str, Any]], T]) -> T:
    try:
        found = parse_object(body, "must be an object, not")
    except InputError as error:
        raise HTTPError(400, f"the body {error}", "invalid_json") from None
    return make(found)
