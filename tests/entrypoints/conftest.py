"""A model to talk with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import slowllm
from tests.support.paths import TINY_BLOOM

# The bare words of the conversation, so that a model that was never taught to chat goes on with them.
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template and an EOS that never comes."""
    folder = tmp_path_factory.mktemp("models") / "talkative"
    shutil.copytree(TINY_BLOOM, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The embedded model's tokenizer, which has no chat template."""
    return AutoTokenizer.from_pretrained(TINY_BLOOM)


@pytest.fixture(scope="module")
def lm(talkative: Path) -> Iterator[slowllm.StreamedLM]:
    """The model that goes on talking, every block streamed."""
    with slowllm.load(talkative, dtype="fp32", keep_resident=False) as opened:
        yield opened
