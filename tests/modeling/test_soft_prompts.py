"""A soft prompt stands before every text that is scored or continued, as PEFT has it on the resident model."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import slowllm
from slowllm.errors import InputError
from slowllm.inference import generation
from slowllm.inference.generation_types import Prompt, Settings
from slowllm.inference.scoring import job_of_queries, score_queries
from slowllm.inference.stopping import special_tokens
from slowllm.inference.text import Query
from slowllm.modeling.soft_prompt_files import FILES, load_prompt, save_prompt
from slowllm.modeling.soft_prompts import SoftPrompt
from slowllm.runtime.description import ModelInfo
from tests.support.cases import crossed
from tests.support.families import VOCAB
from tests.support.paths import TINY_BLOOM
from tests.support.properties import num_examples

Tiny = Callable[..., Path]
LENGTH = 3
CLOSE = 1e-5  # padding and packing round otherwise
KINDS = ["shallow", "deep", "prefix"]
FAMILIES = [
    "bloom",
    "llama-3-scaled-rope",
    "mixtral",
    "falcon-new-decoder",
    "gemma-3-sliding",
    "mpt-alibi",
    "opt",
]
# In the quick run each kind of prompt with ALiBi, with windows and with experts.
every_family_and_kind = pytest.mark.parametrize(
    ("name", "kind"),
    crossed(
        FAMILIES,
        KINDS,
        quick=[*product(["bloom", "gemma-3-sliding"], KINDS), ("mixtral", "prefix"), ("opt", "deep")],
    ),
)


def rows(num: int, low: int, high: int, seed: int = 5) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (num,), generator=generator).tolist()
    return [tuple(torch.randint(5, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


def prompt_of(kind: str, model: Any) -> SoftPrompt:
    """Random numbers, as large as those of the model."""
    generator = torch.Generator().manual_seed(6)
    config = model.config.get_text_config()
    if kind == "prefix":
        cache = model(torch.tensor([rows(1, LENGTH, LENGTH + 1)[0]]), use_cache=True).past_key_values
        pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
        return SoftPrompt(
            "prefix", pairs=tuple(pair + 0.3 * torch.randn(pair.shape, generator=generator) for pair in pairs)
        )
    width = model.get_input_embeddings().weight.shape[1]
    embeddings = 0.1 * torch.randn(LENGTH, width, generator=generator)
    if kind == "shallow":
        return SoftPrompt("shallow", embeddings)
    vectors = [
        0.3 * torch.randn(LENGTH, config.hidden_size, generator=generator)
        for _ in range(config.num_hidden_layers)
    ]
    return SoftPrompt("deep", embeddings, (None, *vectors[1:]))


def resident(folder: Path) -> Any:
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        .eval()
        .requires_grad_(False)
    )


def blocks_of(model: Any) -> Any:
    from slowllm.modeling.blocks import find_blocks

    return find_blocks(model)[1]


def plain_logits(model: Any, prompt: SoftPrompt, ids: tuple[int, ...]) -> torch.Tensor:
    """Logits (T, V) of a text behind a prompt, by the resident model and nothing of ours."""
    text = torch.tensor([ids])
    if prompt.kind == "prefix":
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        for block, pair in enumerate(prompt.pairs):
            cache.update(pair[:1], pair[1:], block)
        return model(text, past_key_values=cache, attention_mask=torch.ones(1, LENGTH + len(ids))).logits[0]
    hooks = []
    for vector, block in zip(prompt.vectors, blocks_of(model), strict=False):

        def add(module: Any, args: Any, kwargs: Any, vector: Any = vector) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            if vector is not None:
                hidden[:, :LENGTH] += vector
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        hooks.append(block.register_forward_pre_hook(add, with_kwargs=True))
    embedded = torch.cat([prompt.embeddings[None], model.get_input_embeddings()(text)], 1)
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0, LENGTH:]
    for hook in hooks:
        hook.remove()
    return logits


@every_family_and_kind
def test_scores_behind_a_prompt_are_the_resident_models(name: str, kind: str, tiny: Tiny) -> None:
    plain = resident(tiny(name))
    prompt = prompt_of(kind, plain)
    header = rows(1, 20, 21)[0]
    # Some share a beginning, so that it is computed once behind the prompt.
    queries = [
        Query((context if n % 2 else header + context)[:30], after)
        for n, (context, after) in enumerate(zip(rows(12, 2, 9), rows(12, 1, 4, seed=7), strict=True))
    ]
    known = ModelInfo(tiny(name), prompt)
    rates = slowllm.Rates()
    with slowllm.load(
        known,
        dtype="fp32",
        keep_resident=False,
        poison=True,
        job=job_of_queries(queries, known, rates),
        rates=rates,
    ) as lm:
        found = list(score_queries(lm, queries))
    for query, one in zip(queries, found, strict=True):
        scores = plain_logits(plain, prompt, query.ids).log_softmax(-1)
        first = len(query.context) - 1
        wanted = [float(scores[first + i, token]) for i, token in enumerate(query.continuation)]
        assert one.log_probs == pytest.approx(wanted, abs=CLOSE * 10)


@every_family_and_kind
def test_continuations_behind_a_prompt_are_the_resident_models(name: str, kind: str, tiny: Tiny) -> None:
    plain = resident(tiny(name))
    prompt = prompt_of(kind, plain)
    texts = [*rows(3, 3, 9), *rows(2, 5, 6, seed=7)]
    with slowllm.load(tiny(name), dtype="fp32", keep_resident=False, poison=True, prompt=prompt) as lm:
        lm.tokenizer = Letters()
        for penalty in (1.0, 1.7):
            how = Settings(max_new_tokens=4, repetition_penalty=penalty)
            ends = special_tokens(lm).eos
            found = generation.generate(lm, [Prompt(text, how) for text in texts])
            for text, (one,) in zip(texts, found, strict=True):
                assert one.ids == greedy(plain, prompt, text, penalty, ends)


class Letters:
    """Stands for a tokenizer, which tiny checkpoints do not have."""

    eos_token_id = None

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def greedy(
    model: Any, prompt: SoftPrompt, text: tuple[int, ...], penalty: float, ends: tuple[int, ...]
) -> tuple[int, ...]:
    """Four likeliest tokens after a text, repeated ones penalised as Keskar et al. (2019) do."""
    new: list[int] = []
    for _ in range(4):
        logits = plain_logits(model, prompt, (*text, *new))[-1]
        seen = torch.tensor(sorted({*text, *new}))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
        token = int(logits.argmax())
        if token in ends:
            break
        new.append(token)
    return tuple(new)


# Deep prompts by position


def in_pieces(model: Any, embedded: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Logits (B, T, V) of embeddings (B, T, H) that pass a model in calls of these widths, which continue a cache."""
    past, logits = None, []
    cache = "cache_params" if model.config.model_type == "mamba" else "past_key_values"
    for piece in embedded.split(widths, 1):
        output = model(inputs_embeds=piece, use_cache=True, **({} if past is None else {cache: past}))
        past = getattr(output, cache)
        logits.append(output.logits)
    return torch.cat(logits, 1)


def in_pieces_plainly(
    model: Any, embedded: torch.Tensor, widths: list[int], vectors: tuple[torch.Tensor | None, ...]
) -> torch.Tensor:
    """The same by the resident model, with vectors added by a count of the positions."""
    hooks, starts = [], [0] * len(vectors)

    def add(number: int, module: Any, args: Any, kwargs: Any) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        vector, start = vectors[number], starts[number]
        starts[number] += hidden.shape[1]
        if vector is not None:
            added = vector[..., start : starts[number], :]
            hidden[:, : added.shape[-2]] += added
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    for number, block in enumerate(blocks_of(model)):
        hooks.append(block.register_forward_pre_hook(functools.partial(add, number), with_kwargs=True))
    try:
        return in_pieces(model, embedded, widths)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "is_by_row"),
    crossed(
        ["bloom", "llama-3-scaled-rope", "gemma-3-sliding", "qwen3-next-hybrid", "mamba"],
        [False, True],
        quick=[
            ("bloom", False),
            ("bloom", True),
            ("gemma-3-sliding", False),
            ("qwen3-next-hybrid", True),
            ("mamba", False),
        ],
    ),
)
def test_a_deep_prompt_in_several_calls_is_added_by_position(name: str, is_by_row: bool, tiny: Tiny) -> None:
    plain = resident(tiny(name))
    prompt = prompt_of("deep", plain)
    if is_by_row:
        scale = torch.tensor([1.0, -0.5])[:, None, None]
        prompt = replace(prompt, vectors=tuple(None if v is None else v * scale for v in prompt.vectors))
    ids = torch.tensor([[*prompt.virtual_ids, *row] for row in rows(2, 6, 7)])
    # As one call; cut inside the prompt, twice; and behind it, where single tokens have the prompt's width and less.
    cuts = [[9], [2, 7], [1, 1, 7], [3, 3, 1, 1, 1], [3, 6]]
    if name == "mamba":  # transformers' mamba continues a state by single tokens only
        cuts = [[9], [2, 1, 1, 1, 1, 1, 1, 1], [4, 1, 1, 1, 1, 1]]
    with slowllm.load(tiny(name), dtype="fp32", keep_resident=False, poison=True) as lm, torch.no_grad():
        embedded = prompt.embed(lm.model, ids)
        whole = None
        for widths in cuts:
            with prompt.adding():
                found = in_pieces(lm.model, embedded, widths)
            assert torch.equal(found, in_pieces_plainly(plain, embedded, widths, prompt.vectors)), widths
            whole = found if whole is None else whole
            assert torch.allclose(found, whole, atol=CLOSE)
        assert not torch.allclose(in_pieces(lm.model, embedded, [9]), whole, atol=1e-3), "the vectors count"


def test_a_shared_header_and_its_continuations_get_the_vectors_once(tiny: Tiny) -> None:
    plain = resident(tiny("llama-2"))
    prompt = prompt_of("deep", plain)
    texts = [[*prompt.virtual_ids, *row] for row in rows(3, 6, 7)]
    with slowllm.load(tiny("llama-2"), dtype="fp32", keep_resident=False) as lm, torch.no_grad():
        header = prompt.embed(lm.model, torch.tensor([texts[0][:2]]))  # ends inside the prompt
        with prompt.adding():
            past = lm.model(inputs_embeds=header, use_cache=True).past_key_values
            for text in texts:
                rest = prompt.embed(lm.model, torch.tensor([text[2:]]))
                found = lm.model(inputs_embeds=rest, past_key_values=copy.deepcopy(past)).logits
                whole = prompt.embed(lm.model, torch.tensor([text]))
                wanted = in_pieces_plainly(plain, whole, [2, len(text) - 2], prompt.vectors)
                assert torch.equal(found, wanted[:, 2:])


def test_gradients_of_a_deep_prompt_in_two_calls_are_the_resident_models(tiny: Tiny) -> None:
    plain = resident(tiny("llama-2"))
    start = prompt_of("deep", plain)
    ids = torch.tensor([[*start.virtual_ids, *row] for row in rows(2, 6, 7)])
    gradients = []
    with slowllm.load(tiny("llama-2"), dtype="fp32", keep_resident=False, poison=True) as lm:
        for is_ours in (True, False):
            vectors = [None if v is None else v.clone().requires_grad_(True) for v in start.vectors]
            prompt = replace(start, vectors=tuple(vectors))
            embedded = prompt.embed(lm.model, ids)
            if is_ours:
                with prompt.adding():
                    logits = in_pieces(lm.model, embedded, [2, 7])
            else:
                logits = in_pieces_plainly(plain, embedded, [2, 7], prompt.vectors)
            logits.square().mean().backward()
            gradients.append([None if v is None else v.grad for v in vectors])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_vectors_for_other_rows_than_a_call_has_are_refused(tiny: Tiny) -> None:
    prompt = prompt_of("deep", resident(tiny("llama-2")))
    by_row = replace(
        prompt, vectors=tuple(None if v is None else torch.stack([v] * 3) for v in prompt.vectors)
    )
    ids = torch.tensor([[*prompt.virtual_ids, *rows(1, 4, 5)[0]]] * 2)
    with slowllm.load(tiny("llama-2"), dtype="fp32") as lm, torch.no_grad(), by_row.adding():
        embedded = by_row.embed(lm.model, ids)
        with pytest.raises(InputError, match="has vectors for 3 rows, but the model is called with 2; give"):
            lm.model(inputs_embeds=embedded)


def test_a_recurrent_state_of_unknown_length_is_refused(tiny: Tiny) -> None:
    prompt = prompt_of("deep", resident(tiny("mamba")))
    ids = torch.tensor([[*prompt.virtual_ids, 7, 8]])
    with slowllm.load(tiny("mamba"), dtype="fp32") as lm, torch.no_grad():
        embedded = prompt.embed(lm.model, ids)
        with prompt.adding():
            past = lm.model(inputs_embeds=embedded, use_cache=True).cache_params
        with (
            prompt.adding(),
            pytest.raises(InputError, match="does not tell which positions of a deep prompt"),
        ):
            lm.model(inputs_embeds=embedded, cache_params=past, use_cache=True)


def test_beams_behind_a_prefix_are_pefts(tiny: Tiny, tmp_path: Path) -> None:
    plain = resident(tiny("llama-3-scaled-rope"))
    prompt = prompt_of("prefix", plain)
    save_prompt(prompt, tmp_path / "p", "x", {})
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path / "p"))
    ids = torch.tensor([rows(1, 6, 7)[0]])
    wanted = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=5, do_sample=False
    )
    with slowllm.load(
        tiny("llama-3-scaled-rope"), dtype="fp32", keep_resident=False, prompt=tmp_path / "p"
    ) as lm:
        lm.tokenizer = Letters()
        how = Settings(max_new_tokens=5, num_beams=3)
        ((one,),) = generation.generate(lm, [Prompt(tuple(ids[0].tolist()), how)])
    assert list(one.ids) == [t for t in wanted[0, 6:].tolist() if t not in (0, 2)]


@pytest.mark.parametrize("kind", ["shallow", "prefix"])
@pytest.mark.parametrize(
    "name", ["bloom", "llama-3-scaled-rope", "mixtral", "falcon-multi-query", "falcon-new-decoder"]
)
def test_what_is_written_here_loads_in_plain_peft(name: str, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    plain = resident(tiny(name))
    prompt = prompt_of(kind, plain)
    text = rows(1, 7, 8)[0]
    wanted = plain_logits(plain, prompt, text)
    save_prompt(prompt, tmp_path, "some/model", {})
    adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    ids = torch.tensor([text])
    found = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    assert torch.allclose(found[-len(text) :], wanted, atol=CLOSE)
    again, about = load_prompt(tmp_path)
    assert again.digest() == prompt.digest()
    assert about["kind"] == kind


def test_a_deep_prompt_is_written_and_read_again(tmp_path: Path, tiny: Tiny) -> None:
    prompt = prompt_of("deep", resident(tiny("bloom")))
    save_prompt(prompt, tmp_path, "x", {"steps": 3})
    again, about = load_prompt(tmp_path)
    assert again.embeddings is not None
    assert torch.equal(again.embeddings, prompt.embeddings)
    assert all(
        torch.equal(a, torch.zeros_like(a) if b is None else b)
        for a, b in zip(again.vectors, prompt.vectors, strict=True)
    )
    assert about == {"kind": "deep", "num_tokens": LENGTH, "steps": 3}
    assert not (tmp_path / "adapter_config.json").exists(), "PEFT would leave the vectors out in silence"


@num_examples(60)
@given(st.sampled_from(FILES), st.integers(0, 400), st.integers(0, 255))
def test_a_damaged_folder_is_read_or_refused(name: str, place: int, byte: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_prompt(SoftPrompt("shallow", torch.ones(2, 8)), Path(folder), "x", {})
        path = Path(folder) / name
        if path.exists():
            data = bytearray(path.read_bytes())
            data[place % len(data)] = byte
            path.write_bytes(data)
        with contextlib.suppress(InputError):  # and nothing else
            found, _ = load_prompt(folder)
            assert found.num_tokens >= 1


def write(folder: Path, prompt: SoftPrompt, about: dict[str, Any] | None = None) -> Path:
    save_prompt(prompt, folder, "x", about or {})
    return folder


def test_prompts_of_other_models_are_refused(tmp_path: Path) -> None:
    width = 64
    cases = [
        (SoftPrompt("shallow", torch.ones(2, 48)), "a model of width 48, but this one has"),
        (
            SoftPrompt("deep", torch.ones(2, width), tuple(torch.ones(2, width) for _ in range(9))),
            "width|9 blocks",
        ),
        (SoftPrompt("prefix", pairs=tuple(torch.ones(2, 4, 3, 5) for _ in range(4))), "blocks|heads"),
    ]
    for number, (prompt, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            ModelInfo(TINY_BLOOM, write(tmp_path / str(number), prompt))
    own = ModelInfo(TINY_BLOOM).config.hidden_size
    other = write(tmp_path / "other", SoftPrompt("shallow", torch.ones(2, own)), {"fingerprint": "0" * 64})
    with pytest.raises(InputError, match="was made for another model, whose weights"):
        slowllm.load(TINY_BLOOM, prompt=other)


def test_a_prefix_is_refused_where_it_would_be_ignored(tiny: Callable[..., Path], tmp_path: Path) -> None:
    prefix = write(tmp_path, SoftPrompt("prefix", pairs=tuple(torch.ones(2, 4, 3, 16) for _ in range(3))))
    with pytest.raises(InputError, match="is a prefix of keys and values, but this model takes none"):
        ModelInfo(tiny("openai-gpt"), prefix)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no soft prompt"),
        ({"adapter_config.json": "{"}, "cannot be read"),
        ({"adapter_config.json": "[]"}, "is no JSON object"),
        ({"adapter_config.json": json.dumps({"peft_type": "LORA"})}, "an adapter of PEFT's type LORA"),
        (
            {"adapter_config.json": json.dumps({"peft_type": "PROMPT_TUNING"})},
            "there is no adapter_model.safetensors",
        ),
    ],
)
def test_folders_without_a_prompt_are_refused(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_prompt(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        load_prompt(tmp_path / "nowhere")
    with pytest.raises(InputError, match="the name of the soft prompt is empty"):
        load_prompt("")


def test_a_prompt_with_numbers_that_are_none_is_refused(tmp_path: Path) -> None:
    prompt = SoftPrompt("shallow", torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match="it has numbers that are NaN or infinite"):
        load_prompt(write(tmp_path / "a", prompt))
    good = write(tmp_path / "b", SoftPrompt("prefix", pairs=(torch.ones(2, 2, 3, 4),)))
    config = json.loads((good / "adapter_config.json").read_text())
    (good / "adapter_config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    with pytest.raises(InputError, match="is no soft prompt that can be read"):
        load_prompt(good)


def test_values_of_pefts_config_that_are_not_used_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, SoftPrompt("shallow", torch.ones(2, 8)))
    load_prompt(folder)
    assert not caplog.text
    config = json.loads((folder / "adapter_config.json").read_text())
    own = {"num_transformer_submodules": 2, "modules_to_save": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **own}))
    load_prompt(folder)
    assert 'does not know: modules_to_save=["lm_head"], num_transformer_submodules=2' in caplog.text


def test_a_prompt_takes_room_from_the_text() -> None:
    from slowllm.inference.text import max_line_tokens

    plain = ModelInfo(TINY_BLOOM)
    prompt = SoftPrompt("shallow", torch.zeros(7, plain.config.hidden_size))
    assert max_line_tokens(ModelInfo(TINY_BLOOM, prompt)) == max_line_tokens(plain) - 7
