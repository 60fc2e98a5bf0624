"""A server in the tests' own process: the application, a service, and the embedded model with a chat template."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.entrypoints.server.answering import Answering, Served
from slowllm.entrypoints.server.app import make_app
from slowllm.inference.service import Service
from slowllm.inference.service_types import service_job
from slowllm.runtime.description import ModelInfo

Serve = Callable[..., AbstractContextManager[TestClient]]


@pytest.fixture(scope="module")
def lm(talkative: Path) -> Iterator[slowllm.StreamedLM]:
    """The model that goes on talking, opened as the server opens it."""
    job = service_job(ModelInfo(talkative), 2048, 512, 32)
    with slowllm.load(talkative, dtype="fp32", job=job) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(talkative: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(talkative, dtype=torch.float32)


@pytest.fixture(scope="module")
def serve(lm: slowllm.StreamedLM) -> Serve:
    """Return a client of a server with options of its own, for the length of a context."""

    @contextlib.contextmanager
    def serving(max_waiting: int = 256, **options: Any) -> Iterator[TestClient]:
        with Service(lm, max_waiting=max_waiting) as service:
            answering = Answering(Served(lm, service, "fp_test", **options))
            with TestClient(make_app(answering), raise_server_exceptions=False) as client:
                client.answering = answering  # type: ignore[attr-defined]
                yield client

    return serving


@pytest.fixture(scope="module")
def client(serve: Serve) -> Iterator[TestClient]:
    with serve() as made:
        yield made
