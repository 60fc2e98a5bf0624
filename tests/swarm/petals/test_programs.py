"""Programs written for Petals run against real servers after their import is changed, with plain transformers' results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slowllm.errors import InputError, MissingBlocksError
from slowllm.swarm.petals import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedSpeculativeModel,
    DistributedLlamaForCausalLM,
    RemoteSequential,
)
from tests.support.families import resident
from tests.support.paths import ROOT
from tests.support.petals import embedded, greedy, ids
from tests.support.served import Served
from tests.support.swarm_processes import SwarmProcesses

EXAMPLES = ROOT / "examples" / "petals"


def opened(kind: Any, served: Served, **arguments: Any) -> Any:
    return kind.from_pretrained(served.ends, initial_peers=[served.address], ram="3GiB", **arguments)


@pytest.mark.long
def test_a_model_from_the_swarm_is_transformers_own(served: Served) -> None:
    plain: Any = resident(served.whole)
    model = opened(AutoDistributedModelForCausalLM, served, torch_dtype="auto", max_retries=3)
    try:
        assert isinstance(model, DistributedLlamaForCausalLM)
        assert isinstance(model, type(plain))
        assert (model.config.max_retries, model.config.initial_peers) == (3, [served.address])
        with torch.no_grad():
            assert torch.equal(model(ids()).logits, plain(ids()).logits)
    finally:
        model.close()
    model.close()


@pytest.mark.long
def test_sessions_are_kept_and_rolled_back_at_servers(served: Served) -> None:
    plain: Any = resident(served.whole)
    model = opened(AutoDistributedModelForCausalLM, served)
    try:
        with torch.no_grad():
            hidden = embedded(model, ids())
            part = model.transformer.h[1:4]
            with part.inference_session(max_length=9) as session:
                steps = [session.step(hidden[:, :4]), session.step(hidden[:, 4:])]
            torch.testing.assert_close(torch.cat(steps, 1), part(hidden), atol=1e-5, rtol=1e-5)
        with model.inference_session(max_length=20) as session:
            first = model.generate(ids(), **greedy(3))
            session.position = 8
            again = model.generate(None, **greedy(2))
        expected = plain.generate(ids(), **greedy(3))
        assert torch.equal(first, expected)
        assert torch.equal(again, expected[:, 8:])
    finally:
        model.close()


@pytest.mark.long
def test_base_models_blocks_and_drafts_come_from_the_swarm_as_well(served: Served) -> None:
    plain: Any = resident(served.whole)
    base = opened(AutoDistributedModel, served)
    with torch.no_grad():
        expected = plain.model(ids()).last_hidden_state
        assert torch.equal(base(ids()).last_hidden_state, expected)
    base.close()
    config = AutoDistributedConfig.from_pretrained(served.ends, initial_peers=[served.address])
    blocks = RemoteSequential(config, start_block=2, end_block=5)
    assert (len(blocks), blocks.blocks) == (3, range(2, 5))
    hidden = torch.randn(1, 3, config.hidden_size, requires_grad=True)
    blocks(hidden).sum().backward()
    assert hidden.grad is not None
    with pytest.raises(InputError, match="start_block=5 and end_block=2 name none of 6 blocks"):
        RemoteSequential(config, start_block=5, end_block=2)
    model = opened(AutoDistributedSpeculativeModel, served, small_model=plain)
    one = ids(1)
    assert torch.equal(model.generate(one, **greedy(8)), plain.generate(one, **greedy(8)))
    with model.inference_session(max_length=30):
        parts = [model.generate(one, **greedy(4)), model.generate(None, **greedy(4))]
        assert torch.equal(torch.cat(parts, 1), plain.generate(one, **greedy(8)))
    model.close()


@pytest.mark.long
def test_servers_that_are_not_allowed_are_not_asked(served: Served) -> None:
    with pytest.raises(MissingBlocksError, match="nobody who may be asked"):
        opened(
            AutoDistributedModelForCausalLM,
            served,
            allowed_servers=["QmbFTxrLH22v1EbhBqqeZSgDdQFCUVdXjQnrCvvGUVTJqn"],
        )


@pytest.mark.long
def test_the_readmes_program_prints_what_plain_transformers_would(
    served: Served, swarm: SwarmProcesses
) -> None:
    ended = swarm.run("-c", (EXAMPLES / "generate.py").read_text(), served.ends, served.address)
    assert ended.returncode == 0, ended.stderr
    plain: Any = AutoModelForCausalLM.from_pretrained(served.whole, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(served.whole)

    def tokens(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt")["input_ids"]

    lines = ended.stdout.splitlines()
    assert lines[0] == tokenizer.decode(plain.generate(tokens("A cat sat"), max_new_tokens=5)[0])
    four = plain.generate(tokens("The value is"), max_new_tokens=4)
    new = four[0, tokens("The value is").shape[1] :]
    assert lines[1] == "".join(tokenizer.decode([token]) for token in new)
    both = torch.cat([four, tokens(" and then")], 1)
    assert lines[2] == tokenizer.decode(plain.generate(both, max_new_tokens=3)[0, four.shape[1] :])
    by_hand = plain.generate(tokens("A cat"), max_new_tokens=4, min_new_tokens=4)
    assert lines[3] == tokenizer.decode(by_hand[0, tokens("A cat").shape[1] :])


@pytest.mark.long
@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_the_prompt_tuning_program_learns(mode: str, served: Served, swarm: SwarmProcesses) -> None:
    ended = swarm.run("-c", (EXAMPLES / "prompt_tuning.py").read_text(), served.ends, served.address, mode)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    losses, (said, names), scores = lines[:6], lines[6:8], lines[8:]
    assert float(losses[-1]) < float(losses[0])
    assert said
    kinds = ["prompt_embeddings", "intermediate_prompt_embeddings"][: 1 + (mode == "deep_ptune")]
    assert names.split() == [*(f"model.{kind}.weight" for kind in kinds), "score.weight"]
    first, last = (sum(map(float, scores[epoch : epoch + 2])) for epoch in (0, 18))
    assert len(scores) == 20
    assert last < first
