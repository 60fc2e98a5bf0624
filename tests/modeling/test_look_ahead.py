"""The next block's router is asked ahead of its turn: what it names is read ahead, as long as that is right often enough."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import slowllm
from slowllm.modeling import look_ahead
from slowllm.modeling.look_ahead import NEWEST, NUM_TRIALS, GuessRate
from slowllm.modeling.streamed_experts import StreamedExperts
from slowllm.planning.host_plan import make_plan
from tests.support.families import MIXTURES, resident, save_tiny

NUM_EXPERTS, TOP_K = 16, 3
IDS = torch.tensor([[7, 11, 13]])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """Return a mixture whose attention and experts add so much to the hidden states: next to nothing, or nearly all.

    Each block adds `scale` times as much as the block before it.
    """

    @functools.cache
    def make(scale: float) -> Path:
        folder = tmp_path_factory.mktemp("mixture")
        save_tiny("qwen3-moe", folder, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for number, block in enumerate(model.model.layers, 1):
                block.self_attn.o_proj.weight.mul_(scale**number)
                block.mlp.experts.down_proj.mul_(scale**number)
        model.save_pretrained(folder)
        return folder

    return make


@contextlib.contextmanager
def opened(folder: Path, num_kept: int = 0, **options: Any) -> Iterator[Any]:
    """Open a model of which all but experts stays in memory, as in a budget that has room for few of them."""

    def plan(*args: Any, **kwargs: Any) -> Any:
        return replace(make_plan(*args, **kwargs), kept_units=num_kept)

    # A place is poisoned as soon as its expert has been multiplied, so that each is read whenever it is wanted.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slowllm.runtime.load.make_plan", plan)
        lm = slowllm.load(folder, dtype="float32", granularity="experts", poison=True, **options)
    with lm, torch.no_grad():
        yield lm


class Record:
    """What is wanted and read, and what is guessed before and behind each module's turn."""

    def __init__(self, lm: Any, monkeypatch: pytest.MonkeyPatch, *, waits: bool = False) -> None:
        self.wanted: Counter[int] = Counter()
        self.read: Counter[int] = Counter()
        self.in_vain: Counter[int] = Counter()
        self._changed = threading.Condition()
        lm.experts.watch_reads(self._note)
        inner = StreamedExperts._serve
        ahead = lm.experts.look_ahead

        def serve(experts: Any, items: Any) -> Any:
            wanted = [
                experts._first + number for number in {n for item in items for n in item.routing.experts}
            ]
            self.wanted.update(wanted)
            if (guess := ahead._guesses.get(experts._first)) is not None and guess.is_read:
                self.in_vain.update(set(guess.units).difference(wanted))
            result = inner(experts, items)
            following = ahead._following.get(experts._first)
            if waits and (guess := ahead._guesses.get(following)) is not None and guess.is_read:
                # Nobody has asked for them yet; the next block's router has not run.
                self.wait_until_read(guess.units)
            return result

        monkeypatch.setattr(StreamedExperts, "_serve", serve)

    def _note(self, read: Any) -> None:
        with self._changed:
            self.read[read.stop] += 1
            self._changed.notify_all()

    def wait_until_read(self, units: Any) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: all(self.read[u] > self.wanted[u] for u in units), 60)


def generate(model: Any, ids: Tensor, count: int) -> Tensor:
    tokens: Tensor = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return tokens


def test_where_guesses_are_right_experts_are_read_before_their_router_names_them(
    mixture: Callable[[float], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="slowllm")
    plain: Any = resident(mixture(1e-4))
    with opened(mixture(1e-4)) as lm:
        record = Record(lm, monkeypatch, waits=True)
        assert torch.equal(generate(lm.model, IDS, 12), generate(plain, IDS, 12))
        ahead = lm.experts.look_ahead
        # A guess for each block but the first, for each token behind the prompt's first sweep, which copies the routers.
        assert ahead.num_guessed == ahead.num_right == 2 * TOP_K * 11
        assert ahead.num_read == ahead.num_read_right == 2 * TOP_K * (11 - NUM_TRIALS)
        assert lm.experts.dropped_bytes == 0
    assert "; 42 read ahead on a guess, 42 of them needed; 0 B read in vain" in caplog.text
    assert record.read == record.wanted
    assert not record.in_vain


def test_where_guesses_are_wrong_nothing_is_read_for_them(
    mixture: Callable[[float], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(mixture(1e3)) as lm:
        record = Record(lm, monkeypatch)
        for token in torch.randperm(300, generator=torch.Generator().manual_seed(0))[:31]:
            lm.model(token.view(1, 1))
        ahead = lm.experts.look_ahead
        assert ahead.num_guessed == 2 * TOP_K * 30
        assert ahead.num_right < look_ahead.LEAST_RATE * ahead.num_guessed
    assert record.read.total() <= 1.02 * record.wanted.total()
    assert all(record.read[unit] >= count for unit, count in record.wanted.items())


@pytest.mark.parametrize("name", sorted(MIXTURES))
@pytest.mark.parametrize("num_kept", [0, 6])
def test_bits_do_not_depend_on_guesses_and_each_expert_is_read_once_for_each_who_wants_or_guesses_it(
    name: str, num_kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(name, tmp_path)
    plain: Any = resident(tmp_path)
    monkeypatch.setattr(look_ahead, "LEAST_RATE", 0.0)  # wrong guesses are read as well
    monkeypatch.setattr(look_ahead, "NUM_TRIALS", 0)
    with opened(tmp_path, num_kept) as lm:
        record = Record(lm, monkeypatch)
        lm.experts.forecast.ahead_of = lambda first, chosen: []
        texts = [IDS, IDS[:, 1:]]
        # The routers are copied in the first sweep, and asked with both riders' rows in the later ones.
        found = lm.ride([lambda ids=ids: generate(lm.model, ids, 6) for ids in texts])
        for ids, ours in zip(texts, found, strict=True):
            assert torch.equal(ours, generate(plain, ids, 6))
        ahead = lm.experts.look_ahead
        assert ahead.num_read or num_kept
        assert ahead.num_read == ahead.num_guessed
        assert ahead.num_read - ahead.num_read_right == record.in_vain.total()
        assert lm.experts.dropped_bytes <= sum(
            count * sum(p.num_bytes + 2 * 4096 * len(p.runs) for p in lm.layout.units[unit])
            for unit, count in record.in_vain.items()
        )
    assert all(record.read[unit] <= record.wanted[unit] + record.in_vain[unit] for unit in record.read)


def test_nothing_is_guessed_for_many_rows_nor_on_the_way_down(mixture: Callable[[float], Path]) -> None:
    with opened(mixture(1e-4)) as lm:
        ahead = lm.experts.look_ahead
        for _ in range(3):
            lm.model(IDS.expand(2, -1))
        assert not ahead.num_guessed
        lm.model(IDS)
        assert (num_up := ahead.num_guessed)
        with torch.enable_grad():
            embedded = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
            loss = lm.model(inputs_embeds=embedded, labels=IDS).loss
            assert ahead.num_guessed == 2 * num_up
            loss.backward()
        assert ahead.num_guessed == 2 * num_up


def test_nothing_is_guessed_where_blocks_are_read_meanwhile(mixture: Callable[[float], Path]) -> None:
    with opened(mixture(1e-4), resident=False) as lm:
        assert lm.plan.ring_bytes
        assert lm.experts.look_ahead is None
        assert "none read ahead on a guess" in lm.experts.counted()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_guess_is_not_recorded_as_a_choice(mode: Any, mixture: Callable[[float], Path]) -> None:
    plain: Any = resident(mixture(1e-4))
    with opened(mixture(1e-4)) as lm, mode():
        for _ in range(2):
            ours = lm.model(IDS[:, :1], output_router_logits=True).router_logits
            theirs = plain(IDS[:, :1], output_router_logits=True).router_logits
            assert len(ours) == len(theirs)
            assert all(map(torch.equal, ours, theirs))
        assert lm.experts.look_ahead.num_guessed


def test_an_expert_that_there_is_not_is_not_guessed(
    mixture: Callable[[float], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = resident(mixture(1e-4))
    inner: Any = Qwen3MoeTopKRouter.forward

    def with_sentinel(router: Any, hidden: Tensor) -> Any:
        logits, weights, chosen = inner(router, hidden)
        return logits, weights, chosen.index_fill(-1, torch.tensor([1]), NUM_EXPERTS)

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", with_sentinel)
    with opened(mixture(1e-4)) as lm:
        for token in IDS.view(-1, 1, 1).expand(-1, 2, -1).reshape(-1, 1, 1):
            assert torch.equal(lm.model(token).logits, plain(token).logits)
        ahead = lm.experts.look_ahead
        assert ahead.num_guessed == ahead.num_right > 0


@given(shares=st.lists(st.floats(0, 1), max_size=300))
def test_guesses_that_are_read_are_bounded_by_those_that_are_right(shares: list[float]) -> None:
    rate, num_read = GuessRate(), 0
    for share in shares:
        num_read += rate.is_trusted
        rate.note(share)
    # The average loses at least so much with each read in vain, and gains no more than what is right.
    assert num_read <= 2 * sum(shares) + 2 / NEWEST


@given(shares=st.lists(st.floats(0, 1), max_size=100))
def test_guesses_are_trusted_again_when_they_are_right_again(shares: list[float]) -> None:
    rate = GuessRate()
    for share in shares:
        rate.note(share)
    for _ in range(NUM_TRIALS + 12):
        rate.note(1.0)
    assert rate.is_trusted
    for _ in range(16):
        rate.note(0.0)
    assert not rate.is_trusted
