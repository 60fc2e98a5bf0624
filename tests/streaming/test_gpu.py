"""On a GPU, against plain transformers on the same GPU. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.errors import InputError, PlanError
from slowllm.options import GIB
from slowllm.planning.device_plan import DEVICE_SLACK_BYTES
from slowllm.prepare.convert import convert
from slowllm.storage.codecs import torch_kernels
from slowllm.storage.codecs.base import Parts
from slowllm.storage.codecs.registry import STORE_CODECS
from slowllm.storage.codecs.team import Team
from slowllm.streaming.devices import CudaDevice
from tests.support.coded import coded, matrix_of
from tests.support.families import resident, save_tiny
from tests.support.native_checkpoints import fp8_settings, quantised, store_fp8, store_mxfp4
from tests.support.paths import TINY_BLOOM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine"),
]
Tiny = Callable[..., Path]
FAMILIES = [
    "bloom",
    "llama-3-scaled-rope",
    "mixtral",
    "gemma-2-soft-cap",
    "opt",
    "falcon-multi-query",
    "gpt2",
]
IDS = torch.tensor([[5, 7, 11, 13, 17, 3], [2, 9, 4, 8, 6, 1]])
# In fp32, sums of products may be taken in another order for other shapes.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
STREAMED = {"dtype": "fp32", "keep_resident": False, "poison": True, "ram": "8GiB", "device": "cuda"}


def on_gpu(folder: Path, **options: Any) -> Any:
    return resident(folder, **options).to("cuda")


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_and_scores_equal_those_of_a_resident_model(name: str, tiny: Tiny) -> None:
    wanted = on_gpu(tiny(name))(input_ids=IDS.cuda()).logits
    targets = torch.roll(IDS, -1, 1)
    with slowllm.load(tiny(name), **STREAMED) as lm, torch.no_grad():
        assert lm.model.device == torch.device("cuda:0")
        for ids in (IDS, IDS.cuda()):
            torch.testing.assert_close(lm.model(input_ids=ids).logits, wanted, **CLOSE)
        scores = slowllm.log_probs(lm.model, targets, input_ids=IDS)
    expected = wanted.log_softmax(-1).cpu().gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(scores, expected, **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_generated_tokens_are_those_of_a_resident_model(name: str, tiny: Tiny) -> None:
    plain = on_gpu(tiny(name))
    options: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    with slowllm.load(tiny(name), **STREAMED) as lm:
        for extra in (
            {"do_sample": False},
            {"num_beams": 2, "do_sample": False},
            {"do_sample": True, "top_k": 20},
        ):
            found = []
            for model in (plain, lm.model):
                torch.manual_seed(3)
                found.append(model.generate(input_ids=IDS.cuda(), **options, **extra))
            assert torch.equal(*found)


def coded_mixture(name: str, tiny: Tiny, folder: Path) -> Path:
    """Return a mixture in the quantised format of its makers."""
    if name == "gpt-oss":
        settings, store = {"quant_method": "mxfp4"}, store_mxfp4
    else:
        settings, store = fp8_settings((8, 16)), store_fp8((8, 16))
    return quantised(tiny(name, torch.bfloat16), folder / name, settings, store)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3"])
def test_experts_on_demand_have_the_bits_of_whole_blocks(name: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(name) if name == "mixtral" else coded_mixture(name, tiny, tmp_path)
    options = {**STREAMED, "dtype": "fp32" if name == "mixtral" else "bf16"}
    texts = [IDS, IDS[:1, :4], IDS[1:, :3]]
    found = []
    for granularity in ("experts", "blocks"):
        with slowllm.load(folder, **options, granularity=granularity) as lm:
            embedded = lm.model.get_input_embeddings()(IDS).detach()

            def gradient(lm: Any = lm, embedded: torch.Tensor = embedded) -> torch.Tensor:
                own = embedded.clone().requires_grad_()
                lm.model(inputs_embeds=own, labels=IDS.cuda()).loss.backward()
                assert own.grad is not None
                return own.grad.cpu()

            with torch.no_grad():
                jobs = [lambda ids=ids, lm=lm: lm.model(input_ids=ids).logits for ids in texts]
                tokens = lm.model.generate(IDS.cuda(), max_new_tokens=3, do_sample=False)
                found.append([*lm.ride(jobs), *(job() for job in jobs), tokens])
            # Riders, and a call outside of a ride, whose backward pass is on autograd's thread for the device.
            found[-1] += [*lm.ride([gradient, gradient]), gradient()]
    # Sums into rows of which none is meant twice, so that no order of atomic additions shows.
    assert all(map(torch.equal, *found))
    with slowllm.load(folder, **options, granularity="experts", exact=False) as lm, torch.no_grad():
        together = lm.ride([lambda ids=ids: lm.model(input_ids=ids).logits for ids in texts])
        assert lm.experts.settings.stats.num_together
        for ours, theirs in zip(together, found[0], strict=False):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 if name == "mixtral" else 0.02)


def test_many_experts_through_two_slots_give_the_same_bits(tmp_path: Path) -> None:
    """Copies are large enough here to be under way while the device computes."""
    save_tiny(
        "mixtral", tmp_path, shard="1GB", hidden_size=1024, intermediate_size=3072, num_local_experts=8,
        num_hidden_layers=4,
    )  # fmt: skip
    with slowllm.load(tmp_path, **STREAMED, granularity="experts") as lm, torch.no_grad():
        first = lm.model(input_ids=IDS).logits
        torch.testing.assert_close(first, on_gpu(tmp_path)(input_ids=IDS.cuda()).logits, **CLOSE)
        for _ in range(20):
            assert torch.equal(lm.model(input_ids=IDS).logits, first)
    resident_options = {**STREAMED, "keep_resident": True, "poison": False}
    with slowllm.load(tmp_path, **resident_options, granularity="experts") as lm, torch.no_grad():
        for _ in range(5):
            assert torch.equal(lm.model(input_ids=IDS).logits, first)
        assert lm.experts.kept.num_hits


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_gradients_of_a_soft_prompt_equal_those_of_a_resident_model(name: str, tiny: Tiny) -> None:
    start = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)) * 0.1

    def gradient(model: Any) -> torch.Tensor:
        own = start.clone().requires_grad_(True)
        embeds = torch.cat([own.expand(2, -1, -1).cuda(), model.get_input_embeddings()(IDS.cuda())], 1)
        labels = torch.cat([torch.full((2, 3), -100), IDS], 1).cuda()
        model(inputs_embeds=embeds, labels=labels).loss.backward()
        assert own.grad is not None
        return own.grad

    wanted = gradient(on_gpu(tiny(name)))
    with slowllm.load(tiny(name), **STREAMED) as lm:
        job = lambda: gradient(lm.model)  # noqa: E731
        # Riders, and a call outside of a ride, whose backward pass is on autograd's thread for the device.
        for found in (*lm.ride([job, job]), job()):
            torch.testing.assert_close(found, wanted, **CLOSE)


def test_riders_of_one_sweep_draw_as_if_each_were_alone() -> None:
    with slowllm.load(TINY_BLOOM, **STREAMED) as lm:

        def job(seed: int) -> Any:
            torch.manual_seed(seed)
            return lm.model.generate(input_ids=IDS[:1].cuda(), do_sample=True, max_new_tokens=6).tolist()

        alone = [lm.ride([lambda n=n: job(n)])[0] for n in (1, 2)]
        assert lm.ride([lambda n=n: job(n) for n in (1, 2)]) == alone
        with torch.no_grad():
            first, second = lm.ride([lambda: lm.model(IDS).logits, lambda: lm.model(IDS[:1, :4]).logits])
            torch.testing.assert_close(first, lm.model(IDS).logits, **CLOSE)
            torch.testing.assert_close(second, lm.model(IDS[:1, :4]).logits, **CLOSE)


def test_many_sweeps_through_two_slots_give_the_same_bits(tmp_path: Path) -> None:
    """Copies are large enough here to be under way while the device computes."""
    save_tiny("llama-2", tmp_path, shard="1GB", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    with slowllm.load(tmp_path, **STREAMED) as lm, torch.no_grad():
        wanted = on_gpu(tmp_path)(input_ids=IDS.cuda()).logits
        first = lm.model(input_ids=IDS).logits
        torch.testing.assert_close(first, wanted, **CLOSE)
        for _ in range(20):
            assert torch.equal(lm.model(input_ids=IDS).logits, first)


@pytest.mark.parametrize("codec", sorted(STORE_CODECS))
def test_the_gpu_decodes_the_bits_of_the_processors_loops(codec: str) -> None:
    parts = coded(codec, matrix_of(2, 300, 1000, 8.0))
    wanted = torch.empty(200, 1000, dtype=torch.bfloat16)
    team = Team(1)
    STORE_CODECS[codec].decode(parts, wanted, 70, 270, team)
    team.close()
    there = {name: part.cuda() for name, part in parts.arrays.items()}
    out = torch.empty(200, 1000, dtype=torch.bfloat16, device="cuda")
    torch_kernels.decode(codec, Parts(there, 300, 1000), out, 70, 270)
    assert torch.equal(out.cpu().view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("sizes", [(1, 5, 3), (16, 64, 7), (17, 8, 16), (40, 100, 33)])
def test_integer_products_of_any_size_are_exact(sizes: tuple[int, int, int]) -> None:
    rows, width, outputs = sizes
    x = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    codes = torch.randint(-127, 128, (outputs, width), dtype=torch.int8)
    found = torch_kernels.int8_product(x.cuda(), codes.cuda())
    assert torch.equal(found.cpu(), (x.long() @ codes.long().T).float())


@pytest.mark.parametrize("store", ["bf16", "lossless", "int8", "int4"])
def test_stores_are_computed_on_the_gpu(store: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama-3-scaled-rope", torch.bfloat16)
    convert(source, tmp_path / store, store=store, workers=1)
    with torch.no_grad():
        with slowllm.load(tmp_path / store, **STREAMED) as lm:
            found = lm.model(input_ids=IDS).logits.cpu()
        with slowllm.load(tmp_path / store, dtype="fp32") as plain:
            torch.testing.assert_close(found, plain.model(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)


def test_what_is_taken_of_the_card_stays_in_the_budget(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path, shard="1GB", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    torch.cuda.empty_cache()
    job = slowllm.Job(num_tokens=256, longest=64, repeated=True, forward_only=True, keeps_results=False)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    vram = DEVICE_SLACK_BYTES + (300 << 20)
    with slowllm.load(
        tmp_path, **{**STREAMED, "keep_resident": True, "poison": False}, vram=vram, job=job
    ) as lm:
        assert lm.device_placement is not None
        assert 0 < len(lm.device_placement.plan.kept) < lm.num_stops
        ids = torch.randint(5, 300, (4, 64))
        for _ in range(2):
            lm.ride([lambda: slowllm.log_probs(lm.model, ids, input_ids=ids)])
        read = lm.report.read_bytes
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= lm.device_placement.plan.used_bytes[0] - DEVICE_SLACK_BYTES // 2
        assert lm.device_placement.plan.used_bytes[0] <= vram
        lm.model(ids)
        assert lm.report.read_bytes - read < lm.weight_bytes
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 64 << 20, "closing gives the card's memory back"


def test_a_budget_that_the_card_has_not_or_the_model_does_not_fit_is_refused() -> None:
    total = CudaDevice(torch.device("cuda:0")).total_bytes()
    with pytest.raises(InputError, match=r"a vram budget of .* is more than the .* of cuda:0"):
        slowllm.load(TINY_BLOOM, device="cuda", vram=total + GIB)
    with pytest.raises(PlanError, match=r"100MiB on cuda:0 are too few for this model"):
        slowllm.load(TINY_BLOOM, device="cuda", vram="100MiB")
    count = torch.cuda.device_count()
    with pytest.raises(InputError, match=f"there is no device cuda:{count}"):
        slowllm.load(TINY_BLOOM, device=f"cuda:{count}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs on this machine")
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_take_turns_on_two_gpus(name: str, tiny: Tiny) -> None:
    wanted = on_gpu(tiny(name))(input_ids=IDS.cuda()).logits
    with slowllm.load(tiny(name), **{**STREAMED, "device": "cuda:0,cuda:1"}) as lm, torch.no_grad():
        torch.testing.assert_close(lm.model(input_ids=IDS).logits, wanted, **CLOSE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs on this machine")
def test_experts_are_sent_to_the_gpu_of_their_block(tiny: Tiny) -> None:
    wanted = on_gpu(tiny("mixtral"))(input_ids=IDS.cuda()).logits
    options = {**STREAMED, "device": "cuda:0,cuda:1", "granularity": "experts"}
    with slowllm.load(tiny("mixtral"), **options) as lm, torch.no_grad():
        torch.testing.assert_close(lm.model(input_ids=IDS).logits, wanted, **CLOSE)
