"""Formats are passed in turn on a tiny model, whose times mean nothing; and what is made of times, made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import format_passes, forward_pass, lossless_size, make_checkpoint, passes, sentences, sides
from benchmarks.decoded import first_block
from tests.benchmarks.test_native_weights import WIDE


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny geometry be wide enough for groups, and each side run in this process."""
    monkeypatch.setitem(make_checkpoint.GEOMETRIES, "tiny", ("llama", 8, WIDE))
    monkeypatch.setattr(make_checkpoint, "POOL_ELEMENTS", 300_000)

    def run_side(_module: str, name: str, task: dict[str, Any], **_: object) -> dict[str, Any]:
        found = {**passes.RUNNERS[name](sentences.Task(**task)), "peak_rss_bytes": sides.peak_rss_bytes()}
        return dict(json.loads(json.dumps(found)))

    monkeypatch.setattr(sides, "run", run_side)


OPTIONS = ["--geometry", "tiny", "--blocks", "2", "--ram", "4GiB", "--repeat", "1"]


@pytest.mark.usefixtures("wide")
def test_formats_are_verified_and_passed_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forward_pass.main([*OPTIONS, "--formats", "bf16,fp8,mxfp4,int4,gguf", "--checkpoint", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert list(report["formats"]) == ["bf16", "fp8", "compressed-mxfp4", "compressed-int4", "gguf-q4_k"]
    sizes = {name: row["sweep_bytes"] for name, row in report["formats"].items()}
    assert sizes["bf16"] > sizes["fp8"] > sizes["compressed-mxfp4"]
    assert sizes["compressed-int4"] < sizes["fp8"]
    for name, row in report["formats"].items():
        assert row["limit_s"] >= row["disk_limit_s"] > 0
        assert row["efficiency"] == pytest.approx(row["limit_s"] / row["wall_s"])
        assert any(line.startswith(f"{name} ") for line in lines[:-1]), "each has a row of the table"


@pytest.mark.usefixtures("wide")
def test_a_peer_that_computes_something_else_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []

    def run_program(program: list[str], task: dict[str, Any], **_: object) -> dict[str, Any]:
        assert program[0] == "/other/python"
        told.append(task)
        noise = torch.randn(WIDE["vocab_size"], generator=torch.Generator().manual_seed(0))
        Path(task["logits"]).write_bytes(noise.numpy().tobytes())
        return {}

    monkeypatch.setattr(sides, "run_program", run_program)
    arguments = [
        *OPTIONS,
        "--formats",
        "gguf",
        "--llama-python",
        "/other/python",
        "--checkpoint",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit, match=r"not verified: llama\.cpp's logits and ours have a cosine of"):
        forward_pass.main(arguments)
    assert len(told[0]["ids"]) == 13
    assert told[0]["file"].endswith("tiny.gguf")


def test_the_limit_is_the_slower_of_disk_and_processor() -> None:
    run = {
        "wall_s": 4.0, "weight_bytes": 6_000, "read_bytes": 8_000, "mapped": False, "open_s": 1.0, "wait_s": 0.0,
        "compute_s": 0.0, "peak_rss_bytes": 1, "top": [3],
    }  # fmt: skip
    row = format_passes.of_format([run], disk=2_000, gemm_s=1.0)
    assert (row["sweep_bytes"], row["limit_s"], row["efficiency"]) == (6_000, 3.0, 0.75)
    assert format_passes.of_format([run], disk=2_000, gemm_s=5.0)["efficiency"] == 1.25
    peer = {"open_s": 2.0, "pass_s": 6.0, "wall_s": 8.0, "peak_rss_bytes": 1, "top": [3]}
    found = format_passes.of_llama([peer], row, 0.99)
    assert (found["same_token"], found["of_our_pass"], found["of_ours_with_opening"]) == (True, 1.5, 1.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "bf16,bf17"], "'bf17' is no format"),
        (["--formats", "int4,compressed-int4"], "or named twice"),
        (["--formats", "bf16", "--case", "mixed"], "in one sweep of the case uniform"),
        (["--formats", "bf16", "--llama-python", "python"], "passes one sequence of the format gguf"),
        (["--llama-python", "python"], "passes one sequence of the format gguf"),
    ],
)
def test_formats_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        forward_pass.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("storage", ["compressed-int4", "compressed-mxfp4"])
def test_the_reference_decodes_as_compressed_tensors_does(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_checkpoint, "SHARD_BYTES", 100_000)  # codes and scales lie in other shards
    make_checkpoint.make_checkpoint("tiny", 2, tmp_path / "made", storage=storage)
    tensors = dict(first_block(tmp_path / "made"))
    assert not any(".layers.1." in name for name in tensors)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert weight.shape == (WIDE["intermediate_size"], WIDE["hidden_size"])
    assert 0.5 < float(weight.float().std()) * WIDE["hidden_size"] ** 0.5 < 2


def test_lossless_sizes_are_those_of_the_codec(capsys: pytest.CaptureFixture[str]) -> None:
    lossless_size.main(["--rows", "1024", "--width", "1024"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = [row["bytes_a_weight"] for row in found.values()]
    assert sizes == sorted(sizes), "heavier tails have more escapes"
    assert 1.5 < sizes[0] < sizes[-1] < 1.51
    assert all(2 < row["exponent_bits"] < 3.2 for row in found.values())


@pytest.mark.parametrize(("rows", "message"), [("3", "must be a multiple")])
def test_a_matrix_that_is_no_whole_number_of_pieces_is_refused(
    rows: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        lossless_size.main(["--rows", rows])
    assert message in capsys.readouterr().err
