"""Every architecture of transformers' causal language models, shrunk to a toy by one rule: streamed against resident.

    python -m tests.support.census [ARCHITECTURE ...]

Without names all architectures are judged and docs/families.md is written; with names their verdicts are printed.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tests.support.same_rounding  # noqa: F401  (before torch)

# isort: split
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import slowllm
from slowllm.errors import SlowLLMError, first_line
from tests.support.paths import ROOT

ARCHITECTURES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TABLE = ROOT / "docs" / "families.md"
# Towers of images and sounds have another number of blocks than the text model, as real ones have.
NUM_BLOCKS, NUM_TOWER_BLOCKS = 3, 2
NUM_HEADS, VOCAB = 4, 307
# What is larger was not shrunk.
MAX_PARAMETERS = 8_000_000

Rule = Callable[[int, Mapping[str, Any]], int]


def to(size: int) -> Rule:
    return lambda value, config: size


def at_most(limit: int) -> Rule:
    return lambda value, config: min(value, limit)


def key_value_heads(value: int, config: Mapping[str, Any]) -> int:
    """As many as there are heads where the default says so, else fewer."""
    has_all = value == config.get("num_attention_heads") or config.get("kv_lora_rank")
    return NUM_HEADS if has_all else min(value, 2)


def head_width(value: int, config: Mapping[str, Any]) -> int:
    """Where keys have a rotated part of their own, `head_dim` is often the width of that."""
    return 8 if value == config.get("qk_rope_head_dim") else 16


BLOCKS = re.compile(
    r"(num_hidden_|decoder_|encoder_|num_|num_decoder_|num_encoder_|n_)layers?|num_blocks|depth"
)
# What becomes of an integer above 0, by its name in the config: the first pattern that matches the whole name counts.
RULES: list[tuple[str, Rule]] = [
    (r".*vocab(_size)?(_per_layer_input|_base)?|num_embeddings", at_most(VOCAB)),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", to(8)),
    (r"(num_key_value|swa_num_key_value|num_kv|kv_n)_heads|num_query_groups", key_value_heads),
    (r".*_heads|n_head|heads_per_ngram", at_most(NUM_HEADS)),
    (r"qk_rope_head_dim|rotary_dim", to(8)),
    (r"qk_head_dim", to(24)),
    (r"head_dim", head_width),
    (r".*head_?dim|d_head|dim_head|attention_head_size|kv_channels|mamba_d_head", to(16)),
    (r".*_(lora_)?rank", at_most(16)),
    (r"(mamba_d_|ssm_)?state(_size)?", to(16)),
    (r"moe_.*intermediate_size|.*expert.*(intermediate|hidden)_size", to(32)),
    (r"(.*_)?(intermediate|ffn|ff|feed_forward|ffn_hidden)_?(size|dim)(_mlp)?|dff|dim_ff|mlp_dim", to(96)),
    (r"hidden_size_per_layer_input", to(16)),
    (r".*hidden_size.*|d_model|n_embd|(.*_)?emb(ed(ding)?)?_(size|dim)|word_embed_proj_dim|lru_width|adapter_(in_dim|out_dim|input_size)", to(64)),
    (r"(num|n_routed|num_local|moe_num|zero)_expert(s|_num)", to(8)),
    (r"n_groups?|num_expert_group|mamba_n_?groups|o_groups", at_most(2)),
    (r"topk_group", to(1)),
    (r"num_experts_per_tok(en)?|moe_(top_?)?k", at_most(2)),
    (r"first_k_dense_replace|num_dense_layers", at_most(1)),
    (r"index_topk.*", at_most(8)),
    (r".*(sliding_window|window_size|chunk_size)", at_most(8)),
    (r"(original_)?max_(position_embeddings|seq_len|length)|n_positions|n_ctx|max_source_positions", at_most(128)),
    (r".*image_size|crop_size", at_most(64)),
    (r".*channels?", at_most(64)),
]  # fmt: skip
# What the rule does not suffice for, by architecture.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "head_dim": 32,
        "per_layer_config": {
            "01": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 24}
        },
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 1, "altup_num_inputs": 3},
    "gemma4_text": {"per_layer_config": {"01": {"head_dim": 32}, "02": {"head_dim": 32}}},
    "gemma4_unified_text": {"per_layer_config": {"01": {"head_dim": 32}, "02": {"head_dim": 32}}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16], "is_decoder": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "hybrid_layer_ids": [1, 2],
        "attention_hidden_size": 128, "attention_head_dim": 32,
    },
}  # fmt: skip

# Of these no toy can be made that says anything.
NO_TOYS = {
    "gemma3n": "its towers need the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "it reads the keys and values of the model for which it drafts",
    "gemma4_unified_assistant": "it reads the keys and values of the model for which it drafts",
    "musicgen": "transformers' class takes the config of its decoder only, which has no architecture of its own",
    "musicgen_melody": "transformers' class takes the config of its decoder only, which has no architecture of its own",
}
CORRECTION = r"correction_bias|expert_bias|balancing_biases"
Kind = Literal["equal", "refused", "not shrinkable", "different"]


class NotShrinkableError(Exception):
    """The rule makes no toy of this architecture, or transformers itself cannot compute with the toy."""


@dataclass(frozen=True)
class Verdict:
    """What became of an architecture, and why where it is not equal."""

    kind: Kind
    reason: str = ""


def shrink(config: Mapping[str, Any], *, is_tower: bool = False) -> dict[str, Any]:
    """Return what the rule changes of a config, given as a table."""
    num_blocks = NUM_TOWER_BLOCKS if is_tower else NUM_BLOCKS
    num_before = {value for name, value in config.items() if BLOCKS.fullmatch(name)}
    changed: dict[str, Any] = {}
    tokens = iter(range(3, VOCAB))
    for name, value in config.items():
        if name == "per_layer_config":  # of blocks that differ from the others: one of them
            changed[name] = {"01": shrink(next(iter(value.values())))} if value else {}
        elif name.endswith("_config") and isinstance(value, dict):
            changed[name] = shrink(value, is_tower=name not in ("text_config", "attn_config", "ffn_config"))
        elif re.fullmatch(r".*_token_(id|index)", name) and value is not None:
            known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            changed[name] = known[name] if name in known else next(tokens)
        elif isinstance(value, list | tuple) and len(value) in num_before:  # one entry a block
            entries = list({repr(entry): entry for entry in value}.values())
            changed[name] = [_small(name, entries[i % len(entries)], config) for i in range(num_blocks)]
        elif BLOCKS.fullmatch(name) and isinstance(value, int):
            changed[name] = num_blocks
        else:
            changed[name] = _small(name, value, config)
    return {name: value for name, value in changed.items() if value != config[name]}


def _small(name: str, value: Any, config: Mapping[str, Any]) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return rule(value, config)
    return value


def toy_config(architecture: str) -> PreTrainedConfig:
    """Return the default config of an architecture, shrunk."""
    kind = CONFIG_MAPPING[architecture]
    try:
        table = shrink(kind().to_dict()) | EXCEPTIONS.get(architecture, {})
        if "text_config" in table:
            table["text_config"] |= EXCEPTIONS.get(f"{architecture}_text", {})
        config = kind(**table)
        if getattr(config, "is_decoder", None) is False:  # BERT and its like, made to look back only
            config.is_decoder = True
        return config
    except Exception as error:
        raise NotShrinkableError(f"its config is refused ({first_line(error)})") from error


def make_toy(architecture: str, change: Callable[[PreTrainedConfig], None] | None = None) -> PreTrainedModel:
    """Return a random toy model of an architecture, whose config something may change.

    Raises:
        NotShrinkableError: there is none.
    """
    if architecture in NO_TOYS:
        raise NotShrinkableError(NO_TOYS[architecture])
    config = toy_config(architecture)
    if change is not None:
        change(config)
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
    except Exception as error:
        raise NotShrinkableError(f"its model cannot be made ({first_line(error)})") from error
    if size > MAX_PARAMETERS:
        raise NotShrinkableError(f"{size / 1e6:.0f} million parameters are left")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Norms and biases begin as ones and zeros, which would hide a mix-up; so do corrections of a router.
        tensors = [tensor for tensor in model.parameters() if tensor.dim() == 1]
        tensors += [tensor for name, tensor in model.named_buffers() if re.search(CORRECTION, name)]
        for tensor in tensors:
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def save_toy(architecture: str, folder: Path) -> None:
    """Save a random toy model of an architecture in shards of at most 60 kB.

    Raises:
        NotShrinkableError: there is none.
    """
    model = make_toy(architecture)
    model.save_pretrained(folder, max_shard_size="60KB")
    config = toy_config(architecture)
    if model.config.model_type != config.model_type:  # the text model of a larger one
        config.save_pretrained(folder)


IDS = torch.randint(5, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def outputs(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return a model's logits, and the tokens that it continues with."""
    with torch.no_grad():
        return model(IDS).logits, model.generate(IDS, **GREEDY)


def compute_alike(plain: PreTrainedModel, lm: slowllm.StreamedLM) -> None:
    """Let a resident model compute as a streamed one does where torch and MKL would round differently.

    MKL rounds by where a matrix begins, see `same_rounding`: each weight is moved to where the streamed one begins,
    within 64 bytes. And torch multiplies a batch that is not contiguous row by row; a streamed head makes it contiguous.
    """
    begins: dict[str, int] = {}
    for stop in range(lm.num_stops):
        lm._carousel.visit(
            stop, "up", lambda weights: begins.update({n: w.data_ptr() for n, w in weights.items()})
        )
    for name, parameter in plain.named_parameters():
        buffer = torch.empty(parameter.nbytes + 128, dtype=torch.uint8)
        start = (begins.get(name, 0) - buffer.data_ptr()) % 64
        moved = buffer[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = moved.copy_(parameter.data)
    plain.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def judge(architecture: str, folder: Path) -> Verdict:
    """Save a toy in an empty folder, and compare the streamed model with the resident one.

    An error that is no `SlowLLMError` is raised.
    """
    try:
        save_toy(architecture, folder)
        try:
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            wanted = outputs(plain.eval().requires_grad_(False))
        except Exception as error:
            raise NotShrinkableError(f"transformers cannot run the toy ({first_line(error)})") from error
        if not wanted[0].isfinite().all():
            raise NotShrinkableError("transformers' own logits are not finite")
    except NotShrinkableError as error:
        return Verdict("not shrinkable", str(error))
    try:
        with slowllm.load(folder, dtype="fp32", keep_resident=False, poison=True) as lm:
            found = outputs(lm.model)
            if not torch.equal(found[0], wanted[0]):
                compute_alike(plain, lm)
                wanted = outputs(plain)
    except SlowLLMError as error:
        return Verdict("refused", str(error).replace(str(folder), "the folder"))
    if not torch.equal(found[0], wanted[0]):
        distance = (found[0] - wanted[0]).abs().max()
        return Verdict("different", f"logits by up to {distance:.2g} of {wanted[0].abs().max():.2g}")
    return Verdict("equal") if torch.equal(found[1], wanted[1]) else Verdict("different", "greedy tokens")


HEADINGS: dict[Kind, str] = {
    "equal": "Equal: logits and greedy tokens are those of the resident model, bit for bit",
    "refused": "Refused on loading, with this sentence",
    "not shrinkable": "Not tried: no toy was made, for this reason",
}


def page(verdicts: Mapping[str, Verdict]) -> str:
    """Return docs/families.md."""
    text = TABLE.read_text() if TABLE.exists() else ""
    others = [
        part for part in text.split("\n## ")[1:] if not part.startswith(tuple(HEADINGS.values()))
    ]  # what other censuses wrote stays
    parts = [INTRODUCTION.format(version=transformers.__version__, number=len(verdicts))]
    for kind, heading in HEADINGS.items():
        rows = {name: verdict for name, verdict in sorted(verdicts.items()) if verdict.kind == kind}
        parts.append(f"## {heading} ({len(rows)})\n\n| architecture | class | |\n| --- | --- | --- |\n")
        parts += [
            f"| {name} | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]} | {verdict.reason} |\n"
            for name, verdict in rows.items()
        ]
        parts.append("\n")
    parts += [f"## {part.rstrip()}\n\n" for part in others]
    return "".join(parts).rstrip() + "\n"


INTRODUCTION = """# Families

There is no file per family: slowllm streams transformers' own models. This page lists the {number} architectures for
which transformers {version} has a causal language model. Each was shrunk to a random toy of three blocks, saved in
shards of 60 kB, and loaded with every block streamed, in fp32. Two things that round differently in a resident model,
too, are made alike on both sides: where in memory a weight begins, to which MKL's products are sensitive, and whether
the hidden states that the head multiplies are contiguous. The page is written by `python -m tests.support.census`;
`make test` checks a sample of it, `make test-long` all.

"""


def rows(text: str) -> dict[str, Verdict]:
    """Return the verdicts that a page lists."""
    found: dict[str, Verdict] = {}
    for part in text.split("\n## ")[1:]:
        kind = next((kind for kind, heading in HEADINGS.items() if part.startswith(heading)), None)
        if kind is None:  # a section of another census
            continue
        listed = re.findall(r"^\| ([\w-]+) \| \w+ \| (.*) \|$", part, re.MULTILINE)
        found |= {name: Verdict(kind, reason) for name, reason in listed}
    return found


def main(architectures: list[str]) -> None:
    """Judge some architectures and print their verdicts, or all and write the page."""
    verdicts = {}
    for name in architectures or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdicts[name] = judge(name, Path(folder))
                print(f"{name}: {verdicts[name].kind} {verdicts[name].reason}", flush=True)
            except Exception as error:
                print(f"{name}: crashed, {error!r}", flush=True)
    if not architectures:
        TABLE.write_text(page(verdicts))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main(sys.argv[1:])
