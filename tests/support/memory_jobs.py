"""Models and jobs whose memory is measured, each job a command line in a process and a cgroup of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import machine
from slowllm.options import parse_bytes

LARGE_VOCABULARY = 250_000
_SIDES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 4096,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {**_SIDES, "vocab_size": 8192}),
    "large-vocabulary": ("llama", {**_SIDES, "vocab_size": LARGE_VOCABULARY}),
    "experts": ("mixtral", {**_SIDES, "vocab_size": 8192, "num_local_experts": 4}),
    # Attention whose scores are written out, and many riders that wait for experts of which each is read by itself.
    "sinks": (
        "gpt_oss",
        {**_SIDES, "vocab_size": 8192, "num_attention_heads": 16, "head_dim": 32, "num_local_experts": 32, "num_experts_per_tok": 4},
    ),
    "mla": (
        "deepseek_v3",
        {**_SIDES, "vocab_size": 8192, "num_key_value_heads": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 256, "n_group": 1, "topk_group": 1, "kv_lora_rank": 64, "q_lora_rank": 64,
         "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 1},
    ),
}  # fmt: skip
_MANY, _FEW = ("generate", "--prompts", "prompts.txt"), ("generate", "--prompts", "few.txt")
JOBS: dict[str, tuple[str, ...]] = {
    "greedy": (*_MANY, "--max-new-tokens", "2"),
    "sampled": (*_FEW, "--max-new-tokens", "3", "--sample", "--num-sequences", "8", "--top-p", "0.9"),
    "penalised": (*_MANY, "--max-new-tokens", "2", "--repetition-penalty", "1.2"),
    "beams": (*_FEW, "--max-new-tokens", "3", "--beams", "4"),
    "stop": (*_FEW, "--max-new-tokens", "3", "--stop", "zz", "--stop", "the end of it"),
    "log-probs": (*_FEW, "--max-new-tokens", "8", "--log-probs", "2"),
    "batch": ("batch", "batch.jsonl", "--out", "batch.out", "--overwrite"),
    "forward": ("forward", "lines.txt"),
    "score": ("score", "pairs.jsonl"),
    "tune": ("tune", "data.jsonl", "--out", "prompt", "--steps", "2", "--overwrite"),
}  # fmt: skip


def make_model(name: str, folder: Path) -> None:
    """Write a checkpoint of random weights, with a tokenizer as large as its vocabulary."""
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **fields)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    for number in range(len(vocabulary), int(fields["vocab_size"])):
        vocabulary[f"w{number:x}the"] = number
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


def write_inputs(folder: Path) -> None:
    """Write what the jobs read: many short prompts and lines, a few long ones, pairs, requests and examples."""
    prompts = [f"p{number}" for number in range(300)]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    (folder / "few.txt").write_text("\n".join(prompts[:16]))
    (folder / "lines.txt").write_text("\n".join([*prompts, *("long " * 100 for _ in range(8))]))
    rows = [{"context": prompt, "continuation": " yes"} for prompt in prompts]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    body = {"model": "m", "max_tokens": 3, "n": 4, "temperature": 1.0, "seed": 1}
    requests = [
        {"custom_id": prompt, "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": prompt}}
        for prompt in prompts[:16]
    ]
    (folder / "batch.jsonl").write_text("\n".join(map(json.dumps, requests)))
    examples = [{"prompt": f"{prompt} is", "answer": " good."} for prompt in prompts[:40]]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, examples)))


@dataclass(frozen=True)
class Measured:
    """How a job ended in a cgroup of its budget.

    Attributes:
        returncode: of its process; negative for a signal.
        peak_bytes: its largest resident set.
        stderr: what it said.
    """

    returncode: int
    peak_bytes: int
    stderr: str


def run_in_budget(model: Path, job: Sequence[str], folder: Path, budget: int) -> Measured | None:
    """Run a job with `--ram` in a memory cgroup of exactly that size; return None where none can be made."""
    cgroup = machine.memory_cgroup(f"slowllm-test-{os.getpid()}", budget)
    if cgroup is None:
        return None
    command = [sys.executable, "-m", "slowllm", *job, "--model", str(model), "--ram", str(budget)]
    peak = folder / "peak"
    program = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[2:]); "
        "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); "
        "sys.exit(done.returncode if done.returncode >= 0 else 100 - done.returncode)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(peak), *command], cwd=folder, text=True, check=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=lambda: machine.enter_cgroup(cgroup),
        )  # fmt: skip
    finally:
        machine.remove_cgroup(cgroup)
    peak_bytes = int(peak.read_text()) * 1024 if peak.exists() else 0
    return Measured(
        100 - done.returncode if done.returncode > 100 else done.returncode, peak_bytes, done.stderr
    )


def smallest_budget(model: Path, job: Sequence[str], folder: Path) -> int:
    """Return the smallest budget that a job is accepted with, as its refusal says."""
    command = [sys.executable, "-m", "slowllm", *job, "--model", str(model), "--ram", "1MiB"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stderr
    found = re.search(r"smallest that would do is ([0-9.]+[KMG]iB)", said)
    if found is None:
        raise RuntimeError(said)
    return parse_bytes(found[1])
