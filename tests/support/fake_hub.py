"""A small hub on the loopback: the listing, redirects to another host for LFS files, ranges, and faults on purpose."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """The files of a repository, and what is wrong with it.

    Attributes:
        files: content by name; what ends in .safetensors, .bin or .gguf is stored with LFS.
        refusal: status and X-Error-Code for every request, or for files only.
        listing: entries of the listing that are not as they should be, by name.
        served: content that is not what is listed, by name; each is served once.
        cuts: after how many bytes of a file the connection breaks; each does once, in order.
        stalls: after how many bytes of a file nothing more comes, until the client goes away.
    """

    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None
    only_files_refused: bool = False
    listing: dict[str, dict[str, Any]] = field(default_factory=dict)
    served: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    stalls: list[int] = field(default_factory=list)
    commit: str = COMMIT


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    first_byte: int
    token: str | None


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


def etag(name: str, content: bytes) -> str:
    if is_lfs(name):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(name: str, content: bytes) -> dict[str, Any]:
    listed: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
    if is_lfs(name):
        listed["lfs"] = {"sha256": etag(name, content), "size": len(content), "pointerSize": 134}
    else:
        listed["blobId"] = etag(name, content)
    return listed


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.stalled = threading.Semaphore(0)  # released each time that an answer stalls
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        pass  # clients that go away

    def fetched(self, repo: str) -> list[tuple[str, int]]:
        """The files that were asked for and from which byte, in order; a redirect and its end count once."""
        prefix = f"/{repo}/resolve/{self.repos[repo].commit}/"
        return [
            (request.path.removeprefix(prefix), request.first_byte)
            for request in self.requests
            if request.method == "GET" and request.path.startswith(prefix)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        assert wanted is not None
        start, host = int(wanted[1]), self.headers["Host"].partition(":")[0]
        self.server.requests.append(
            Request(self.command, host, path, start, self.headers.get("Authorization"))
        )
        found = re.fullmatch(r"/(api/models|cdn)?/?(\w+/[\w-]+)/(?:revision|resolve)/([^/]+)/?(.*)", path)
        repo = self.server.repos.get(found[2]) if found else None
        if found is None or repo is None:
            # As the hub has it: without a token, a repository that is missing may as well be private.
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        kind, name = found[1], found[4]
        if repo.refusal is not None and not (repo.only_files_refused and kind == "api/models"):
            return self._send(repo.refusal[0], b"{}", {"X-Error-Code": repo.refusal[1]})
        if kind == "api/models":
            return self._list(repo, found[3])
        if name not in repo.files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        content = repo.files[name]
        headers = {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if is_lfs(name) and kind is None:
            headers |= {"X-Linked-Etag": headers.pop("ETag"), "X-Linked-Size": str(len(content))}
            headers["Location"] = f"http://localhost:{self.server.server_port}/cdn{path}"
            return self._send(302, b"", headers)
        if self.command == "GET":
            content = repo.served.pop(name, content)
        if start and start >= len(content):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        until = len(content)
        if is_lfs(name) and self.command == "GET":
            until = (repo.cuts or repo.stalls or [until])[0]
        self._send(206 if start else 200, content[start:], headers, until - start)
        if until < len(content):
            if repo.cuts:
                repo.cuts.pop(0)
            else:
                repo.stalls.pop(0)
                self.server.stalled.release()
                self.rfile.read(1)  # returns when the client is gone
            self.close_connection = True
        return None

    def _list(self, repo: Repo, revision: str) -> None:
        if revision not in ("main", repo.commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [entry(name, content) | repo.listing.get(name, {}) for name, content in repo.files.items()]
        listing = {"id": "x/y", "sha": repo.commit, "siblings": siblings}
        return self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], until: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:until])
