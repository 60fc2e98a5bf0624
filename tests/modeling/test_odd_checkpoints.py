"""Folders that are not quite as slowllm expects: what transformers' `from_pretrained` makes of one is made here, too."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import slowllm
from slowllm.errors import ArchitectureError, CheckpointError, SlowLLMError
from slowllm.inference.scoring import score_queries
from slowllm.inference.text import Query
from slowllm.runtime.model_folder import find_folder
from tests.support.cases import crossed
from tests.support.families import FAMILIES, VOCAB, resident, save_tiny
from tests.support.paths import TINY_BLOOM

Tiny = Callable[..., Path]
IDS = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))


def same_as_plain(folder: Path, dtype: torch.dtype = torch.float32) -> bool:
    with slowllm.load(folder, dtype=str(dtype)) as lm, torch.no_grad():
        return bool(torch.equal(lm.model(IDS).logits, resident(folder, dtype)(IDS).logits))


def add_to_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_single_file_counts_beside_an_older_index(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path / "old")
    save_tiny("llama-2", tmp_path / "new", shard="1GB", initializer_range=0.3)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "old")
    assert same_as_plain(tmp_path / "old")
    for shard in (tmp_path / "old").glob("model-*.safetensors"):
        shard.unlink()
    assert same_as_plain(tmp_path / "old")


@pytest.mark.parametrize("name", ["deepseek-v3", "llama-2"])
def test_blocks_that_predict_further_tokens_are_left_aside(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, shard="1GB")
    count = int(FAMILIES[name][1]["num_hidden_layers"])
    weights = load_file(tmp_path / "model.safetensors")
    last = {k: v for k, v in weights.items() if f"layers.{count - 1}." in k}
    more = {k.replace(f"layers.{count - 1}.", f"layers.{count}."): v.clone() for k, v in last.items()}
    save_file({**weights, **more}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    add_to_config(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match="belongs to a block beyond the 3 that config"):
        slowllm.load(tmp_path)
    add_to_config(tmp_path, num_nextn_predict_layers=1)
    assert same_as_plain(tmp_path)


@pytest.mark.parametrize("name", ["gpt-oss", "llama-2", "bloom"])
def test_norms_that_transformers_keeps_in_fp32_beside_fp16_are_kept(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    assert same_as_plain(tmp_path, torch.float16)


def test_a_config_that_wants_tuples_gives_what_others_give(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path)
    wanted = resident(tmp_path)(IDS).logits
    add_to_config(tmp_path, return_dict=False)
    with slowllm.load(tmp_path, dtype="fp32") as lm, torch.no_grad():
        assert torch.equal(lm.model(IDS).logits, wanted)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_pointer_in_the_place_of_a_file_is_said_to_be_one(name: str, tmp_path: Path) -> None:
    shutil.copytree(TINY_BLOOM, tmp_path / "model")
    (tmp_path / "model" / name).write_text(POINTER)
    with pytest.raises(
        CheckpointError, match=f"{name}(:| is) .*Git LFS pointer|{name}: is a Git LFS pointer"
    ):
        _ = slowllm.load(tmp_path / "model").tokenizer


def test_what_a_folder_without_a_tokenizer_lacks_is_named(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path)
    with pytest.raises(CheckpointError, match=r"there is none of tokenizer\.json, tokenizer\.model"):
        _ = slowllm.load(tmp_path).tokenizer
    (tmp_path / "tokenizer.json").symlink_to("/nowhere")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to /nowhere, which is not there"):
        _ = slowllm.load(tmp_path).tokenizer


@pytest.mark.parametrize(
    ("value", "key"),
    crossed(
        ["some/repo", "flash_attention_2", "flex_attention", "kernels-community/x:y"],
        KEYS := ["_attn_implementation", "attn_implementation", "experts_implementation"],
        quick=[*product(["some/repo"], KEYS), ("flash_attention_2", "attn_implementation")],
    ),
)
def test_no_code_is_fetched_for_what_a_config_names(
    key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Kernels(ModuleType):
        """A stand-in for the package that fetches code from the hub."""

        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *arguments, **options: calls.append(f"{name}{arguments}")

    monkeypatch.setitem(sys.modules, "kernels", Kernels("kernels"))
    save_tiny("mixtral", tmp_path)
    wanted = resident(tmp_path)(IDS).logits
    add_to_config(tmp_path, **{key: value})
    with slowllm.load(tmp_path, dtype="fp32") as lm, torch.no_grad():
        assert torch.equal(lm.model(IDS).logits, wanted)
    assert not [call for call in calls if "get_kernel" in call or "/" in call]


def test_a_first_pass_takes_the_number_of_threads_that_was_set(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path)
    before = torch.get_num_threads()
    seen: list[int] = []
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            with slowllm.load(tmp_path, dtype="fp32") as lm, torch.no_grad():
                lm.model.model.layers[1]._plain.register_forward_pre_hook(
                    lambda *_: seen.append(torch.get_num_threads())
                )
                lm.model(IDS)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 1]


def test_a_revision_in_the_cache_is_found_by_branch_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--acme--tiny"
    shutil.copytree(TINY_BLOOM, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    find = find_folder
    assert find(f"acme/tiny@{commit}").name == commit
    for name in ("acme/tiny", "acme/tiny@step1000", "acme/tiny@" + "f" * 40):
        with pytest.raises(CheckpointError, match=f"this revision is not in .* cache, which has {commit}"):
            find(name)
    (folder / "refs" / "step1000").write_text(commit)
    assert find("acme/tiny@step1000").name == commit
    with pytest.raises(
        CheckpointError, match=f"which has step1000, {commit}; name one of them as acme/tiny@REV"
    ):
        find("acme/tiny")
    (folder / "refs" / "main").write_text(f"{commit}\n")
    assert find("acme/tiny").name == commit
    with pytest.raises(CheckpointError, match=r"fetch it with `slowllm download acme/other`"):
        find("acme/other@main")


def test_a_config_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    save_tiny("llama-2", tmp_path)
    with open(tmp_path / "config.json", "r+b") as file:
        file.truncate(1 << 33)  # a sparse file
    with pytest.raises(
        CheckpointError, match=r"config\.json: has 8,589,934,592 bytes, too many for a file of its kind"
    ):
        slowllm.load(tmp_path)


def test_a_folder_with_half_of_a_tokenizer_is_told_what_it_has(tmp_path: Path) -> None:
    shutil.copytree(TINY_BLOOM, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "vocab.json").write_text('{"a": 1}')
    with pytest.raises(
        CheckpointError, match=r"cannot make one of vocab\.json, tokenizer_config\.json alone; fetch"
    ):
        _ = slowllm.load(tmp_path / "model").tokenizer


def test_weights_that_would_be_divided_in_place_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "rwkv",
        hidden_size=64,
        attention_hidden_size=64,
        num_hidden_layers=3,
        vocab_size=VOCAB,
        rescale_every=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match=r"set rescale_every to 0 in config\.json"):
        slowllm.load(tmp_path)
    add_to_config(tmp_path, rescale_every=0)
    assert same_as_plain(tmp_path)
    add_to_config(tmp_path, rescale_every=3)
    assert same_as_plain(tmp_path)


@pytest.mark.parametrize("changes", [{"hidden_size": 1 << 31}, {"head_dim": 1 << 40}], ids=str)
def test_sizes_that_no_model_has_are_refused_before_memory_is_taken_for_them(
    changes: dict[str, int], tmp_path: Path
) -> None:
    """Norms and rotary tables are real before any weight is read, whose shapes would show what is wrong."""
    save_tiny("llama-2", tmp_path)
    add_to_config(tmp_path, **changes)
    message = r"config\.json: describes a model with [\d,]+ bytes of norms and tables, where 2,147,483,648 may be; a size"
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(tmp_path)


def test_more_blocks_than_there_can_be_are_refused_before_a_list_of_them_is_made(tmp_path: Path) -> None:
    save_tiny("gemma-3-sliding", tmp_path)
    message = r"config\.json: names 2,147,483,648 blocks \(num_hidden_layers\); there are at most 10,000"
    add_to_config(tmp_path, num_hidden_layers=1 << 31, layer_types=None)
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(tmp_path)
    add_to_config(tmp_path, num_hidden_layers=3, text_config={"num_hidden_layers": 1 << 31})
    with pytest.raises(CheckpointError, match=message):
        slowllm.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"hidden_size": 64}}, r"config\.json: has a config of a text model inside, which model type 'llama' does"),
        ({"model_type": "x" * 5000}, r"config\.json: model type 'x{12}\.{3}x{13}' cannot be used by this version"),
    ],
    ids=["text", "long"],
)  # fmt: skip
def test_a_config_with_what_its_model_type_does_not_have_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_tiny("llama-2", tmp_path)
    add_to_config(tmp_path, **changes)
    with pytest.raises(SlowLLMError, match=message):
        slowllm.load(tmp_path)


def test_a_window_beyond_any_number_of_tokens_is_one_sentence(tmp_path: Path) -> None:
    save_tiny("gemma-3-sliding", tmp_path)
    add_to_config(tmp_path, sliding_window=10**30)
    with pytest.raises(SlowLLMError) as caught, slowllm.load(tmp_path, dtype="fp32") as lm:
        list(score_queries(lm, [Query((5,), (6, 7))]))
    assert "\n" not in str(caught.value)
