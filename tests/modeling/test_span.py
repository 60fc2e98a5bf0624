"""Blocks that are computed elsewhere, without a network: the same bits as plain transformers on the same weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

import slowllm
from slowllm.errors import InputError, SessionError, UnsupportedError
from slowllm.inference.branching_cache import CachedModel
from slowllm.modeling.cutting import find_form
from slowllm.modeling.soft_prompts import SoftPrompt
from tests.support.census import TABLE, rows, save_toy
from tests.support.families import FAMILIES, resident, save_tiny
from tests.support.local_swarm import LocalSwarm

# Of every manner: ALiBi, rotary tables, learnt positions, windows, experts, tuples returned, an embedding of another width.
QUICK = {
    "float32": ["bloom", "gemma-3-sliding", "gpt2", "mixtral", "opt"],
    "bfloat16": ["llama-2"],
}
# Their caches are recurrent states, which stay where they are.
RECURRENT = {"mamba", "qwen3-next-hybrid", "rwkv"}
# Its outer model makes masks for images, too, and hands them to the text model.
MASKED_OUTSIDE = "gemma-3-with-a-tower"
CENSUS = rows(TABLE.read_text())
GREEDY = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def texts() -> tuple[Tensor, Tensor]:
    """Return two rows of ids, the second padded on the left, and their mask."""
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


class Case:
    """A model whose blocks are elsewhere, and the one to compare it with: plain transformers in float32.

    In bfloat16 it is a local streamed model: plain GPT-J takes other products in its beams, and plain Mamba writes into
    the hidden states that it returns.
    """

    def __init__(self, folder: Path, name: str, dtype: str = "float32") -> None:
        save_tiny(name, folder)
        self.name, self.folder = name, folder
        self.local = slowllm.load(folder, dtype=dtype, ram="6GiB")
        self.plain: Any = resident(folder) if dtype == "float32" else self.local.model
        self.swarm = LocalSwarm(folder, dtype)
        self.model: Any = self.swarm.lm.model
        # transformers refuses assisted generation for those without a usual cache.
        self.takes_look_up = name not in ("mpt-alibi", "openai-gpt")
        self.takes_mask = "attention_mask" in inspect.signature(self.plain.forward).parameters

    def same(self, work: Callable[[Any], list[Tensor]]) -> None:
        ours, theirs = work(self.model), work(self.plain)
        assert len(ours) == len(theirs)
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(our, their), f"{self.name}: tensor {number}"


def check_forward(case: Case) -> None:
    ids, mask = texts()
    with torch.no_grad():
        case.same(lambda model: [model(ids, use_cache=False).logits])
        case.same(lambda model: list(model(ids, use_cache=False, output_hidden_states=True).hidden_states))
        if case.takes_mask:
            case.same(lambda model: [model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]])


def check_gradient(case: Case) -> None:
    ids, _ = texts()

    def gradient(model: Any) -> list[Tensor]:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()
        return [embeddings.grad]

    case.same(gradient)


def check_generation(case: Case) -> None:
    ids, mask = texts()

    def sampled(model: Any) -> list[Tensor]:
        torch.manual_seed(1)
        return [model.generate(ids, **{**GREEDY, "do_sample": True})]

    with torch.no_grad():
        case.same(lambda model: [model.generate(ids, **GREEDY)])
        if case.takes_mask:
            case.same(lambda model: [model.generate(ids, attention_mask=mask, **GREEDY)])
        case.same(lambda model: [model.generate(ids, num_beams=4, **GREEDY)])
        case.same(sampled)
        look_up = ids[:1].repeat(1, 3)
        if not case.takes_look_up:
            return
        case.same(lambda model: [model.generate(look_up, prompt_lookup_num_tokens=3, **GREEDY)])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if name in QUICK[dtype] else pytest.mark.long)
        for name in FAMILIES
        if name != MASKED_OUTSIDE
        for dtype in ("float32", "bfloat16")
    ],
)
def test_every_family_computes_the_bits_of_plain_transformers(name: str, dtype: str, tmp_path: Path) -> None:
    case = Case(tmp_path, name, dtype)
    with case.swarm, case.local:
        check_forward(case)
        if dtype == "float32":
            check_gradient(case)
        if name not in RECURRENT:
            check_generation(case)
            assert not case.swarm.spans.sessions, "a session ends with its cache"


def deep_prompt(model: Any) -> SoftPrompt:
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(3)
    made = [
        torch.randn(4, config.hidden_size, generator=generator).requires_grad_(True)
        for _ in range(config.num_hidden_layers + 1)
    ]
    return SoftPrompt("deep", made[0], tuple(made[1:]))


def test_deep_vectors_and_prefixes_get_the_gradients_of_a_local_model(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path)
    ids, mask = texts()
    mask = mask.flip(1)

    def deep(model: Any) -> list[Tensor]:
        prompt = deep_prompt(model)
        rows = torch.cat([torch.tensor(prompt.virtual_ids).expand(2, -1), ids], 1)
        whole = torch.cat([torch.ones(2, 4, dtype=torch.int64), mask], 1)
        with prompt.applied(model, rows, whole) as inputs:
            logits = model(**inputs, use_cache=False).logits
        logits.logsumexp(-1)[whole.bool()].sum().backward()
        return [logits.detach()[whole.bool()], *(tensor.grad for tensor in prompt.tensors)]

    def prefix(model: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(4)
        pairs = [torch.randn(2, 4, 5, 16, generator=generator).requires_grad_(True) for _ in range(3)]
        with SoftPrompt("prefix", pairs=tuple(pairs)).applied(model, ids, mask) as inputs:
            logits = model(**inputs).logits
        logits.logsumexp(-1)[mask.bool()].sum().backward()
        return [logits.detach()[mask.bool()], *(pair.grad for pair in pairs)]

    with LocalSwarm(tmp_path) as swarm, slowllm.load(tmp_path, dtype="float32") as local:
        for work in (deep, prefix):
            ours, theirs = work(swarm.lm.model), work(local.model)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), work.__name__


def test_peft_tunes_a_prefix_and_a_prompt(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save_tiny("llama-2", tmp_path)
    ids, mask = texts()
    configs = (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    )

    def tuned(model: Any, config: Any) -> list[Tensor]:
        torch.manual_seed(7)
        adapted = peft.get_peft_model(model, config)
        loss = adapted(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        grads = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
        with torch.no_grad():
            tokens = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
        return [loss.detach(), *grads, tokens]

    for config in configs:
        with LocalSwarm(tmp_path) as swarm:
            ours = tuned(swarm.lm.model, copy.deepcopy(config))
        theirs = tuned(resident(tmp_path), copy.deepcopy(config))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), config.peft_type


@pytest.mark.parametrize("name", ["bloom", "gemma-3-sliding"])
def test_draft_trees_branch_and_settle_elsewhere(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    ids, _ = texts()

    def trees(model: Any) -> list[Tensor]:
        cached = CachedModel(model)
        results = [cached.logits(ids[:1], 3)]
        cached.accept(0, 11)
        results.append(cached.logits(torch.tensor([[5], [6], [7]]), 1))
        cached.select(torch.tensor([2, 0]))
        results.append(cached.logits(torch.tensor([[8], [9]]), 1))
        cached.accept(1, 2)
        results.append(cached.logits(torch.tensor([[11, 12]]), 2))
        return results

    with LocalSwarm(tmp_path) as swarm, slowllm.load(tmp_path, dtype="float32") as local, torch.no_grad():
        ours, theirs = trees(swarm.lm.model), trees(local.model)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_one_call_is_made_for_all_blocks_of_a_hop(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path)
    ids, _ = texts()
    with LocalSwarm(tmp_path, bounds=[(0, 1), (1, 3)]) as swarm, torch.no_grad():
        swarm.lm.model(ids)
        assert [(call.first, call.end) for call in swarm.spans.calls] == [(0, 1), (1, 3)]
        swarm.lm.model.model(ids, output_hidden_states=True)
        assert len(swarm.spans.calls) == 4


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 3)),
        st.tuples(st.just("crop"), st.integers(1, 2)),
        st.tuples(st.just("reorder"), st.integers(0, 1 << 30)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.integers(0, 1 << 30)),
    ),
    min_size=2,
    max_size=8,
)


@pytest.fixture(scope="module")
def pair_of_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalSwarm, Any]]:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama-2", folder, num_hidden_layers=5)
    with LocalSwarm(folder, bounds=[(0, 2), (2, 5)]) as swarm:
        yield swarm, resident(folder)


@settings(max_examples=15)
@given(steps=steps, cut=st.integers(1, 4))
def test_any_steps_on_a_cache_have_the_bits_of_a_local_cache(
    pair_of_models: tuple[LocalSwarm, Any], steps: list[tuple[str, int]], cut: int
) -> None:
    swarm, plain = pair_of_models
    # Both models hold all blocks, so a span may be cut anywhere.
    first, second = swarm.servers
    swarm.spans.ends = {0: cut, cut: 5}
    swarm.spans.models = {0: first, cut: second}
    swarm.spans.runners = dict(zip((0, cut), swarm.spans.runners.values(), strict=True))
    generator = torch.Generator().manual_seed(len(steps))
    caches = [DynamicCache(config=plain.config) for _ in range(2)]
    rows = 2
    with torch.no_grad():
        for what, number in [("append", 4), *steps, ("append", 1)]:
            length = caches[0].get_seq_length()
            if what == "append":
                ids = torch.randint(3, 300, (rows, number), generator=generator)
                ours = swarm.lm.model(ids, past_key_values=caches[0]).logits
                assert torch.equal(ours, plain(ids, past_key_values=caches[1]).logits)
                continue
            order = torch.randint(0, rows, (rows,), generator=torch.Generator().manual_seed(number))
            for cache in caches:
                if what == "crop":
                    cache.crop(-min(number, length - 1))
                elif what == "reorder":
                    cache.reorder_cache(order)
                elif what == "repeat" and rows <= 4:
                    cache.batch_repeat_interleave(number)
                elif what == "select":
                    cache.batch_select_indices(order[:1])
            rows = {"select": 1, "repeat": rows * number if rows <= 4 else rows}.get(what, rows)


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[LocalSwarm]:
    save_tiny("llama-2", tmp_path)
    with LocalSwarm(tmp_path) as swarm:
        yield swarm


def test_what_is_not_sent_is_refused_by_name(llama: LocalSwarm) -> None:
    ids, _ = texts()
    model = llama.lm.model
    with torch.no_grad():
        with pytest.raises(UnsupportedError, match="output_attentions is not sent"):
            model(ids, output_attentions=True)
        with pytest.raises(UnsupportedError, match="attention_mask of another form"):
            model(ids, attention_mask=torch.ones(2, 1, 11, 11, dtype=torch.bool))
        with pytest.raises(UnsupportedError, match="layers of kind Static"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20))


def test_a_static_cache_of_a_model_with_windows_is_refused_for_what_it_is(tmp_path: Path) -> None:
    save_tiny("gemma-3-sliding", tmp_path)
    ids, _ = texts()
    with LocalSwarm(tmp_path) as swarm, torch.no_grad():
        model = swarm.lm.model
        cache = StaticCache(config=model.config, max_cache_len=20)
        with pytest.raises(UnsupportedError, match=r"layers of kind Static.* static and quantised caches"):
            model(ids, past_key_values=cache)
        # generate() makes other masks for it.
        with pytest.raises(UnsupportedError, match=r"layers of kind Static.* static and quantised caches"):
            model.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY)


def test_a_call_of_other_rows_than_its_cache_has_is_refused_and_the_cache_stays_as_it_was(
    llama: LocalSwarm,
) -> None:
    ids, _ = texts()
    model, cache = llama.lm.model, DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        num_calls = llama.spans.num_calls
        for rows in (ids[:1, :2], ids[:1, :2].repeat(3, 1)):
            with pytest.raises(
                InputError,
                match=rf"the call has {len(rows)} rows?, but the cache that it continues has 2 rows",
            ):
                model(rows, past_key_values=cache)
        assert llama.spans.num_calls == num_calls
        known = [layer.keys.shape for layer in cache.layers]
        assert {tuple(shape) for shape in known} == {(2, 1, 11, 1)}
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        assert model(ids[:1, :2].repeat(3, 1), past_key_values=cache).logits.shape[:2] == (3, 2)


def test_a_prefix_of_other_rows_than_the_call_keeps_its_keys_and_values(llama: LocalSwarm) -> None:
    ids, _ = texts()
    cache = DynamicCache()
    pair = torch.randn(3, 4, 5, 16), torch.randn(3, 4, 5, 16)
    for number in range(3):
        cache.update(*pair, number)
    with torch.no_grad(), pytest.raises(InputError, match=r"the call has 2 rows, .* continues has 3 rows"):
        llama.lm.model(ids, past_key_values=cache)
    assert all(layer.keys is not None and torch.equal(layer.keys, pair[0]) for layer in cache.layers)


def test_what_a_config_asks_for_in_every_call_is_refused_by_name(llama: LocalSwarm) -> None:
    llama.lm.config.output_router_logits = True
    with torch.no_grad(), pytest.raises(UnsupportedError, match="output_router_logits is not sent"):
        llama.lm.model.model(texts()[0])


def test_recurrent_caches_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny("qwen3-next-hybrid", tmp_path)
    ids, _ = texts()
    with (
        LocalSwarm(tmp_path) as swarm,
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="LinearAttention"),
    ):
        swarm.lm.model(ids, past_key_values=DynamicCache(config=swarm.lm.config))


def test_the_cache_of_a_recurrent_model_is_refused_by_its_name(tmp_path: Path) -> None:
    save_tiny("mamba", tmp_path)
    ids, _ = texts()
    with LocalSwarm(tmp_path) as swarm, torch.no_grad():
        with pytest.raises(UnsupportedError, match=r"recurrent cache \(cache_params\)"):
            swarm.lm.model.generate(ids, **GREEDY)
        assert swarm.lm.model.generate(ids, use_cache=False, **GREEDY).shape == (2, 21)


def test_gradients_do_not_pass_through_a_session(llama: LocalSwarm) -> None:
    ids, _ = texts()
    model = llama.lm.model
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model(inputs_embeds=embeddings, past_key_values=cache)


def test_a_cache_filled_under_autograd_is_not_continued(llama: LocalSwarm) -> None:
    ids, _ = texts()
    model = llama.lm.model
    cache = DynamicCache(config=model.config)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    model(inputs_embeds=embeddings, past_key_values=cache).logits.sum().backward()
    with torch.no_grad(), pytest.raises(SessionError, match="filled under autograd"):
        model(ids[:, :1], past_key_values=cache)


def test_copies_of_a_cache_share_what_is_kept(llama: LocalSwarm) -> None:
    ids, _ = texts()
    model = llama.lm.model
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        model(ids[:, :1], past_key_values=twin)
        twin.crop(-1)
        model(ids[:, :2], past_key_values=twin)
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(SessionError, match="go on with one of the copies"):
            model(ids[:, :1], past_key_values=twin)


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("gemma3n_text", "depends on the token ids"),
        pytest.param("deepseek_v4", "need token ids", marks=pytest.mark.long),
    ],
)
def test_models_whose_blocks_need_token_ids_cannot_be_cut(
    architecture: str, why: str, tmp_path: Path
) -> None:
    save_toy(architecture, tmp_path)
    with slowllm.load(tmp_path) as lm, pytest.raises(UnsupportedError, match=why):
        find_form(lm.model, lm.layout.blocks_name)


@pytest.mark.long
@pytest.mark.parametrize(
    "architecture", [name for name, verdict in CENSUS.items() if verdict.kind == "equal"]
)
def test_every_architecture_is_cut_to_the_same_bits_or_refused(architecture: str, tmp_path: Path) -> None:
    save_toy(architecture, tmp_path)
    ids, mask = texts()
    found: list[Tensor] = []
    with slowllm.load(tmp_path, dtype="float32") as local, torch.no_grad():
        takes_mask = "attention_mask" in inspect.signature(local.model.forward).parameters
        calls: list[dict[str, Any]] = [{"use_cache": False}]
        calls += [{"use_cache": False, "attention_mask": mask}] * takes_mask
        expected = [local.model(ids, **call).logits for call in calls]
        try:
            with LocalSwarm(tmp_path) as swarm:
                found = [swarm.lm.model(ids, **call).logits for call in calls]
        except UnsupportedError as error:
            reason = str(error)
        else:
            reason = ""
    assert found or "cannot be cut between blocks" in reason or "other machines" in reason
    for call, ours, theirs in zip(calls, found, expected, strict=False):
        text = mask.bool() if "attention_mask" in call else torch.ones_like(mask).bool()
        assert torch.equal(ours[text], theirs[text])
