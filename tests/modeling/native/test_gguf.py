"""GGUF files are read as they are, and compute what transformers computes with them dequantised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor, load_gguf_checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import slowllm
from slowllm.modeling.layout import cut_head
from slowllm.modeling.materialize import head_rows
from slowllm.modeling.parts import Part
from slowllm.modeling.skeleton import read_config
from slowllm.runtime.block_identity import block_hashes, ends_hash
from slowllm.runtime.load import open_model
from slowllm.runtime.streamed_lm import StreamedLM
from slowllm.storage.checkpoint import Checkpoint
from slowllm.storage.gguf import BLOCKS
from slowllm.storage.spans import CodedArray, Coding, Placement, Run, Span
from tests.support.cases import crossed, quick_and_long
from tests.support.gguf_checkpoints import (
    FAMILIES,
    HEADS,
    HIDDEN,
    KV_HEADS,
    VOCAB,
    write_gguf,
)
from tests.support.local_swarm import LocalSwarm

IDS = torch.arange(5, 25)[None]
# Those whose files transformers loads by itself: of the others its table lacks a width or a cap.
LOADED_BY_TRANSFORMERS = ("llama", "qwen2", "gemma3", "bloom", "falcon")


def mixed(name: str) -> str:
    """Return types as files of the kind Q4_K_M have them."""
    if name in ("token_embd.weight", "output.weight"):
        return "q6_k"
    return {"attn_v": "q6_k", "attn_k": "q8_0", "ffn_down": "q5_k"}.get(name.split(".")[-2], "q4_k")


def plain_config(path: Path) -> Any:
    config = read_config(path)
    del config.quantization_config
    return config


def reference(path: Path, family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model dequantised by transformers, or where it cannot load the file by the package gguf."""
    if family in LOADED_BY_TRANSFORMERS:
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, experts_implementation="eager"
        )
    model = AutoModelForCausalLM.from_config(plain_config(path), dtype=dtype).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    if family == "mixtral":
        tensors = mixtral_tensors(path)
    elif family == "falcon-40b":
        tensors = falcon_tensors(path)
    else:
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    found = model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def dequantised_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        tensor.name: torch.from_numpy(
            np.array(dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type)))
        )
        for tensor in GGUFReader(path).tensors
    }


def falcon_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Undo what llama.cpp does to a Falcon with several heads of keys: it joins all queries, all keys, and all values."""
    stored = dequantised_tensors(path)
    names = {
        "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn", "attn_output": "self_attention.dense",
        "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
    }  # fmt: skip
    found = {
        "transformer.word_embeddings.weight": stored["token_embd.weight"],
        "transformer.ln_f.weight": stored["output_norm.weight"], "transformer.ln_f.bias": stored["output_norm.bias"],
    }  # fmt: skip
    for number in range(2):
        ours, theirs = f"transformer.h.{number}", f"blk.{number}"
        joined = stored[f"{theirs}.attn_qkv.weight"].split([HIDDEN, KV_HEADS * 64, KV_HEADS * 64])
        by_head = [part.reshape(KV_HEADS, -1, HIDDEN) for part in joined]
        found[f"{ours}.self_attention.query_key_value.weight"] = torch.cat(by_head, 1).reshape(-1, HIDDEN)
        for gguf_name, name in names.items():
            found |= {
                f"{ours}.{name}.{kind}": stored[f"{theirs}.{gguf_name}.{kind}"]
                for kind in ("weight", "bias")
                if f"{theirs}.{gguf_name}.{kind}" in stored
            }
    return found


def mixtral_tensors(path: Path) -> dict[str, torch.Tensor]:
    stored = dequantised_tensors(path)
    names = {
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate",
    }  # fmt: skip
    found = {
        "model.embed_tokens.weight": stored["token_embd.weight"], "model.norm.weight": stored["output_norm.weight"],
        "lm_head.weight": stored["output.weight"],
    }  # fmt: skip
    for number in range(2):
        ours, theirs = f"model.layers.{number}", f"blk.{number}"
        for gguf_name, name in names.items():
            found[f"{ours}.{name}.weight"] = stored[f"{theirs}.{gguf_name}.weight"]
        for letter, heads in (("q", HEADS), ("k", KV_HEADS)):
            weight = stored[f"{theirs}.attn_{letter}.weight"].numpy()
            back = LlamaTensorProcessor()._reverse_permute_weights(weight, heads, heads)
            found[f"{ours}.self_attn.{letter}_proj.weight"] = torch.from_numpy(back)
        gate, up = (stored[f"{theirs}.ffn_{name}_exps.weight"] for name in ("gate", "up"))
        found[f"{ours}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{ours}.mlp.experts.down_proj"] = stored[f"{theirs}.ffn_down_exps.weight"]
    return found


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def assert_same(path: Path, wanted: torch.Tensor, **options: Any) -> None:
    dtype = str(wanted.dtype).removeprefix("torch.")
    with slowllm.load(path, dtype=dtype, **options) as lm:
        assert torch.equal(logits_of(lm.model), wanted)


@pytest.mark.parametrize(
    ("family", "name"),
    crossed(
        FAMILIES,
        ["float32", "bfloat16"],
        quick=[
            ("llama", "float32"), ("llama", "bfloat16"), ("qwen2", "bfloat16"), ("qwen3moe", "bfloat16"),
            ("gemma3", "bfloat16"), ("bloom", "bfloat16"), ("falcon-40b", "float32"),
        ],
    ),
)  # fmt: skip
def test_logits_are_those_of_the_dequantised_model(family: str, name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    # The head of these is their embedding.
    path = write_gguf(
        tmp_path / "m.gguf", family, mixed, has_head=not family.startswith("gemma") and family != "falcon-40b"
    )
    wanted = logits_of(reference(path, family, dtype))
    assert_same(path, wanted, resident=True)
    assert_same(path, wanted, resident=False)


@pytest.mark.parametrize(
    "kind",
    quick_and_long(
        [*BLOCKS, "f32", "f16", "bf16"],
        ["q4_0", "q8_0", "q3_k", "q4_k", "q6_k", "mxfp4", "iq2_xs", "iq1_m", "f16"],
    ),
)
def test_every_type_computes_the_logits_of_the_dequantised_model(kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", kind, has_head=kind != "q8_0")
    dtype = torch.float32 if kind == "q3_k" else torch.bfloat16
    assert_same(path, logits_of(reference(path, "llama", dtype)), resident=False)


@pytest.mark.parametrize("family", quick_and_long(["llama", "gemma2", "mixtral", "bloom"], ["gemma2"]))
def test_stops_may_be_leaves(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that are stored plus one are kept then, and decoded once."""
    path = write_gguf(tmp_path / "m.gguf", family, mixed, has_head=family != "gemma2")
    monkeypatch.setattr("slowllm.modeling.layout.MIN_LEAF_BYTES", 1 << 14)
    wanted = logits_of(reference(path, family, torch.bfloat16))
    with slowllm.load(path, dtype="bfloat16", granularity="leaves", resident=False) as lm:
        assert len(lm.layout.modules) > 2
        assert torch.equal(logits_of(lm.model), wanted)


@pytest.mark.parametrize(
    ("family", "kind"),
    crossed(
        ["qwen2moe", "qwen3moe", "mixtral"],
        ["f32", "mxfp4"],
        quick=[("mixtral", "f32"), ("qwen2moe", "mxfp4")],
    ),
)
def test_experts_of_other_types_are_taken_apart(family: str, kind: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", family, kind)
    assert_same(path, logits_of(reference(path, family, torch.bfloat16)), resident=False)


@pytest.mark.parametrize("family", quick_and_long(["llama", "gemma2", "bloom"], ["gemma2"]))
def test_a_head_that_is_the_embedding_is_cut_into_chunks_of_rows(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", family, lambda name: "q8_0" if "embd" in name else "q2_k", has_head=False
    )
    model = reference(path, family, torch.float32)
    wanted = logits_of(model)
    monkeypatch.setattr("slowllm.modeling.layout.MIN_CHUNK_BYTES", 128 * 272)
    if family == "bloom":  # whose blocks have a larger matrix than the head is
        monkeypatch.setattr("slowllm.modeling.layout.ring_bytes_of", lambda placement: 1)
    with slowllm.load(path, dtype="float32", resident=False) as lm:
        chunks = lm.layout.chunks
        assert len(chunks) > 1
        # A product of fewer columns may round otherwise.
        assert torch.allclose(logits_of(lm.model), wanted, atol=1e-5)
        read_rows = head_rows(lm.checkpoint, chunks)
        assert read_rows is not None
        ids = torch.tensor([VOCAB - 1, 0, 200, 200])
        assert torch.equal(read_rows(ids), model.get_output_embeddings().weight[ids])


def test_a_head_that_is_not_coded_row_by_row_stays_whole() -> None:
    parts = (CodedArray("scales", "F32", (2, 1), 0), CodedArray("codes", "U8", (200, 64), 8))
    coding = Coding("fp8", parts, (128, 64))
    span = Span("head", Path("a"), "U8", (12808,), 0, 12808)
    whole = Placement("head", (200, 64), torch.bfloat16, (Run(span, 0, 0, 12808),), coding)
    assert cut_head(whole, 1) == [replace(whole, name="head[0:]")]


def test_transformers_makes_the_same_config(tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4}
    for family in LOADED_BY_TRANSFORMERS:
        path = write_gguf(tmp_path / family / "m.gguf", family, "f16", metadata=tokens)
        wanted = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
        ours = plain_config(path).to_dict()
        differ = {key for key in ours.keys() | wanted.keys() if ours.get(key) != wanted.get(key)}
        # What transformers' table lacks, and a path.
        assert differ <= {"_name_or_path", "attn_logit_softcapping", "final_logit_softcapping", "head_dim"}, (
            differ
        )


def test_tokens_and_gradients_are_those_of_the_dequantised_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", mixed)
    model = AutoModelForCausalLM.from_config(plain_config(path), dtype=torch.float32)
    model.load_state_dict(reference(path, "llama", torch.float32).state_dict())
    model.save_pretrained(tmp_path / "plain")
    found = []
    for one in (path, tmp_path / "plain"):
        with slowllm.load(one, dtype="float32", resident=False) as lm:
            embedded = lm.model.get_input_embeddings()(IDS).detach().requires_grad_()
            loss = lm.model(inputs_embeds=embedded, labels=IDS).loss
            loss.backward()
            tokens = lm.model.generate(IDS, max_new_tokens=5, do_sample=False)
            found.append((loss.detach(), embedded.grad, tokens))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_and_a_file_are_the_same_model_and_nothing_is_written(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", mixed)
    with slowllm.load(path) as one, slowllm.load(tmp_path) as other:
        assert one.fingerprint() == other.fingerprint()
        assert (one.name, other.name) == ("m.gguf", tmp_path.name)
    assert list(tmp_path.iterdir()) == [path]


def test_a_set_of_files_computes_what_one_file_does(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", mixed)
    files = [tmp_path / "set" / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, file in enumerate(files):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 21}
        write_gguf(file, "llama", mixed, metadata=split, part=(number, 2))
    wanted = logits_of(reference(path, "llama", torch.float32))
    for named in (tmp_path / "set", files[0], files[1]):
        assert_same(named, wanted)


def test_a_part_of_a_model_is_opened_and_has_the_hashes_of_the_whole(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bloom", mixed)
    other = write_gguf(tmp_path / "other.gguf", "bloom", mixed, seed=1)
    with open_model(StreamedLM, path, part=Part.span(1, 2)) as lm, Checkpoint.open(path) as whole:
        assert block_hashes(lm, [1])[1] == block_hashes(whole, [0, 1])[1]
    with Checkpoint.open(other) as changed:
        assert block_hashes(changed, [1]) != block_hashes(whole, [1])
        assert ends_hash(changed) != ends_hash(whole)


def test_a_swarm_of_parts_computes_what_the_whole_does(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", mixed)
    wanted = logits_of(reference(path, "llama", torch.float32))
    with LocalSwarm(path) as swarm:
        assert torch.equal(logits_of(swarm.lm.model), wanted)


def test_factors_of_rotary_tables_are_those_of_llama_3(tmp_path: Path) -> None:
    """llama.cpp stores by what each frequency is divided."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "llama", hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=scaling
    )
    frequencies = LlamaRotaryEmbedding(config).inv_freq
    plain = 1 / 10000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = (plain / frequencies).numpy()
    path = write_gguf(tmp_path / "m.gguf", "llama", "f32", extra={"rope_freqs.weight": factors})
    bare = write_gguf(tmp_path / "bare" / "m.gguf", "llama", "f32")
    with slowllm.load(path, dtype="float32") as lm:
        ours = logits_of(lm.model)
    model = reference(bare, "llama", torch.float32)
    assert not torch.allclose(ours, logits_of(model), atol=1e-3)
    model.model.rotary_emb.inv_freq = frequencies
    assert torch.allclose(ours, logits_of(model), atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        ({"type": "none"}, {"rope_type": "default"}),
    ],
)
def test_scaled_rotary_tables_are_read(
    scaling: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    keys = {f"qwen3.rope.scaling.{key}": value for key, value in scaling.items()}
    path = write_gguf(tmp_path / "m.gguf", "qwen3", "f16", metadata=keys)
    assert wanted.items() <= read_config(path).rope_parameters.items()


def test_gemma_3_scales_the_table_of_full_attention_only(tmp_path: Path) -> None:
    keys = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    path = write_gguf(tmp_path / "m.gguf", "gemma3", "f16", metadata=keys)
    rope = read_config(path).rope_parameters
    assert (rope["full_attention"]["rope_type"], rope["sliding_attention"]["rope_type"]) == (
        "linear",
        "default",
    )
    assert (rope["full_attention"]["rope_theta"], rope["sliding_attention"]["rope_theta"]) == (
        10000.0,
        10000.0,
    )


def test_a_lookup_decodes_only_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", mixed)
    wanted = reference(path, "llama", torch.float32).get_input_embeddings().weight
    with slowllm.load(path, dtype="float32") as lm:
        weight = lm.model.get_input_embeddings().weight
        ids = torch.tensor([[7, 0], [VOCAB - 1, 7]])
        for ours in (
            torch.nn.functional.embedding(ids, weight),
            weight[ids],
            weight[ids - VOCAB],
            weight.index_select(0, ids.view(-1)).view(2, 2, -1),
        ):
            assert torch.equal(ours, wanted[ids])
        assert torch.equal(weight[3:5] * 1.0, wanted[3:5])
        with pytest.raises(IndexError, match=f"a row is picked that is not among {VOCAB}"):
            torch.nn.functional.embedding(torch.tensor([VOCAB]), weight)
