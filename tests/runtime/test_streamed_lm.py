"""A streamed model behaves as a transformers model, alone, in rides, under PEFT and when misused."""

from __future__ import annotations

import copy
import inspect
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BloomForCausalLM
from transformers.cache_utils import StaticCache

import slowllm
from slowllm.errors import (
    ArchitectureError,
    CheckpointError,
    InputError,
    NonFiniteError,
    PlanError,
    RideError,
    UnsupportedError,
)
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.streaming.call_context import call_context
from tests.support.families import FAMILIES, VOCAB, resident, save_tiny
from tests.support.paths import TINY_BLOOM

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def plain() -> Any:
    return resident(TINY_BLOOM)


def some_ids(*shape: int, seed: int = 0, high: int = 4096) -> Tensor:
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(seed))


# As a transformers model


def test_the_model_is_of_transformers_own_class(tiny_bloom: StreamedLM, plain: Any) -> None:
    assert isinstance(tiny_bloom.model, BloomForCausalLM)
    assert type(tiny_bloom.model).__name__ == "BloomForCausalLM"
    assert inspect.signature(tiny_bloom.model.forward) == inspect.signature(plain.forward)
    assert str(tiny_bloom.model.device) == "cpu"
    assert tiny_bloom.model.dtype == torch.float32


def test_it_works_without_ride(tiny_bloom: StreamedLM, plain: Any) -> None:
    ids = some_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(tiny_bloom.model(ids).logits, plain(ids).logits)
    assert torch.equal(
        tiny_bloom.model.generate(ids, max_new_tokens=5, do_sample=False),
        plain.generate(ids, max_new_tokens=5, do_sample=False),
    )
    losses, gradients = [], []
    for model in (tiny_bloom.model, plain):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(embedded.grad)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


def test_a_model_in_memory_decodes_with_the_resident_models_bits(plain: Any) -> None:
    prompts = [some_ids(1, n) for n in (4, 7)]
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    wanted = [plain.generate(ids, **options) for ids in prompts]
    with slowllm.load(TINY_BLOOM, dtype="fp32") as lm:
        assert not lm.plan.ring_bytes

        def job(ids: Tensor) -> Any:
            return lm.model.generate(ids, **options)

        found = [job(ids) for ids in prompts]  # alone, on this thread
        found += [lm.ride([lambda ids=ids: job(ids)])[0] for ids in prompts]
        found += lm.ride([lambda ids=ids: job(ids) for ids in prompts])
        for one, other in zip(found, wanted * 3, strict=True):
            assert torch.equal(one.sequences, other.sequences)
            assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


def test_boarded_calls_have_the_resident_models_bits_and_share_a_sweep(
    tiny_bloom: StreamedLM, plain: Any
) -> None:
    ids = [some_ids(1, n) for n in (4, 9, 7)]
    with torch.no_grad():
        wanted = [plain(i).logits for i in ids]
        # Boarded by a rider, so that none of them starts before the last one has boarded.
        rides = tiny_bloom.ride(
            [lambda: [tiny_bloom.board(lambda i=i: tiny_bloom.model(i).logits) for i in ids]]
        )[0]
        for ride, logits in zip(rides, wanted, strict=True):
            assert torch.equal(ride.result(), logits)
    assert tiny_bloom.report.num_passages == tiny_bloom.num_stops
    torch.manual_seed(11)
    sampled = plain.generate(ids[0], max_new_tokens=5, do_sample=True)
    ride = tiny_bloom.board(
        lambda: tiny_bloom.model.generate(ids[0], max_new_tokens=5, do_sample=True), seed=11
    )
    assert torch.equal(ride.result(), sampled)


def test_hidden_states_are_recorded(tiny_bloom: StreamedLM, plain: Any) -> None:
    ids = some_ids(2, 9)
    with torch.no_grad():
        streamed, wanted = (model(ids, output_hidden_states=True) for model in (tiny_bloom.model, plain))
    assert len(streamed.hidden_states) == 11
    for a, b in zip(streamed.hidden_states, wanted.hidden_states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama-2", "gemma-2-soft-cap", "mixtral"])
def test_hidden_states_and_attentions_are_recorded_in_riders(name: str, tiny: Tiny) -> None:
    plain = resident(tiny(name), attn_implementation="eager")
    ids = [some_ids(1, n, high=VOCAB) for n in (4, 9)]
    with slowllm.load(tiny(name), dtype="fp32", keep_resident=False) as lm, torch.no_grad():
        lm.model.set_attn_implementation("eager")
        options = {"output_hidden_states": True, "output_attentions": True}
        outputs = lm.ride([lambda i=i: lm.model(i, **options) for i in ids])
        for i, streamed in zip(ids, outputs, strict=True):
            wanted = plain(i, **options)
            for kind in ("hidden_states", "attentions"):
                assert len(streamed[kind]) == len(wanted[kind]) >= 3
                assert all(torch.equal(a, b) for a, b in zip(streamed[kind], wanted[kind], strict=True))


def test_train_changes_nothing_that_blocks_compute(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.0)
    ids = some_ids(2, 9, high=VOCAB)
    with slowllm.load(tmp_path, dtype="fp32") as lm, torch.no_grad():
        before = lm.model.eval()(ids).logits
        assert lm.model.train().training
        assert torch.equal(lm.model(ids).logits, before)


def test_gradient_checkpointing_may_be_asked_for(tiny_bloom: StreamedLM, plain: Any) -> None:
    tiny_bloom.model.gradient_checkpointing_enable()
    tiny_bloom.model.train()
    ids = some_ids(1, 7)
    gradients = []
    for model in (tiny_bloom.model, plain):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=embedded, labels=ids).loss.backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)


def test_state_dict_has_names_and_shapes(tiny_bloom: StreamedLM, plain: Any) -> None:
    streamed = {name: tensor.shape for name, tensor in tiny_bloom.model.state_dict().items()}
    assert streamed == {name: tensor.shape for name, tensor in plain.state_dict().items()}


@pytest.mark.parametrize(
    ("misuse", "sentence"),
    [
        (lambda m: m.save_pretrained("x"), "is not saved: its weights lie unchanged in"),
        (lambda m: m.load_state_dict({}), "takes its weights from its checkpoint only"),
        (lambda m: m.resize_token_embeddings(5000), "cannot be resized"),
        (lambda m: m.requires_grad_(True), "weights are not trained"),
        (lambda m: m.half(), "stays on cpu in torch.float32"),
        (lambda m: m.to("meta"), "stays on cpu in torch.float32"),
        (copy.deepcopy, "cannot be copied; load it again"),
    ],
)
def test_what_has_no_meaning_is_refused(
    tiny_bloom: StreamedLM, misuse: Callable[[Any], Any], sentence: str
) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        misuse(tiny_bloom.model)


def test_moving_it_to_where_it_is_does_nothing(tiny_bloom: StreamedLM) -> None:
    assert tiny_bloom.model.to("cpu").float() is tiny_bloom.model


def test_lora_adapters_are_refused(tiny_bloom: StreamedLM) -> None:
    adapted = peft.get_peft_model(tiny_bloom.model, peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(
        UnsupportedError, match=r"h\.0 was changed after loading: adapters .* use prompt tuning"
    ):
        adapted(some_ids(1, 5))


def test_a_module_exchanged_for_another_around_the_same_parameters_computes(tiny_bloom: StreamedLM) -> None:
    ids = some_ids(1, 5)
    attention = tiny_bloom.model.transformer.h[0].self_attention
    with torch.no_grad():
        expected = tiny_bloom.model(ids).logits
        attention.attention_dropout = torch.nn.Identity()
        attention.dense = torch.nn.Sequential(attention.dense)
        assert torch.equal(tiny_bloom.model(ids).logits, expected)


def test_a_cache_written_in_place_is_refused_for_gradients(tiny_bloom: StreamedLM) -> None:
    ids = some_ids(1, 5)
    cache = StaticCache(config=tiny_bloom.model.config, max_cache_len=16)
    with torch.no_grad():
        tiny_bloom.model(ids, past_key_values=cache)
    embedded = tiny_bloom.model.get_input_embeddings()(ids).detach().requires_grad_(True)
    with pytest.raises(UnsupportedError, match="writes into its cache in place"):
        tiny_bloom.model(inputs_embeds=embedded, past_key_values=cache)


# Gradients


@pytest.mark.parametrize("name", ["bloom", "llama-2", "mixtral", "falcon-new-decoder", "gemma-3-sliding"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_peft_gradients_equal_the_resident_models(name: str, kind: str, tiny: Tiny) -> None:
    config_class = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    ids = [torch.randint(5, VOCAB, (2, n), generator=torch.Generator().manual_seed(n)) for n in (5, 8)]

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return peft.get_peft_model(model, config)

    def trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    plain = adapted(resident(tiny(name)))
    for i in ids:
        plain(input_ids=i, attention_mask=torch.ones_like(i), labels=i).loss.backward()
    with slowllm.load(tiny(name), dtype="fp32", keep_resident=False, poison=True) as lm:
        model = adapted(lm.model)
        losses = [
            lambda i=i: model(input_ids=i, attention_mask=torch.ones_like(i), labels=i).loss.backward()
            for i in ids
        ]
        lm.ride(losses)
        assert [n for n, _ in trained(model)] == [n for n, _ in trained(plain)]
        for (_, streamed), (_, wanted) in zip(trained(model), trained(plain), strict=True):
            assert wanted.grad is not None
            assert wanted.grad.norm() > 0
            assert (streamed.grad - wanted.grad).norm() <= 1e-6 * wanted.grad.norm()


def test_a_gradient_reaches_back_through_an_earlier_call_by_the_cache(tiny: Tiny) -> None:
    folder = tiny("llama-2")
    ids = torch.randint(5, VOCAB, (1, 6), generator=torch.Generator().manual_seed(3))
    gradients = []
    with slowllm.load(folder, dtype="fp32", keep_resident=False, poison=True) as lm:
        for model in (lm.model, resident(folder)):
            first = model.get_input_embeddings()(ids).detach().requires_grad_(True)
            past = model(inputs_embeds=first, use_cache=True).past_key_values
            model(ids, past_key_values=past).logits.pow(2).sum().backward()
            gradients.append(first.grad)
    assert gradients[1].norm() > 0
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[1].norm()


def test_a_forward_and_backward_visits_the_turning_stop_once(tiny_bloom: StreamedLM) -> None:
    passages: list[int] = []

    def step(ids: Tensor) -> Tensor:
        embedded = tiny_bloom.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        tiny_bloom.model(inputs_embeds=embedded, labels=ids).loss.backward()
        assert embedded.grad is not None
        return embedded.grad

    with tiny_bloom.watching(lambda passage: passages.append(passage.stop)):
        tiny_bloom.ride([lambda n=n: step(some_ids(1, n)) for n in (4, 7, 9)])
        tiny_bloom.close()  # the last passage is reported after its riders have left
    assert passages == [*range(11), *range(9, -1, -1)]


def test_watchers_nest_and_each_sees_the_stops_of_its_own_context(tiny_bloom: StreamedLM) -> None:
    outer: list[int] = []
    inner: list[int] = []

    def call() -> None:
        with torch.no_grad():
            tiny_bloom.model(some_ids(1, 4))

    # The last stop of a ride may be reported after its end, but before the first stop of the next.
    with tiny_bloom.watching(lambda passage: outer.append(passage.stop)):
        with tiny_bloom.watching(lambda passage: inner.append(passage.stop)):
            tiny_bloom.ride([call])
            tiny_bloom.ride([call])
        tiny_bloom.ride([call])
        seen = list(inner)
        tiny_bloom.ride([call])
    assert inner == seen == outer[: len(seen)]
    assert len(seen) >= 2 * tiny_bloom.num_stops - 1
    assert len(outer) >= 4 * tiny_bloom.num_stops - 1


def test_a_block_is_recomputed_against_the_cache_as_it_was(tiny: Tiny) -> None:
    # With use_cache a recompute that appended to the cache again would see every token twice.
    folder = tiny("llama-2")
    ids = some_ids(2, 7, high=VOCAB)
    gradients = []
    with slowllm.load(folder, dtype="fp32", keep_resident=False) as lm:
        for use_cache in (True, False):
            embedded = lm.model.get_input_embeddings()(ids).detach().requires_grad_(True)
            output = lm.model(inputs_embeds=embedded, use_cache=use_cache)
            F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            if use_cache:
                assert output.past_key_values.get_seq_length() == 7
            gradients.append(embedded.grad)
    assert torch.equal(*gradients)


def test_an_argument_written_to_after_the_call_is_noticed(tiny_bloom: StreamedLM) -> None:
    embedded = tiny_bloom.model.get_input_embeddings()(some_ids(1, 5)).detach().requires_grad_(True)
    hidden = embedded * 1
    output = tiny_bloom.model.transformer.h[0](hidden, torch.zeros(8, 1, 5), None)[0]
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Riders as alone


def test_seeded_sampling_in_concurrent_riders_equals_one_after_the_other(tiny_bloom: StreamedLM) -> None:
    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        options = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "pad_token_id": 3}
        return tiny_bloom.model.generate(some_ids(1, 3 + seed, seed=seed), **options)

    together = tiny_bloom.ride([lambda seed=seed: sample(seed) for seed in range(8)])
    alone = [sample(seed) for seed in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert len({tuple(tokens[0, -3:].tolist()) for tokens in alone}) > 4  # it was sampling


def test_autocast_and_inference_mode_travel_with_their_rider(tiny_bloom: StreamedLM, plain: Any) -> None:
    ids = some_ids(1, 12)

    def cast(model: Any) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ids).logits

    def inference(model: Any) -> Tensor:
        with torch.inference_mode():
            return model(ids).logits

    def nothing(model: Any) -> Tensor:
        return model(ids).logits

    jobs = [cast, inference, nothing]
    found = tiny_bloom.ride([lambda job=job: job(tiny_bloom.model) for job in jobs])
    wanted = [job(plain) for job in jobs]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert [tensor.is_inference() for tensor in found] == [False, True, False]
    assert found[0].dtype == wanted[0].dtype == torch.bfloat16


def test_autocast_reaches_the_recompute(tiny_bloom: StreamedLM, plain: Any) -> None:
    ids = some_ids(1, 12)
    gradients = []
    for model in (tiny_bloom.model, plain):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        gradients.append(embedded.grad)
    # bf16 noise: the same products in the same order, but the head's gradient is cast at another place.
    assert (gradients[0] - gradients[1]).norm() <= 0.02 * gradients[1].norm()


def test_calls_from_the_users_own_threads_work(tiny_bloom: StreamedLM, plain: Any) -> None:
    inputs = [some_ids(1, n, seed=n) for n in (3, 6, 9, 12)]
    found: dict[int, Tensor] = {}

    def call(number: int) -> None:
        with torch.no_grad():
            found[number] = tiny_bloom.model(inputs[number]).logits

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert all(torch.equal(found[number], plain(inputs[number]).logits) for number in range(4))


def test_a_nested_ride_is_refused(tiny_bloom: StreamedLM) -> None:
    with pytest.raises(RideError, match=r"ride\(\) was called inside a rider"):
        tiny_bloom.ride([lambda: tiny_bloom.ride([lambda: 1])])


def test_two_models_share_one_process_and_one_budget(tiny: Tiny) -> None:
    budget = slowllm.Budget(8 << 30, used_bytes=1 << 30)
    free = budget.free_bytes
    with slowllm.load(tiny("llama-2"), ram=budget, dtype="fp32") as one:
        between = budget.free_bytes
        assert between == free - one.plan.peak_bytes
        with slowllm.load(TINY_BLOOM, ram=budget, dtype="fp32") as other, torch.no_grad():
            assert budget.free_bytes == between - other.plan.peak_bytes
            ids = some_ids(1, 7, high=VOCAB)

            def both() -> tuple[Tensor, Tensor]:
                return one.model(ids).logits, other.model(ids).logits

            rides = one.ride([both, both])
            wanted = resident(tiny("llama-2"))(ids).logits, resident(TINY_BLOOM)(ids).logits
            assert all(torch.equal(a, b) for ride in rides for a, b in zip(ride, wanted, strict=True))
    assert budget.free_bytes == free
    budget.take(budget.free_bytes - 1000)
    with pytest.raises(PlanError, match="the smallest that would do is"):
        slowllm.load(TINY_BLOOM, ram=budget)


def test_weights_are_read_once_for_all_riders(tiny_bloom: StreamedLM) -> None:
    with torch.no_grad():
        tiny_bloom.ride([lambda n=n: tiny_bloom.model(some_ids(1, n)).logits for n in (3, 5, 7)])
    assert tiny_bloom.report.num_passages == tiny_bloom.num_stops
    # Nobody comes round again, so nothing beyond the one sweep is read ahead; the pages at the edges of 121
    # tensors are read whole.
    read_bytes = tiny_bloom.report.read_bytes
    assert tiny_bloom.weight_bytes <= read_bytes <= tiny_bloom.weight_bytes + 121 * 2 * 4096


def test_no_thread_outlives_the_model() -> None:
    before = set(threading.enumerate())
    with slowllm.load(TINY_BLOOM, keep_resident=False) as lm:
        lm.ride([lambda: lm.model(some_ids(1, 4)).logits])
        assert len(set(threading.enumerate()) - before) > 1
    assert set(threading.enumerate()) == before
    lm.close()  # twice does no harm
    with pytest.raises(RideError, match="closed"):
        lm.model(some_ids(1, 4))


# Bad weights and bad folders


def broken_copy(folder: Path, name: str, change: Callable[[Tensor], Any]) -> Path:
    """Copy the embedded model with one tensor changed."""
    shutil.copytree(TINY_BLOOM, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, shard, {"format": "pt"})
            return folder
    raise AssertionError(f"{name} is not there")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_block(tmp_path: Path, value: float) -> None:
    folder = broken_copy(tmp_path / "m", "h.3.mlp.dense_h_to_4h.bias", lambda t: t.fill_(value))
    with slowllm.load(folder) as lm:
        with pytest.raises(NonFiniteError, match=r"transformer\.h\.3: .* in the output at position \[0, 0\]"):
            lm.model(some_ids(1, 4))
        embedded = lm.model.get_input_embeddings()(some_ids(1, 4)).detach().requires_grad_(True)
        with pytest.raises(NonFiniteError, match=r"transformer\.h\.3"):
            lm.model(inputs_embeds=embedded)


def test_a_nan_in_the_head_is_named(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        tensors = load_file(shard)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"][3, 5] = float("nan")
            save_file(tensors, shard, {"format": "pt"})
    ids = some_ids(1, 4, high=VOCAB)
    with slowllm.load(tmp_path) as lm:
        with pytest.raises(NonFiniteError, match="the head: NaN"):
            lm.model(ids)
        with pytest.raises(NonFiniteError, match="the head: NaN"):
            slowllm.log_probs(lm.model, ids, input_ids=ids)


def test_padded_positions_may_be_nan(tmp_path: Path) -> None:
    # A damaged row of the embedding, met only where the mask says that there is no text.
    folder = broken_copy(tmp_path / "m", "word_embeddings.weight", lambda t: t[3].fill_(float("nan")))
    ids = torch.tensor([[3, 3, 7, 8, 9], [5, 6, 7, 8, 9]])
    mask = (ids != 3).long()
    with slowllm.load(folder, dtype="fp32") as lm:
        from slowllm.modeling.finite import check_finite

        values = torch.zeros(2, 5, 4)
        values[0, :2] = float("nan")
        with call_context(text_mask=mask):
            check_finite("block", values)
            values[1, 3, 2] = float("inf")
            with pytest.raises(NonFiniteError, match=r"block: .* at position \[1, 3\]"):
                check_finite("block", values)
        with pytest.raises(NonFiniteError):
            lm.model(ids)  # without a mask those positions count


def test_a_rider_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    folder = broken_copy(tmp_path / "m", "word_embeddings.weight", lambda t: t[77].fill_(float("nan")))
    finished = []

    def job(ids: Tensor) -> None:
        with torch.no_grad():
            # The head of a tied model meets the damaged row whatever the text: ask for no logits.
            lm.model.transformer(ids)
        finished.append(len(ids[0]))

    with slowllm.load(folder) as lm, pytest.raises(NonFiniteError) as caught:
        lm.ride([lambda i=i: job(i) for i in (some_ids(1, 4), torch.tensor([[77, 5]]), some_ids(1, 6))])
    assert caught.value.__notes__ == ["raised by rider 1 of 3"]
    assert finished == [4, 6]


def test_numbers_too_large_for_the_head_are_no_success(tmp_path: Path) -> None:
    folder = broken_copy(tmp_path / "m", "word_embeddings.weight", lambda t: t[4000].fill_(3e38))
    with slowllm.load(folder, dtype="fp32") as lm:
        ids = some_ids(1, 6).clamp(max=3999)
        with pytest.raises(NonFiniteError, match="the head: NaN"):
            slowllm.log_probs(lm.model, ids, input_ids=ids)


@pytest.mark.parametrize("target", [-1, 4096])
def test_a_target_beyond_the_vocabulary_is_refused(tiny_bloom: StreamedLM, target: int) -> None:
    with pytest.raises(InputError, match="but there are 4096 tokens"):
        slowllm.log_probs(tiny_bloom.model, torch.tensor([[target, -100]]), input_ids=some_ids(1, 2))


def test_a_forgotten_model_is_closed_when_it_is_collected() -> None:
    import gc

    before = set(threading.enumerate())
    model = slowllm.load(TINY_BLOOM, keep_resident=False).model
    gc.collect()
    model(some_ids(1, 3))  # the model alone keeps its handle
    assert set(threading.enumerate()) != before
    del model
    gc.collect()
    assert set(threading.enumerate()) == before


def test_hub_ids_resolve_offline_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(TINY_BLOOM, repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with slowllm.load("someone/tiny") as lm:
        assert lm.name == "someone/tiny"
        assert lm.tokenizer("a")["input_ids"]
        lm.model(some_ids(1, 3))
    with pytest.raises(
        CheckpointError, match=r"someone/else: no such folder, and no such model .* `slowllm download"
    ):
        slowllm.load("someone/else")


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("./nowhere", "no such folder"),
        ("/no/where/at/all", "no such folder"),
        ("nowhere.gguf", r"nowhere\.gguf: no such file$"),
        ("/no/where.gguf", r"/no/where\.gguf: no such file$"),
        (str(__file__), r"is a file; give the folder .*, or a GGUF file, whose name ends in \.gguf$"),
    ],
)
def test_a_path_that_is_no_model_is_refused(path: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        slowllm.load(path)


def rewrite_config(folder: Path, **changes: Any) -> Path:
    import json

    shutil.copytree(TINY_BLOOM, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"model_type": "gpt17"}, ArchitectureError, "model type 'gpt17' cannot be used by this version"),
        ({"model_type": None}, CheckpointError, "names no model_type"),
        ({"model_type": "vit"}, ArchitectureError, "model type 'vit' has no usable causal LM"),
        ({"quantization_config": {"quant_method": "hqq"}}, CheckpointError, r"already quantised \(hqq\)"),
        ({"n_layer": 9}, CheckpointError, "beyond the 9 that config.json names"),
        ({"n_layer": 11}, CheckpointError, "missing from the checkpoint"),
        (
            {"hidden_size": 168},
            CheckpointError,
            r"has shape \[160\] but .* needs \[168\]; config.json and the",
        ),
        ({"vocab_size": "8"}, CheckpointError, "config.json: cannot be used .*vocab_size"),
        ({"n_layer": 10**30}, CheckpointError, "config.json: names"),
        ({"n_head": 7}, ArchitectureError, "has no usable causal LM"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    folder = rewrite_config(tmp_path / "m", **changes)
    with pytest.raises(error, match=sentence):
        slowllm.load(folder)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = rewrite_config(tmp_path / "m", model_type="evil", auto_map=auto_map)
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    with pytest.raises(ArchitectureError, match="'evil'"):
        slowllm.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_budget_too_small_names_the_smallest_that_does() -> None:
    with pytest.raises(PlanError, match="the smallest that would do is") as caught:
        slowllm.load(TINY_BLOOM, ram="100MiB", keep_resident=False)
    smallest = str(caught.value).split("the smallest that would do is ")[1].split()[0]
    # The process has grown since by what the refusal itself took.
    from slowllm.options import parse_bytes

    with slowllm.load(TINY_BLOOM, ram=parse_bytes(smallest) + (8 << 20), keep_resident=False) as lm:
        assert lm.plan.ring_bytes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "mps"}, "device 'mps' is unknown; use cpu, cuda, cuda:1"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
        ({"ram": "lots"}, "'lots' is not a size"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        slowllm.load(TINY_BLOOM, **options)


def test_a_missing_tokenizer_is_one_sentence(tiny: Tiny) -> None:
    with (
        slowllm.load(tiny("bloom")) as lm,
        pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"),
    ):
        _ = lm.tokenizer


def test_the_families_asked_for_are_among_those_tested() -> None:
    asked = {
        "bloom",
        "llama",
        "mixtral",
        "falcon",
        "gemma2",
        "cohere",
        "granite",
        "gptj",
        "gpt_neo",
        "qwen3_moe",
    }
    assert asked <= {model_type for model_type, _ in FAMILIES.values()}
    assert len({model_type for model_type, _ in FAMILIES.values()}) >= 14


def test_a_fingerprint_tells_weights_and_not_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TINY_BLOOM, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    found = []
    for folder in (TINY_BLOOM, tmp_path / "copy", "copy", Path("copy") / ".." / "copy"):
        with slowllm.load(folder) as lm:
            found.append(lm.fingerprint())
    assert len(set(found)) == 1
    shard = tmp_path / "copy" / "model-00002-of-00005.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 + 7] ^= 1  # in one of the samples
    shard.write_bytes(data)
    with slowllm.load("copy") as lm:
        assert lm.fingerprint() != found[0]


def test_a_model_is_no_name_of_itself(tiny_bloom: StreamedLM) -> None:
    with pytest.raises(InputError, match="a model is given by its folder or hub id, not as LM"):
        slowllm.load(tiny_bloom)  # type: ignore[arg-type]
