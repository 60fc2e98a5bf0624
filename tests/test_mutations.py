"""Damaged descriptions: each gives a result or one sentence, in seconds and without gigabytes."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.entrypoints.openai_requests import read_requests
from slowllm.errors import SlowLLMError
from slowllm.files import read_lines
from slowllm.inference.bounded_calls import BoundedCalls
from slowllm.inference.text import encode_text
from slowllm.modeling.soft_prompt_files import save_prompt
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.runtime.description import ModelInfo
from slowllm.storage.manifest import MANIFEST
from slowllm.tuning.examples import make_task, read_rows
from tests.support.families import save_tiny, speaking
from tests.support.mutations import mutated
from tests.support.paths import TINY_BLOOM
from tests.support.stores import make_store

NUM_LONG, NUM_SHORT = 2000, 12
# Of which the tokenizer makes tokens that the tiny vocabularies have.
TEXT = "QZ7K"
FAMILIES = ("bloom", "llama-3-scaled-rope", "mixtral", "deepseek-v3", "gemma-2-soft-cap", "falcon-new-decoder", "gpt-oss", "mamba")  # fmt: skip


def speaks(folder: Path, **options: Any) -> None:
    with slowllm.load(folder, keep_resident=False, ram="8GiB", **options) as lm:
        lm.score([TEXT])
        lm.generate([TEXT], max_new_tokens=2)


def encodes(folder: Path) -> None:
    tokenizer = ModelInfo(folder).tokenizer
    encode_text(tokenizer, TEXT)
    with slowllm.load(folder, keep_resident=False, ram="8GiB") as lm:
        lm.choose(TEXT, ["Q", "Z"])
        lm.generate([TEXT], max_new_tokens=2, stop=("\n",))


def reads_batch(folder: Path) -> None:
    read_requests(ModelInfo(TINY_BLOOM), read_lines(folder / "batch.jsonl"))


def reads_tuning_data(folder: Path) -> None:
    make_task(ModelInfo(TINY_BLOOM), "data", read_rows(folder / "data.jsonl"))


def takes_prompt(folder: Path) -> None:
    speaks(folder.parent / "model", prompt=folder)


BATCH = [
    {"custom_id": "a", "method": "POST", "url": "/v1/completions",
     "body": {"model": "m", "prompt": "The cat", "max_tokens": 3, "temperature": 0, "stop": ["\n"], "logprobs": 2}},
    {"custom_id": "b", "method": "POST", "url": "/v1/completions",
     "body": {"model": "m", "prompt": [[5, 6], [7]], "n": 2, "seed": 1, "top_p": 0.9, "temperature": 1.0}},
    {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions",
     "body": {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 3}},
]  # fmt: skip
ROWS = [
    {"prompt": "Who sat? Say", "answer": " me."},
    {"text": "The cat sat."},
    {"prompt": "The dog", "answer": " ran."},
]


def lines(rows: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def make_family(out: Path, seed: int) -> Path:
    folder = out / FAMILIES[seed % len(FAMILIES)]
    if not folder.exists():
        save_tiny(folder.name, out / f"{folder.name}-mute", torch.float32)
        speaking(out / f"{folder.name}-mute", folder)
    return folder


def make_prompt(model: Path, folder: Path, is_prefix: bool) -> None:
    config = ModelInfo(model).config
    width, heads = config.hidden_size, config.num_attention_heads
    pairs = (torch.zeros(2, heads, 4, width // heads),) * config.num_hidden_layers
    shallow = SoftPrompt("shallow", embeddings=torch.zeros(4, width))
    save_prompt(SoftPrompt("prefix", pairs=pairs) if is_prefix else shallow, folder, "m", {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Return a folder that has a whole file of a name."""
    out = tmp_path_factory.mktemp("whole")

    def get(name: str, seed: int) -> Path:
        if name in ("config.json", "generation_config.json"):
            return make_family(out, seed)
        if name.startswith(("token", "model.")):
            return make_family(out, 0)
        folder = out / f"{name}-{seed % 2}"
        if folder.exists():
            return folder
        folder.mkdir()
        if name == "batch.jsonl":
            (folder / name).write_bytes(lines(BATCH))
        elif name == "data.jsonl":
            (folder / name).write_bytes(lines(ROWS))
        elif name == MANIFEST:
            make_store(make_family(out, 0), folder, "int8" if seed % 2 else "bf16")
        else:
            make_prompt(make_family(out, 0), folder, is_prefix=bool(seed % 2))
        return folder

    return get


CHECKS: dict[str, Callable[[Path], None]] = {
    "config.json": speaks,
    "generation_config.json": speaks,
    "tokenizer.json": encodes,
    "tokenizer_config.json": encodes,
    "model.safetensors.index.json": speaks,
    MANIFEST: speaks,
    "adapter_config.json": takes_prompt,
    "batch.jsonl": reads_batch,
    "data.jsonl": reads_tuning_data,
}


def check(name: str, count: int, base: Callable[[str, int], Path], tmp_path: Path) -> None:
    """Damage a file many times; whatever is no result and no SlowLLMError is gathered."""

    def outcome(seed: int) -> str:
        torch.set_num_threads(1)
        whole, damaged = base(name, seed), tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        damaged.mkdir()
        for file in whole.iterdir():
            if file.name != name:
                os.symlink(file, damaged / file.name)
        if not (link := tmp_path / "model").exists():
            os.symlink(base("config.json", 0), link)
        (damaged / name).write_bytes(mutated((whole / name).read_bytes(), seed))
        try:
            CHECKS[name](damaged)
        except SlowLLMError as error:
            if "\n" not in str(error):
                return "refused"
            raise AssertionError(f"two lines: {error}") from error
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[:-9:-1]
            where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
            raise AssertionError(f"{type(error).__name__}: {str(error)[:80]!r} at {where}") from error
        return "right"

    for seed in range(len(FAMILIES)):
        base(name, seed)  # here, not in a child
    bounded = BoundedCalls(outcome, max_seconds=60, max_bytes=1 << 30)
    found: Counter[str] = Counter()
    wrong: dict[int, str] = {}
    for seed in range(count):
        try:
            found[bounded(seed)] += 1
        except Exception as error:
            wrong[seed] = str(error)
    bounded.close()
    assert not wrong, "\n".join(f"{seed}: {what}" for seed, what in wrong.items())
    assert found["right"] + found["refused"] == count
    assert found["right"]
    assert found["refused"] or count < NUM_LONG


@pytest.mark.parametrize("name", CHECKS)
def test_damaged_descriptions(name: str, base: Callable[[str, int], Path], tmp_path: Path) -> None:
    check(name, NUM_SHORT, base, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", CHECKS)
def test_thousands_of_damaged_descriptions(
    name: str, base: Callable[[str, int], Path], tmp_path: Path
) -> None:
    check(name, NUM_LONG, base, tmp_path)
