"""Bits at real widths: tiles and threads are chosen by size, and could change them.

One block of BLOOM-7B's shape and a head in several chunks, against the resident model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import BloomConfig, BloomForCausalLM

import slowllm
from slowllm import malloc
from slowllm.modeling.layout import cut_head
from slowllm.storage.spans import Placement, Run, Span
from tests.support.cases import crossed
from tests.support.families import resident

# The quick run takes a block of BLOOM-1B7's width, which is a quarter as large.
WIDTH, QUICK_WIDTH, VOCAB = 4096, 2048, 25_088


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    """As many threads as there are cores, however many processes share the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)
    malloc.give_back()  # gigabytes, which glibc keeps once a model was loaded, and others run beside this process


@pytest.fixture(scope="module", params=[QUICK_WIDTH, pytest.param(WIDTH, marks=pytest.mark.long)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block of BLOOM-7B's, 201 million weights and a tied head of 103 million, 0.6 GB in bfloat16; or a smaller one."""
    folder = tmp_path_factory.mktemp("bloom-block")
    config = BloomConfig(hidden_size=request.param, n_layer=1, n_head=request.param // 128, vocab_size=VOCAB)
    with torch.device("meta"):
        model = BloomForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.01)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.02)
    model.save_pretrained(folder, max_shard_size="200MB")
    return folder


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.long), torch.float32], ids=str
)
def test_a_block_of_real_width_gives_the_resident_models_bits(folder: Path, dtype: torch.dtype) -> None:
    plain = resident(folder, dtype)
    ids = [
        torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(1))
        for shape in [(1, 13), (4, 50)]
    ]
    with slowllm.load(folder, dtype=str(dtype), keep_resident=False) as lm, torch.no_grad():
        for streamed, i in zip(lm.ride([lambda i=i: lm.model(i).logits for i in ids]), ids, strict=True):
            assert torch.equal(streamed, plain(i).logits)


@pytest.mark.parametrize(
    ("num_rows", "dtype"),
    crossed(
        [1, 7, 37, 300], [torch.bfloat16, torch.float32],
        quick=[(7, torch.float32), (37, torch.bfloat16)],
    ),
)  # fmt: skip
def test_a_head_in_chunks_gives_the_bits_of_the_whole(dtype: torch.dtype, num_rows: int) -> None:
    span = Span("lm_head.weight", Path("x"), "BF16", (VOCAB, WIDTH), 0, VOCAB * WIDTH * 2)
    whole = Placement("lm_head.weight", span.shape, torch.bfloat16, (Run(span, 0, 0, span.num_bytes),))
    chunks = cut_head(whole, 1)
    assert len(chunks) == 4
    assert sum(chunk.shape[0] for chunk in chunks) == VOCAB
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCAB, WIDTH, generator=generator) * 0.02).to(dtype)
    parts = [F.linear(hidden, part) for part in weight.split([chunk.shape[0] for chunk in chunks])]
    assert torch.equal(torch.cat(parts, -1), F.linear(hidden, weight))
