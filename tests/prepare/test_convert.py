"""Stores: the same model in fewer bytes, made piece by piece, resumed, checked, and refused where they are not whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import slowllm
from slowllm.entrypoints.cli import app
from slowllm.errors import InputError, StoreError
from slowllm.modeling import layout
from slowllm.options import MIB
from slowllm.prepare import store_plan
from slowllm.prepare.convert import convert
from slowllm.prepare.workers import Progress, choose_workers
from slowllm.storage import manifest
from slowllm.storage.codecs import layout_constants
from slowllm.storage.shard import read_header
from tests.support.cases import crossed
from tests.support.families import family_cases, resident, save_tiny
from tests.support.host_device import HostDevice
from tests.support.paths import ROOT, TINY_BLOOM
from tests.support.processes import Processes
from tests.support.stores import gradients, make_store, passed

Tiny = Callable[..., Path]
# Relative to the norm: random models of width 64, whose logits are sums of few products.
NEAR = {"int8": 0.05, "int4": 0.4}
SOME = ["bloom", "llama-3-scaled-rope", "mixtral", "falcon-new-decoder"]


@pytest.fixture(autouse=True)
def _small_matrices_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_plan, "MIN_WEIGHTS", 64)


@pytest.mark.parametrize(("name", "store"), family_cases(["lossless", "bf16"]))
def test_an_exact_store_gives_the_bits_and_the_gradients_of_its_source(
    name: str, store: str, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(name, torch.bfloat16)
    manifest_of = make_store(source, tmp_path / "store", store).manifest
    assert manifest_of is not None
    codecs = {t.codec for file in manifest_of.files.values() for t in file.tensors.values()}
    assert codecs == ({None, "lossless"} if store == "lossless" else {None})
    wanted, found = passed(source), passed(tmp_path / "store")
    assert torch.equal(found[0], wanted[0])
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "store"),
    crossed(
        SOME,
        ["lossless", "int8", "int4"],
        quick=[("bloom", "lossless"), ("bloom", "int4"), ("mixtral", "int8"), ("mixtral", "lossless")],
    ),
)
def test_leaves_of_a_store_give_what_its_blocks_give(
    name: str, store: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MIN_LEAF_BYTES", 0)
    make_store(tiny(name, torch.bfloat16), tmp_path / "store", store)
    assert torch.equal(passed(tmp_path / "store", "leaves")[0], passed(tmp_path / "store")[0])


# Not gpt-oss, in whose toy rounding sends some tokens to other experts.
@pytest.mark.parametrize(
    ("name", "store", "dtype"),
    crossed(
        [*SOME, "gpt2", "deepseek-v3"],
        NEAR,
        ["bf16", "fp32"],
        quick=[
            *product(["bloom"], NEAR, ["bf16", "fp32"]), ("mixtral", "int4", "fp32"), ("mixtral", "int8", "bf16"),
            ("gpt2", "int4", "bf16"), ("gpt2", "int8", "fp32"), ("deepseek-v3", "int8", "bf16"),
        ],
    ),
)  # fmt: skip
def test_a_lossy_store_is_near_its_source_and_so_are_its_gradients(
    name: str, store: str, dtype: str, tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(name, torch.bfloat16)
    make_store(source, tmp_path / "store", store)
    plain = resident(source, torch.float32 if dtype == "fp32" else torch.bfloat16)
    wanted, found = gradients(None, plain), passed(tmp_path / "store", dtype=dtype)
    assert 0 < (found[0] - wanted[0]).float().norm() <= NEAR[store] * wanted[0].float().norm()
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        assert (ours - theirs).float().norm() <= 2 * NEAR[store] * theirs.float().norm()


def test_gradients_go_through_the_decoded_weights(tiny: Tiny, tmp_path: Path) -> None:
    """int4 products of many rows are those of the decoded matrix: the same gradient as a model of such weights."""
    source = tiny("llama-2", torch.bfloat16)
    make_store(source, tmp_path / "int4", "int4")
    with slowllm.load(tmp_path / "int4", dtype="fp32", keep_resident=False, poison=True) as lm:
        ours = gradients(lm, lm.model)
        plain = resident(source)
        with torch.no_grad():
            for number, block in enumerate(plain.model.layers):
                name = f"model.layers.{number}"
                decoded = lm._carousel.visit(
                    number, "up", lambda w: {key: value + 0 for key, value in w.items()}
                )
                for key, parameter in block.named_parameters():
                    parameter.copy_(decoded[f"{name}.{key}"])
    theirs = gradients(None, plain)
    assert torch.allclose(ours[0], theirs[0], rtol=0, atol=1e-5)
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def perplexity(folder: Path) -> float:
    lines = [line for line in (ROOT / "sentences.txt").read_text().splitlines() if line]
    with slowllm.load(folder, dtype="bf16", keep_resident=False) as lm:
        found = lm.score(lines)
    return math.exp(-sum(text.log_likelihood for text in found) / sum(len(text.log_probs) for text in found))


@pytest.fixture(scope="module")
def plain_perplexity() -> float:
    return perplexity(TINY_BLOOM)


@pytest.mark.parametrize("store", ["bf16", "lossless", "int8", "int4"])
def test_perplexity_stays_where_it_should(
    store: str, embedded: Callable[[str], Path], plain_perplexity: float
) -> None:
    change = perplexity(embedded(store)) / plain_perplexity - 1
    most = {"bf16": 0.0, "lossless": 0.0, "int8": 0.005, "int4": 0.05}[store]
    assert abs(change) <= most


def test_every_verb_takes_a_store(
    embedded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for store in ("lossless", "int4"):
        folder = str(embedded(store))
        assert run(["generate", "The value is", "--model", folder, "--max-new-tokens", "2"], monkeypatch) == 0
        assert run(["plan", folder, "--ram", "8GiB", "--json"], monkeypatch) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["weight_bytes"] < 6_000_000
        assert run(["yesno", "-", "--model", folder], monkeypatch, "Is it?\n") == 0
        assert run(["verify", folder, "--json"], monkeypatch) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_files"] == 11 + 3


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, text: str = "") -> int:
    import io

    monkeypatch.setattr(sys, "argv", ["slowllm", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    try:
        app.run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_soft_prompt_of_the_source_goes_before_texts_of_its_stores(
    embedded: Callable[[str], Path], tmp_path: Path
) -> None:
    data, quick = tmp_path / "lines.txt", {"num_tokens": 2, "num_steps": 1, "batch_size": 1}
    data.write_text("The value is returned.\nThe value is there.\n")
    slowllm.tune(embedded("int8"), data, out=tmp_path / "prompt", **quick)
    for folder in (TINY_BLOOM, embedded("int8"), embedded("lossless")):
        with slowllm.load(folder, prompt=tmp_path / "prompt") as lm:
            assert math.isfinite(lm.score(["The value is"])[0].log_likelihood)


def test_an_exact_store_is_the_same_model_and_a_lossy_one_another(embedded: Callable[[str], Path]) -> None:
    def fingerprint(folder: Path, **options: Any) -> str:
        with slowllm.load(folder) as lm:
            return lm.fingerprint(**options)

    true = fingerprint(TINY_BLOOM)
    assert [fingerprint(embedded(store)) == true for store in manifest.STORES] == [True, True, False, False]
    assert fingerprint(embedded("int4"), of_source=True) == true
    assert fingerprint(embedded("int4")) != fingerprint(embedded("int8"))


def test_files_are_one_a_stop_in_order_of_use_and_aligned(embedded: Callable[[str], Path]) -> None:
    for store in ("bf16", "lossless", "int8"):
        folder = embedded(store)
        blocks = [f"block-{number:05d}.safetensors" for number in range(10)]
        assert sorted(p.name for p in folder.glob("*.safetensors")) == [*blocks, "outside.safetensors"]
        assert not list(folder.glob("*.part"))
        assert not list(folder.glob("*.safetensors.json"))
        spans = read_header(folder / blocks[3])
        firsts = [s for s in spans.values() if s.name.endswith((".weight", ".bias", ".signs", ".codes"))]
        assert all(span.offset % 4096 == 0 for span in firsts)
        linears = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        weights = [s.name.split(".")[4] for s in firsts if ".weight" in s.name and "norm" not in s.name]
        assert [name for name in weights if name in linears] == linears
        # And anybody's library reads them.
        assert safetensors.torch.load_file(folder / blocks[3])


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def test_the_source_is_not_changed_and_the_copy_is_complete(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(TINY_BLOOM, source)
    before, times = digests(source), [p.stat().st_mtime_ns for p in sorted(source.iterdir())]
    told: list[Progress] = []
    make_store(source, tmp_path / "store", "int8", on_progress=told.append)
    assert digests(source) == before
    assert [p.stat().st_mtime_ns for p in sorted(source.iterdir())] == times
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert digests(tmp_path / "store")[name] == before[name]
    assert [p.num_done for p in told] == list(range(12))
    assert told[-1].done_bytes == told[-1].source_bytes
    size = sum(p.stat().st_size for p in (tmp_path / "store").glob("*.safetensors"))
    assert told[0].estimated_bytes == pytest.approx(size, rel=0.3)  # headers weigh much in so small a model


def converted(processes: Processes, *arguments: object) -> dict[str, list[int]]:
    """Run `tests.support.converted`, which forks before it has threads."""
    done = processes.run("-m", "tests.support.converted", *arguments)
    assert not done.returncode, done.stderr
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


@pytest.mark.long
def test_workers_and_ranks_make_the_same_store(
    embedded: Callable[[str], Path], processes: Processes, tmp_path: Path
) -> None:
    wanted = digests(embedded("int4"))
    make_store(TINY_BLOOM, tmp_path / "workers", "int4", workers=2)
    assert digests(tmp_path / "workers") == wanted

    # Eleven files in four shares, all at once: the last share is short.
    assert converted(processes, "ranks", tmp_path / "ranks", 4)["codes"] == [0] * 4
    assert digests(tmp_path / "ranks") == wanted


@pytest.mark.parametrize("num_kills", [2, pytest.param(6, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_goes_on_where_it_stopped(
    num_kills: int, embedded: Callable[[str], Path], processes: Processes, tmp_path: Path
) -> None:
    wanted, store = digests(embedded("lossless")), tmp_path / "store"
    found = converted(processes, "killed", store, num_kills, 5)
    assert found["codes"] == [-signal.SIGKILL] * num_kills
    assert found["finished"] == sorted(found["finished"]), "what was finished stays finished"
    assert 0 < found["finished"][-1] < 11
    with pytest.raises(StoreError, match="this store is not finished; run the same `slowllm convert` again"):
        slowllm.load(store)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "store").glob("*.safetensors")}
    make_store(TINY_BLOOM, tmp_path / "store", "lossless")
    assert {n: (tmp_path / "store" / n).stat().st_mtime_ns for n in kept} == kept, "not written again"
    assert {n: d for n, d in digests(tmp_path / "store").items() if not n.endswith(".part")} == wanted


@pytest.mark.long
@pytest.mark.parametrize("stores", [("int4",), ("lossless", "int4")])
def test_memory_is_bounded_by_pieces_not_by_a_block(stores: tuple[str, ...], tmp_path: Path) -> None:
    save_tiny(
        "llama-2", tmp_path / "source", torch.bfloat16, shard="1GB", hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from slowllm.runtime.streamed_lm import peak_rss_bytes
from slowllm.prepare import encode
from slowllm.prepare.convert import convert
import numba
encode.PIECE_BYTES = 1 << 20
convert({str(TINY_BLOOM)!r}, {str(tmp_path / "warm")!r}, store="int4", workers=1)
before = peak_rss_bytes()
for store in {stores}:
    convert({str(tmp_path / "source")!r}, {str(tmp_path)!r} + "/" + store, store=store, workers=1)
print(peak_rss_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    block_bytes = 2 * (4 * 2048**2 + 3 * 2048 * 8192)
    assert int(done.stdout) < 110 * MIB < block_bytes


def test_targets_that_hold_something_else_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny("bloom", torch.bfloat16), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"out: is not empty; name a new folder, or empty this one$"):
        make_store(source, out, "int8")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(StoreError, match=r"thesis\.txt: is (a file; name a folder|no folder)$"):
        make_store(source, out / "thesis.txt", "int8")
    with pytest.raises(InputError, match="lies in the source, or around it"):
        make_store(source, source / "store", "int8")
    make_store(source, tmp_path / "store", "int8")
    assert make_store(source, tmp_path / "store", "int8").was_there
    with pytest.raises(StoreError, match=r"is a finished int8 store of .*; name another folder"):
        make_store(source, tmp_path / "store", "int4")
    with pytest.raises(StoreError, match="is a store already; convert the checkpoint that it was made from"):
        make_store(tmp_path / "store", tmp_path / "again", "int4")


def test_a_finished_store_that_lost_a_file_is_not_called_finished(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny("bloom", torch.bfloat16), tmp_path / "out"
    assert not make_store(source, out, "int8").was_there
    (out / "block-00001.safetensors").unlink()
    with pytest.raises(
        StoreError, match=r"is missing from the store .*; delete the store and convert the model again"
    ):
        make_store(source, out, "int8")


def test_only_bf16_matrices_are_coded_without_loss(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama-2", source, torch.bfloat16, shard="1GB")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    # Of so few exponents that fp16's bits, taken for bf16's, would not escape.
    tensors[name] = torch.where(tensors[name] > 0, 0.03, -0.03).half()
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done = make_store(source, tmp_path / "store", "lossless").manifest
    assert done is not None
    stored = done.files["block-00001.safetensors"].tensors
    assert (stored[name].codec, stored[name].dtype) == (None, "F16")
    assert torch.equal(passed(tmp_path / "store", dtype="fp32")[0], passed(source, dtype="fp32")[0])


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("store", ["int8", "int4"])
def test_numbers_that_a_codec_cannot_hold_are_refused(store: str, number: float, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_tiny("llama-2", source, torch.bfloat16, shard="1GB")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        StoreError, match=rf"up_proj\.weight: has NaN or infinities, which {store} cannot hold"
    ):
        make_store(source, tmp_path / "store", store)


@pytest.mark.parametrize("what", ["store", "model"])
def test_an_unfinished_store_goes_on_only_with_its_own_job(what: str, tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny("bloom", torch.bfloat16), tmp_path / "out"
    assert make_store(source, out, "int8", rank=1, world_size=3).manifest is None
    other = tiny("llama-2", torch.bfloat16) if what == "model" else source
    with pytest.raises(
        StoreError, match=rf"out: was begun for another {what} \(int8 of .*\); name another folder"
    ):
        make_store(other, out, "int8" if what == "model" else "int4")
    assert make_store(source, out, "int8").manifest is not None


def test_options_that_make_no_sense_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    source, out = tiny("bloom", torch.bfloat16), tmp_path / "out"
    for options, match in [
        ({"store": "int3"}, r"store 'int3' is unknown; use one of bf16, lossless, int8, int4$"),
        ({"rank": 3, "world_size": 3}, r"rank 3 is not one of a world of 3; ranks are counted from 0$"),
        ({"rank": -1}, "rank -1 is not one of a world of 1"),
        ({"workers": 0}, "0 workers do nothing"),
    ]:
        with pytest.raises(InputError, match=match):
            convert(source, out, **{"store": "int8", **options})  # type: ignore[arg-type]
    with pytest.raises(
        StoreError, match=r"is float32, but the lossless store is for bfloat16; use --store bf16"
    ):
        make_store(tiny("bloom"), out, "lossless")
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_rounded_to_a_bf16_store(dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    done = make_store(tiny("llama-2", dtype), tmp_path / "store", "bf16").manifest
    assert done is not None
    assert not done.is_exact
    wanted = resident(tiny("llama-2", dtype), torch.bfloat16)
    assert torch.equal(passed(tmp_path / "store")[0], gradients(None, wanted)[0])


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    embedded: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        with pytest.raises(
            StoreError, match=r"[\d.]+ MB are to be written, but [\d.]+ MB are free; make room$"
        ):
            make_store(TINY_BLOOM, disk / "store", "int8")
        # Somebody else fills it meanwhile.
        monkeypatch.setattr("slowllm.prepare.convert._check_space", lambda *_: None)
        with pytest.raises(StoreError, match="No space left on device; what is finished is kept"):
            make_store(TINY_BLOOM, disk / "store", "int8")
        subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
        make_store(TINY_BLOOM, disk / "store", "int8")
        assert digests(disk / "store") == digests(embedded("int8"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_changes_bytes_is_caught_at_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = os.pwrite

    def spoil(number: int, data: Any, offset: int) -> int:
        spoiled = bytearray(data)
        if offset and len(spoiled) > 50:
            spoiled[50] ^= 4
        return true(number, spoiled, offset)

    monkeypatch.setattr(os, "pwrite", spoil)
    with pytest.raises(
        StoreError, match=r"the disk gives back other bytes than were written, from byte [\d,]+ on$"
    ):
        make_store(tiny("bloom", torch.bfloat16), tmp_path / "store", "int8")
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_tensors_that_code_badly_are_stored_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    save_tiny("llama-2", folder, torch.bfloat16, shard="1GB", intermediate_size=600)
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    # Numbers of every size: most have an exponent outside of any sixteen.
    tensors[name] = torch.randn(600, 64).mul(torch.randn(600, 64).mul(30).exp2()).bfloat16()
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    done = make_store(folder, tmp_path / "store", "lossless").manifest
    assert done is not None
    stored = done.files["block-00001.safetensors"].tensors
    assert stored[name].codec is None
    assert stored["model.layers.1.mlp.down_proj.weight"].codec == "lossless"
    with slowllm.load(tmp_path / "store") as lm:
        found = lm._carousel.visit(1, "up", lambda weights: weights[name] + 0)
    assert torch.equal(found, tensors[name])


def test_decoding_without_numba_is_said(
    embedded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(layout_constants, "IS_COMPILED", False)
    with slowllm.load(embedded("lossless")):
        assert "numba is not installed" in caplog.text
    caplog.clear()
    with slowllm.load(embedded("bf16")):
        assert not caplog.text


def test_an_int8_store_on_a_device_without_integer_products_is_one_sentence(
    embedded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldCard(HostDevice):
        def multiplies_integers(self) -> bool:
            return False

    monkeypatch.setattr("slowllm.runtime.load.open_devices", lambda devices: [OldCard()])
    with pytest.raises(
        InputError, match=r"^cpu has no products of 8-bit integers, which an int8 store needs; use"
    ):
        slowllm.load(embedded("int8"))
    with slowllm.load(embedded("int4")) as lm:
        assert math.isfinite(lm.score(["The value is"])[0].log_likelihood)


@pytest.mark.parametrize(
    ("num_bytes", "num_cores", "chosen"),
    [(7_500_000, 2, 1), (0, 8, 1), (4 << 30, 2, 2), (9 << 30, 8, 4), (352 * 10**9, 2, 2)],
)
def test_a_small_checkpoint_is_encoded_by_few_processes(num_bytes: int, num_cores: int, chosen: int) -> None:
    assert choose_workers(num_bytes, num_cores) == chosen
