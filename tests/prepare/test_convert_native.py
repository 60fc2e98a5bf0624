"""Stores of checkpoints that are quantised already: what is quantised stays as it is, and is rounded again only on request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import slowllm
from slowllm.entrypoints.cli import app
from slowllm.errors import CheckpointError, InputError, StoreError
from slowllm.prepare.verify import verify
from slowllm.storage.manifest import MANIFEST, open_checkpoint
from tests.support.cases import crossed, quick_and_long
from tests.support.compressed_checkpoints import settings_of, store_compressed
from tests.support.families import save_tiny
from tests.support.gguf_checkpoints import write_gguf
from tests.support.native_checkpoints import fp8_settings, quantised, store_fp8
from tests.support.native_sources import NATIVE_SOURCES, save_native
from tests.support.paths import ROOT
from tests.support.stores import make_store

IDS = torch.arange(5, 25)[None]


def logits_and_tokens(folder: Path, dtype: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with slowllm.load(folder, dtype=dtype, **options) as lm, torch.no_grad():
        return lm.model(IDS).logits, lm.model.generate(IDS, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(
    "name",
    quick_and_long(
        NATIVE_SOURCES, ["fp8 experts", "fp8 deepseek", "mxfp4", "gptq", "bnb nf4", "gguf", "gguf experts"]
    ),
)
def test_a_store_computes_what_its_source_computes(name: str, tmp_path: Path) -> None:
    source = save_native(name, tmp_path)
    done = make_store(source, tmp_path / "store", "lossless")
    assert done.manifest is not None
    assert done.manifest.is_exact
    assert done.num_kept > 0
    assert not done.num_requantised
    for dtype in ("bfloat16", "float32"):
        wanted = logits_and_tokens(source, dtype)
        for options in ({}, {"keep_resident": False, "poison": True}):
            found = logits_and_tokens(tmp_path / "store", dtype, **options)
            assert all(map(torch.equal, found, wanted))
    assert verify(tmp_path / "store").num_bytes > 0


LOSSY = ["int8", "int4", "bf16"]


@pytest.mark.parametrize(
    ("name", "store"),
    crossed(
        ["fp8 experts", "gptq", "mxfp4"], LOSSY,
        quick=[("gptq", "int4"), ("mxfp4", "bf16")],
    ),
)  # fmt: skip
def test_what_is_quantised_is_not_rounded_again_unless_asked_to(
    name: str, store: str, tmp_path: Path
) -> None:
    source = save_native(name, tmp_path)
    kept = make_store(source, tmp_path / "kept", store)
    assert kept.manifest is not None
    # Of these models, whatever a lossy store would round is quantised already; gpt-oss's attention is not.
    is_all = name != "mxfp4"
    assert kept.manifest.is_exact == (is_all or store == "bf16")
    wanted = logits_and_tokens(source, "bfloat16")
    found = logits_and_tokens(tmp_path / "kept", "bfloat16")
    assert torch.equal(found[0], wanted[0]) == (is_all or store == "bf16")
    again = make_store(source, tmp_path / "again", store, requantise=True)
    assert again.manifest is not None
    assert again.manifest.requantised
    assert not again.manifest.is_exact
    assert (again.num_requantised, again.num_kept) == (kept.num_kept, 0)
    assert {tensor.coding for file in again.manifest.files.values() for tensor in file.tensors.values()} == {
        None
    }
    rounded = logits_and_tokens(tmp_path / "again", "bfloat16")[0]
    if store == "bf16":  # to the numbers that the source is decoded to
        assert torch.equal(rounded, wanted[0])
    else:
        error = (rounded - wanted[0]).float().norm() / wanted[0].float().norm()
        assert 0 < error < {"int8": 0.1, "int4": 0.5}[store]


def run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["slowllm", *map(str, arguments)])
    try:
        app.run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_says_what_became_of_quantised_matrices_and_plan_counts_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, store = save_native("fp8", tmp_path), tmp_path / "store"
    for options, said in (
        (["--store", "int8"], "21 quantised matrices: kept as the checkpoint has them; --requantise rounds those"),
        (["--store", "int8"], "the int8 store of native is finished already"),
        (["--store", "int8", "--requantise"], "is a store that was made without --requantise; name another folder"),
    ):  # fmt: skip
        run(["convert", source, store, *options], monkeypatch)
        assert said in capsys.readouterr().err
    assert run(["convert", source, tmp_path / "other", "--store", "int4", "--requantise"], monkeypatch) == 0
    assert "21 quantised matrices: rounded a second time, to int4" in capsys.readouterr().err
    planned = []
    for folder in (source, store):
        assert run(["plan", folder, "--ram", "8GiB", "--json"], monkeypatch) == 0
        planned.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert planned[0]["weight_bytes"] == planned[1]["weight_bytes"]
    assert planned[1]["native_format"] == "fp8"
    for folder, said in (
        (source, "fp8, read as it is"),
        (store, "int8 store; what was quantised as fp8 is kept so"),
        (tmp_path / "other", "int4 store"),  # which has float8 no longer
    ):
        assert run(["plan", folder, "--ram", "8GiB"], monkeypatch) == 0
        rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.strip()]
        assert [row[1].strip() for row in rows if row[0] == "format"] == [said]
    assert run(["verify", store, "--json"], monkeypatch) == 0


def test_the_option_to_round_again_is_refused_where_it_makes_no_sense(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="none of its matrices is quantised, so none can be rounded again"):
        make_store(tiny("bloom", torch.bfloat16), tmp_path / "store", "int8", requantise=True)
    source = save_native("fp8", tmp_path)
    with pytest.raises(InputError, match="a lossless store rounds nothing, so it cannot requantise"):
        make_store(source, tmp_path / "store", "lossless", requantise=True)
    assert not (tmp_path / "store").exists()
    begun = {"requantise": True, "rank": 0, "world_size": 3}
    assert make_store(source, tmp_path / "store", "int8", **begun).manifest is None
    with pytest.raises(StoreError, match="was begun for another choice of --requantise"):
        make_store(source, tmp_path / "store", "int8")


def test_plain_matrices_beside_quantised_ones_are_coded_as_the_store_has_it(tmp_path: Path) -> None:
    done = make_store(save_native("mxfp4", tmp_path), tmp_path / "store", "int8").manifest
    assert done is not None
    stored = {name: tensor for file in done.files.values() for name, tensor in file.tensors.items()}
    assert stored["model.layers.0.self_attn.q_proj.weight"].codec == "int8"
    experts = stored["model.layers.0.mlp.experts.down_proj"]
    assert experts.codec == "mxfp4"
    assert experts.coding is not None
    source = {span.name: span for span in open_checkpoint(tmp_path / "native").spans.values()}
    kept = open_checkpoint(tmp_path / "store").spans["model.layers.0.mlp.experts.down_proj"]
    data = kept.path.read_bytes()
    for array, suffix in zip(experts.coding.parts, ("blocks", "scales"), strict=True):
        span = source[f"model.layers.0.mlp.experts.down_proj_{suffix}"]
        wanted = span.path.read_bytes()[span.offset : span.offset + span.num_bytes]
        assert data[kept.offset + array.offset :].startswith(wanted), "byte for byte"


def test_a_store_of_a_gguf_file_is_a_folder_of_its_own(tmp_path: Path) -> None:
    source = save_native("gguf", tmp_path / "one")
    make_store(source, tmp_path / "store", "lossless")
    assert sorted(path.name for path in (tmp_path / "store").glob("*.json*")) == [
        "config.json", "slowllm_store.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    text = "a cat on the thin cats"
    with slowllm.load(source) as lm, slowllm.load(tmp_path / "store") as ours:
        assert ours.fingerprint() == lm.fingerprint()
        assert ours.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
        assert ours.tokenizer.chat_template == lm.tokenizer.chat_template
        assert ours.tokenizer.eos_token_id == lm.tokenizer.eos_token_id
        assert ours.model.config.vocab_size == lm.model.config.vocab_size
    # A tokenizer.json that lies beside the file is preferred; without any, the store has none either.
    other = write_gguf(tmp_path / "two" / "m.gguf")
    make_store(other.parent, tmp_path / "bare", "int8")
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "store" / name, other.parent)
    make_store(other.parent, tmp_path / "beside", "int8")
    assert (tmp_path / "beside/tokenizer.json").read_bytes() == (
        tmp_path / "store/tokenizer.json"
    ).read_bytes()


@pytest.mark.long
def test_killed_at_any_moment_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source, store = save_native("fp8 experts", tmp_path), tmp_path / "store"
    make_store(source, tmp_path / "whole", "lossless")
    command = [sys.executable, "-m", "tests.support.converted", "killed", str(store), "2", "7", str(source)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["codes"] == [-signal.SIGKILL] * 2
    assert 0 < found["finished"][-1] < 5
    kept = {path.name: path.stat().st_mtime_ns for path in store.glob("*.safetensors")}
    make_store(source, store, "lossless", name="native")
    assert {name: (store / name).stat().st_mtime_ns for name in kept} == kept, "not written again"
    for name in ("slowllm_store.json", "block-00001.safetensors", "outside.safetensors"):
        assert (store / name).stat().st_size == (tmp_path / "whole" / name).stat().st_size


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    disk, source = tmp_path / "disk", save_native("gguf", tmp_path)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        with pytest.raises(StoreError, match=r"MB are to be written, but .*B are free; make room$"):
            make_store(source, disk / "store", "lossless")
        with pytest.MonkeyPatch.context() as patch:  # somebody else fills it meanwhile
            patch.setattr("slowllm.prepare.convert._check_space", lambda *_: None)
            with pytest.raises(StoreError, match="No space left on device; what is finished is kept"):
                make_store(source, disk / "store", "lossless")
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        assert make_store(source, disk / "store", "lossless").manifest is not None
        assert verify(disk / "store").num_files
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_source_whose_scales_are_damaged_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = save_native("fp8", tmp_path)
    path = next(
        path for path in source.glob("*.safetensors") if b"up_proj.weight_scale_inv" in path.read_bytes()
    )
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("up_proj.weight_scale_inv"))
    save_file({**tensors, name: tensors[name][:1]}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="which are no scales for"):
        make_store(source, tmp_path / "store", "lossless")
    assert not (tmp_path / "store").exists()
    save_file({**tensors, name: tensors[name].fill_(float("nan"))}, path, {"format": "pt"})
    with pytest.raises(
        StoreError, match="has NaN or infinities, which int8 cannot hold; the source is damaged"
    ):
        make_store(source, tmp_path / "store", "int8", requantise=True)


def _replaced(entry: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**entry, "coding": {**entry["coding"], **values}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: _replaced(e, group=[1, 1]), "its arrays do not make a matrix of shape"),
        (lambda e: _replaced(e, group=[0, 0]), "its arrays do not make a matrix of shape"),
        (lambda e: _replaced(e, parts=e["coding"]["parts"][:1]), "its arrays do not make a matrix of shape"),
        (lambda e: _replaced(e, parts=[{**p, "offset": 1 << 40} for p in e["coding"]["parts"]]), "do not make a matrix"),
        (lambda e: _replaced(e, parts=[{**p, "offset": 1} for p in e["coding"]["parts"]]), "do not make a matrix"),
        (lambda e: _replaced(e, rows=[{"first": 0, "num_rows": 3, "coding": e["coding"]}]), "do not make a matrix"),
        (lambda e: _replaced(e, offset=float("inf")), "do not make a matrix of shape|is not valid JSON"),
        (lambda e: {**_replaced(e, codec="fp9"), "codec": "fp9"}, "has no tensor .* though the manifest names it"),
        (lambda e: _replaced(e, codec="fp9"), "is told of in two ways"),
        (lambda e: {**e, "coding": {"codec": "fp8"}}, "its manifest is damaged"),
        (lambda e: _replaced(e, rows=[{"first": 0, "num_rows": 3, "coding": None}]), "its manifest is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_coding_is_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, tmp_path: Path
) -> None:
    make_store(save_native("fp8", tmp_path), tmp_path / "store", "bf16")
    table = json.loads((tmp_path / "store" / MANIFEST).read_text())
    tensors = table["files"]["block-00001.safetensors"]["tensors"]
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = change(tensors[name])
    (tmp_path / "store" / MANIFEST).write_text(json.dumps(table))
    with pytest.raises(StoreError, match=message):
        open_checkpoint(tmp_path / "store")


@pytest.mark.parametrize("name", quick_and_long(["fp8", "mixtral", "compressed"], quick=["fp8"]))
def test_float8_is_packed_without_loss_where_that_gains(name: str, tmp_path: Path) -> None:
    family = "mixtral" if name == "mixtral" else "llama-2"
    save_tiny(family, tmp_path / "plain", torch.bfloat16, hidden_size=256, intermediate_size=384)
    stores, settings = store_fp8((128, 128)), fp8_settings((128, 128))
    if name == "compressed":
        stores, settings = store_compressed("float8 channels"), settings_of("float8 channels")

    def store(key: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if "1.self_attn.q_proj" in key:  # of numbers of every size: nothing is gained
            weight = torch.rand(weight.shape).mul(-14).exp2().bfloat16()
        return stores(key, weight)

    source = quantised(tmp_path / "plain", tmp_path / "native", settings, store)
    done = make_store(source, tmp_path / "store", "lossless").manifest
    assert done is not None
    assert done.is_exact
    stored = {key: tensor for file in done.files.values() for key, tensor in file.tensors.items()}
    codec = "fp8_rounded" if name == "compressed" else "fp8"
    assert stored["model.layers.0.self_attn.q_proj.weight"].codec == f"{codec}_packed"
    assert stored["model.layers.1.self_attn.q_proj.weight"].codec == codec
    if name == "mixtral":
        experts = stored["model.layers.0.mlp.experts.down_proj"].coding
        assert experts is not None
        assert experts.codecs == {"stacked", "fp8_packed"}
    sizes = [
        sum(span.num_bytes for span in open_checkpoint(folder).spans.values() if "layers.0" in span.name)
        for folder in (source, tmp_path / "store")
    ]
    assert sizes[1] < 0.95 * sizes[0]
    for dtype in ("bfloat16", "float32"):
        wanted = logits_and_tokens(source, dtype)
        found = logits_and_tokens(tmp_path / "store", dtype, keep_resident=False, poison=True)
        assert all(map(torch.equal, found, wanted))
    kept = make_store(source, tmp_path / "int8", "int8").manifest
    assert kept is not None
    assert (
        kept.files["block-00000.safetensors"].tensors["model.layers.0.self_attn.q_proj.weight"].codec == codec
    )
