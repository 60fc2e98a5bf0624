"""Tokenizers of GGUF files are those that transformers makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import slowllm
from slowllm.errors import CheckpointError
from slowllm.modeling.native.gguf_tokenizer import gguf_tokenizer
from slowllm.runtime.description import ModelInfo
from slowllm.runtime.run_identity import _tokenizer_digest
from tests.support.gguf_checkpoints import byte_level_tokenizer, sentencepiece_tokenizer, write_gguf
from tests.support.paths import TINY_BLOOM

TEXTS = ["the cat", " the  cats\nare on 1234 mats", "Grüße <s>the</s>", ""]


@pytest.mark.parametrize(
    ("family", "metadata"),
    [
        ("llama", byte_level_tokenizer()),
        ("llama", sentencepiece_tokenizer()),
        ("qwen2", byte_level_tokenizer()),
        ("gemma3", sentencepiece_tokenizer()),
        ("bloom", byte_level_tokenizer()),
    ],
)
def test_a_tokenizer_is_that_of_transformers(family: str, metadata: dict[str, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", family, "q8_0", metadata=metadata)
    wanted = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for given in (path, tmp_path):
        ours = ModelInfo(given).tokenizer
        assert type(ours) is type(wanted)
        assert [ours(text)["input_ids"] for text in TEXTS] == [wanted(text)["input_ids"] for text in TEXTS]
        assert (ours.bos_token_id, ours.eos_token_id) == (wanted.bos_token_id, wanted.eos_token_id)
        assert ours.chat_template == wanted.chat_template


def test_a_file_without_a_tokenizer_is_refused_where_text_is_encoded(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", "q8_0")
    with (
        slowllm.load(path) as lm,
        pytest.raises(
            CheckpointError, match=r"m\.gguf: has no tokenizer \(tokenizer\.ggml\.tokens\), so no text can be"
        ),
    ):
        lm.score(["a text"])


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.model": "rwkv"},
        {"tokenizer.ggml.merges": ["abc"]},
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(change: dict[str, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen2", "q8_0", metadata={**byte_level_tokenizer(), **change})
    with pytest.raises(CheckpointError, match=r"m\.gguf: its tokenizer cannot be made \("):
        _ = ModelInfo(path).tokenizer


def test_a_tokenizer_beside_the_file_is_preferred(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "qwen2", "q8_0")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_BLOOM / name, tmp_path)
    assert len(ModelInfo(tmp_path).tokenizer) == len(AutoTokenizer.from_pretrained(TINY_BLOOM))


def test_another_vocabulary_is_another_tokenizer_for_a_resumed_job(tmp_path: Path) -> None:
    one = write_gguf(tmp_path / "one.gguf", "qwen2", "q8_0", metadata=byte_level_tokenizer())
    other = write_gguf(tmp_path / "other.gguf", "qwen2", "q8_0", metadata=sentencepiece_tokenizer())
    assert _tokenizer_digest(one) == _tokenizer_digest(one) != _tokenizer_digest(other)


TOKENIZER = byte_level_tokenizer()
KEY = r"m\.gguf: tokenizer\.ggml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [7, 8]}, rf"{KEY}\.tokens is no list of strings"),
        ({"merges": None}, r"m\.gguf: has neither tokenizer\.ggml\.merges nor tokenizer\.ggml\.scores"),
        ({"token_type": [1, 1]}, rf"{KEY}\.token_type has 2 entries, but there are 272 tokens"),
        ({"token_type": 1}, rf"{KEY}\.token_type is no list, but there are 272 tokens"),
        ({"scores": [0.5] * 273}, rf"{KEY}\.scores has 273 entries, but there are 272 tokens"),
        ({"bos_token_id": 272}, rf"{KEY}\.bos_token_id is 272, which is none of its 272 tokens"),
        ({"eos_token_id": True}, rf"{KEY}\.eos_token_id is True, which is none of its 272 tokens"),
    ],
    ids=str,
)
def test_a_vocabulary_that_does_not_go_together_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    metadata = {**TOKENIZER, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    path = write_gguf(tmp_path / "m.gguf", kinds="q8_0", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer([path])
