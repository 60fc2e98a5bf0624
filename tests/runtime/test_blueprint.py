"""A model is planned by its shapes alone, as it is planned by its weights."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import slowllm
from slowllm.errors import ArchitectureError, CheckpointError, InputError
from slowllm.runtime.blueprint import find_blueprint, measure_blueprint, stored_dtype_of
from slowllm.runtime.known_models import KNOWN_MODELS, find_known
from slowllm.storage.checkpoint import INDEX
from tests.support.paths import TINY_BLOOM

# Bytes of all weights on the hub, in billions, tied heads once.
GIGABYTES = {
    "bigscience/bloom": 352.5,
    "bigscience/bloomz-560m": 1.118,
    "bigscience/bloom-1b1": 2.131,
    "bigscience/bloom-1b7": 3.445,
    "bigscience/bloom-3b": 6.005,
    "bigscience/bloom-7b1": 14.14,
    "meta-llama/Llama-3.1-8B": 16.06,
    "meta-llama/Llama-3.1-70B": 141.1,
    "meta-llama/Llama-3.1-405B": 811.7,
    "mistralai/Mixtral-8x7B-v0.1": 93.41,
    "mistralai/Mixtral-8x22B-v0.1": 281.2,
    "tiiuae/falcon-7b": 13.84,
    "tiiuae/falcon-40b": 82.61,
    "tiiuae/falcon-180B": 359.0,
    "openai/gpt-oss-20b": 13.76,
    "openai/gpt-oss-120b": 65.25,
    "Qwen/Qwen3-235B-A22B": 470.19,
}


def without_weights(folder: Path, **changes: Any) -> Path:
    """Write the embedded model's config and index, without its weights, to a new folder."""
    folder.mkdir()
    shutil.copy(TINY_BLOOM / INDEX, folder)
    table = json.loads((TINY_BLOOM / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("name", GIGABYTES)
def test_known_models_have_the_sizes_of_the_published_ones(name: str) -> None:
    blueprint = find_blueprint(name, None)
    assert blueprint is not None
    sizes = measure_blueprint(blueprint, blueprint.dtype, torch.bfloat16, forward_only=False)
    config = blueprint.config
    # Of an untied embedding only rows are read, so it is no part of a sweep.
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * 2
    assert math.isclose((sizes.weight_bytes + embedding) / 1e9, GIGABYTES[name], rel_tol=0.002)
    assert [one.granularity for one in sizes.choices] in (["blocks"], ["blocks", "experts"])
    assert sizes.num_stops == {
        one.granularity: config.num_hidden_layers + one.num_head_stops for one in sizes.choices
    }


def test_a_known_model_is_found_by_its_id_and_by_its_last_part() -> None:
    for hub_id in KNOWN_MODELS:
        for name in (hub_id, hub_id.upper(), hub_id.partition("/")[2]):
            found = find_known(name)
            assert found is not None
            assert found[0] == hub_id
    assert find_known("nobody/nothing") is None


@pytest.mark.parametrize("name", ["llama-2", "mixtral", "falcon-new-decoder"])
def test_sizes_by_the_config_are_those_by_the_weights(
    name: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slowllm.modeling.layout.MIN_LEAF_BYTES", 0)
    folder = tiny(name)
    blueprint = find_blueprint(None, folder / "config.json")
    assert blueprint is not None
    sizes = measure_blueprint(blueprint, torch.float32, torch.float32, forward_only=True)
    with slowllm.load(folder, dtype="fp32") as lm:
        assert sizes.weight_bytes == lm.weight_bytes
        assert len(sizes.choices) == len(lm.choices) == (3 if name == "mixtral" else 2)
        for ours, theirs in zip(sizes.choices, lm.choices, strict=True):
            assert [stop.flops for stop in ours.stops] == [stop.flops for stop in theirs.stops]
            assert ours.result_token_bytes == theirs.result_token_bytes
            assert ours.kept_bytes == theirs.kept_bytes
            # A tensor's place in a page is not known without its shard.
            assert abs(ours.all_bytes - theirs.all_bytes) <= 4096 * 2 * sum(map(len, lm.layout.stops))


def test_the_index_says_the_dtype_of_the_weights(tmp_path: Path) -> None:
    folder = without_weights(tmp_path / "m", dtype="float32")
    blueprint = find_blueprint(str(folder), None)
    assert blueprint is not None
    assert (blueprint.name, blueprint.source) == ("m", "config.json and its index")
    assert blueprint.dtype is torch.float32
    assert stored_dtype_of(blueprint) is torch.bfloat16
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] *= 3
    (folder / INDEX).write_text(json.dumps(index))
    blueprint = find_blueprint(str(folder), None)
    assert blueprint is not None
    with pytest.raises(CheckpointError, match="they do not belong together"):
        stored_dtype_of(blueprint)


def test_weights_that_are_there_need_no_blueprint(tmp_path: Path) -> None:
    assert find_blueprint(str(TINY_BLOOM), None) is None
    folder = tmp_path / "half"
    shutil.copytree(TINY_BLOOM, folder)
    (folder / "model-00003-of-00005.safetensors").unlink()
    assert find_blueprint(str(folder), None) is not None


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    # By its path transformers would take it for a BLOOM.
    nameless = without_weights(tmp_path / "bloom", model_type=None)
    with pytest.raises(CheckpointError, match=r"config\.json: names no model_type"):
        find_blueprint(None, nameless / "config.json")
    unknown = without_weights(tmp_path / "unknown", model_type="gpt17")
    with pytest.raises(ArchitectureError, match="model type 'gpt17' cannot be used by this version"):
        find_blueprint(None, unknown)
    with pytest.raises(CheckpointError, match="no such file"):
        find_blueprint(None, tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find_blueprint(None, tmp_path)
    with pytest.raises(InputError, match=r"slowllm download nobody/nothing.* with --config"):
        find_blueprint("nobody/nothing", None)
