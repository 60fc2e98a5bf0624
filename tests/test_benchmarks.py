"""Each benchmark runs on a tiny model, so that it does not rot; what it measures there means nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import slowllm
from benchmarks import make_checkpoint
from tests.conftest import ROOT


def run(module: str, *arguments: str) -> dict[str, object]:
    """Run a benchmark and return the JSON document in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_forward_pass_reports_limit_measurement_and_ratio(tmp_path: Path) -> None:
    report = run(
        "forward_pass", "--geometry", "tiny", "--blocks", "3", "--checkpoint", str(tmp_path / "c"), "--ram", "2GiB",
        "--repeat", "1", "--sweeps", "2", "--peer", "accelerate",
    )  # fmt: skip
    for key in (
        "disk_gb_per_s",
        "gemm_tflop_per_s",
        "limit_s",
        "wall_s",
        "efficiency",
        "peer_wall_s",
        "speedup",
    ):
        assert float(str(report[key])) > 0


def test_a_checkpoint_is_written_as_the_hub_has_it(tmp_path: Path) -> None:
    report = run("make_checkpoint", "--geometry", "tiny", "--blocks", "3", str(tmp_path / "tiny"))
    assert report["bytes"] == sum(
        tensor.numel() * 2
        for tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").state_dict().values()
    )
    with slowllm.load(tmp_path / "tiny", dtype="fp32") as lm, torch.no_grad():
        ids = lm.tokenizer("The value is returned.", return_tensors="pt")["input_ids"]
        hidden = lm.model(ids, output_hidden_states=True).hidden_states
        assert all(0.01 < float(state.std()) < 100 for state in hidden)


BILLIONS = {
    "bloom-176b": 176.2,
    "llama-70b": 70.6,
    "llama-405b": 405.9,
    "mixtral-8x22b": 140.6,
    "falcon-180b": 179.5,
}


@pytest.mark.parametrize("geometry", BILLIONS)
def test_geometries_have_the_sizes_of_the_published_models(geometry: str) -> None:
    model = make_checkpoint._on_meta(geometry, make_checkpoint.num_model_blocks(geometry))
    assert math.isclose(model.num_parameters() / 1e9, BILLIONS[geometry], rel_tol=0.005)
    names = make_checkpoint._names_on_disk(make_checkpoint._on_meta(geometry, 1))
    if geometry == "bloom-176b":
        assert "h.0.self_attention.query_key_value.weight" in names
    if geometry == "mixtral-8x22b":
        assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in names


def test_a_disk_too_small_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"needs 811\.\d GB but .* GB are free"):
        make_checkpoint.make_checkpoint("llama-405b", 126, tmp_path / "big")
    assert list(tmp_path.iterdir()) == []
