"""Riders that wait at one stop share what was decoded there, to the same bits and within the budget."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.planning.plan import Plan
from slowllm.storage.codecs.fp8 import Fp8
from slowllm.storage.codecs.stacked import Stacked
from slowllm.streaming.cast_stops import CastStops
from tests.support.families import save_tiny
from tests.support.native_checkpoints import fp8_settings, quantised, store_fp8

IDS = [torch.arange(3, 3 + length)[None] for length in (20, 7, 13)]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int, int]]:
    """Count how often rows of each coded matrix, known by its address, are decoded."""
    found: Counter[tuple[int, int, int]] = Counter()
    for kind in (Fp8, Stacked):

        def noting(  # type: ignore[no-untyped-def]
            self, parts, out, first, last, team, decode=kind.decode, is_alone=kind is Fp8
        ) -> None:
            if is_alone:
                found[parts.arrays["codes"].data_ptr(), first, last] += 1
            decode(self, parts, out, first, last, team)

        monkeypatch.setattr(kind, "decode", noting)
    return found


def fp8(name: str, tmp_path: Path) -> Path:
    save_tiny(name, tmp_path / "plain", torch.bfloat16)
    return quantised(tmp_path / "plain", tmp_path / "fp8", fp8_settings((8, 16)), store_fp8((8, 16)))


def losses_of(lm: slowllm.StreamedLM, together: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return loss and gradient of each text."""

    def step(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = lm.model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = lm.model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        assert embedded.grad is not None
        return loss.detach(), embedded.grad

    jobs = [lambda ids=ids: step(ids) for ids in IDS]
    return lm.ride(jobs) if together else [lm.ride([job])[0] for job in jobs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", ["llama-2", "mixtral"])
def test_three_riders_decode_each_matrix_once(
    name: str, resident: bool, dtype: str, tmp_path: Path, decoded: Counter[Any]
) -> None:
    folder = fp8(name, tmp_path)
    with slowllm.load(folder, dtype=dtype, resident=resident) as lm, torch.no_grad():
        assert lm.plan.decoded_bytes
        assert lm.plan.peak_bytes <= lm.budget_bytes
        stops = lm._carousel._stops
        assert isinstance(stops, CastStops)
        assert stops._kept is not None
        assert len(stops._kept) == lm.plan.decoded_bytes
        decoded.clear()  # loops are loaded by decoding an example
        alone = [lm.ride([lambda ids=ids: lm.model(ids).logits])[0] for ids in IDS]
        matrices = [p for stop in lm.layout.stops for p in stop if p.coding is not None and len(p.shape) == 2]
        num_alone = sum(decoded.values())
        decoded.clear()
        together = lm.ride([lambda ids=ids: lm.model(ids).logits for ids in IDS])
        assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
        assert matrices
        if name == "llama-2":  # no experts, which each rider decodes for itself
            assert sum(decoded.values()) == len(matrices)
            assert num_alone == 3 * len(matrices)


@pytest.mark.parametrize("resident", [True, False])
def test_gradients_are_those_of_riders_alone(resident: bool, tmp_path: Path) -> None:
    folder = fp8("llama-2", tmp_path)
    with slowllm.load(folder, dtype="float32", resident=resident) as lm:
        found, wanted = losses_of(lm, together=True), losses_of(lm, together=False)
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_where_a_sweep_has_one_rider_nothing_is_kept(tmp_path: Path) -> None:
    folder = fp8("llama-2", tmp_path)
    job = slowllm.Job(num_tokens=20, longest=20, forward_only=True)
    with slowllm.load(folder, dtype="bfloat16", job=job) as lm:
        plan: Plan = lm.plan
        assert plan.sweep_tokens <= plan.rider_tokens
        assert not plan.decoded_bytes
