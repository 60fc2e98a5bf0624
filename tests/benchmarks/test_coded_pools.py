"""What the benchmarks code is what they drew: each format's codes, decoded by its makers or by slowllm, are near the drawn matrix."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import slowllm
from benchmarks import coded_pools, expert_counts, gguf_blocks, heavy_tails, make_checkpoint
from tests.benchmarks.test_native_weights import WIDE
from tests.support.cases import quick_and_long

# The distance of coded weights from the drawn ones, of their norm: of 8 bits, and of 4.
DISTANCE = {"fp8": 0.04, "fbgemm_fp8": 0.04, "bf16": 0.003}
DISTANCE_OF_FOUR_BITS = 0.2


def drawn(num_rows: int, num_columns: int) -> Tensor:
    return heavy_tails.matrix(num_rows, num_columns, 0.1, torch.Generator().manual_seed(0))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def test_weights_have_heavy_tails_and_rows_of_unequal_size() -> None:
    weights = drawn(2048, 512)
    assert 0.07 < float(weights.std()) < 0.13
    assert float(weights.abs().max() / weights.std()) > 12
    assert 0.25 < float(weights.square().mean(1).log().std()) / 2 < 0.5
    assert 0.25 < float(weights.square().mean(0).log().std()) / 2 < 0.5


def test_arrays_of_a_tensor_are_cut_from_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heavy_tails, "_WRITTEN_AT_ONCE", 1000)
    numbers = torch.arange(10 * 2 * 3 * 4, dtype=torch.int32).view(10, 2, 3, 4)
    pool = {"": numbers, "scales": numbers[:, :1, :, :1].clone(), "row": numbers[:, :1, :1, :1].clone()}
    size = 33 * 2 * 3 * 4 - 5
    parts = {
        part: torch.cat(list(heavy_tails.bytes_of(pool, part, count, torch.Generator().manual_seed(7)))).view(
            torch.int32
        )
        for part, count in {"": size, "scales": 33 * 3, "row": 33}.items()
    }
    assert len(parts[""]) == size
    whole = torch.nn.functional.pad(parts[""], (0, 5)).view(33, 2, 3, 4)
    assert torch.equal(whole[:, 0, :, 0], parts["scales"].view(33, 3))
    assert torch.equal(whole[:, 0, :, 0].amin(1), parts["row"]), "shifted columns are of the same row"


def test_mxfp4_is_decoded_by_transformers_to_what_was_drawn() -> None:
    matrix = drawn(64, 96)
    pool = coded_pools.mxfp4(matrix)
    stored = pool[""].view(1, 64, 3, 16), pool["scales"].view(1, 64, 3)
    decoded = convert_moe_packed_tensors(*stored, dtype=torch.float32)  # (experts, inputs, outputs)
    assert distance(decoded[0].T, matrix) < DISTANCE_OF_FOUR_BITS


def test_float8_with_exponents_is_near_what_was_drawn_and_uses_the_range_of_its_codes() -> None:
    matrix = drawn(256, 192)
    pool = coded_pools.fp8_exponents(matrix)
    codes, exponents = pool[""].reshape(256, 192).float(), pool["scales"].reshape(2, 2).float() - 127
    scales = exponents.exp2().repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :192]
    assert distance(codes * scales, matrix) < DISTANCE["fp8"]
    for rows in codes.split(128):
        for block in rows.split(128, 1):
            assert 224 <= block.abs().max() <= 448


@pytest.mark.parametrize(("kind", "limit"), [("q4_k", 0.12), ("q6_k", 0.03), ("q8_0", 0.01)])
def test_gguf_blocks_are_decoded_by_llama_cpps_package_to_what_was_drawn(kind: str, limit: float) -> None:
    matrix = drawn(64, 512)
    blocks = gguf_blocks.encode(kind)(matrix)[""].view(64, -1).numpy()
    decoded = quants.dequantize(blocks, GGMLQuantizationType[kind.upper()])
    assert distance(torch.from_numpy(np.ascontiguousarray(decoded)), matrix) < limit


@pytest.mark.parametrize(
    "storage",
    quick_and_long(
        ["bf16", "fp8", "fbgemm_fp8", "compressed-int4", "compressed-mxfp4", "nvfp4", "gptq", "awq", "nf4"],
        ["bf16", "fp8", "compressed-int4", "nf4"],
    ),
)
def test_a_product_with_coded_weights_is_near_that_with_the_drawn_ones(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_checkpoint, "POOL_ELEMENTS", 300_000)
    monkeypatch.setitem(make_checkpoint.GEOMETRIES, "tiny", ("llama", 8, WIDE))
    matrices: dict[tuple[int, int], Tensor] = {}
    draw = heavy_tails.matrix

    def kept(rows: int, columns: int, deviation: float, generator: torch.Generator) -> Tensor:
        matrix = draw(rows, columns, deviation, generator)
        matrices.setdefault((columns, int(1e6 * deviation)), matrix.clone())
        return matrix

    monkeypatch.setattr(heavy_tails, "matrix", kept)
    # Each tensor is the pool's beginning.
    monkeypatch.setattr(heavy_tails, "place", lambda _size, _generator: 0)
    make_checkpoint.make_checkpoint("tiny", 1, tmp_path / "made", storage=storage)
    seen: dict[str, Tensor] = {}

    def keep(_module: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(x=inputs[0][0].clone(), y=output[0].clone())

    with slowllm.load(tmp_path / "made", dtype="float32") as lm, torch.no_grad():
        lm.model.model.layers[0].mlp.up_proj.register_forward_hook(keep)
        lm.model(torch.arange(5, 25)[None])
    rows, width = WIDE["intermediate_size"], WIDE["hidden_size"]
    transposed = storage in ("gptq", "awq")
    matrix = matrices[rows if transposed else width, int(1e6 * width**-0.5)]
    weights = matrix[:width].T if transposed else matrix[:rows]
    assert distance(seen["y"], seen["x"] @ weights.T) < DISTANCE.get(storage, DISTANCE_OF_FOUR_BITS)


MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek": (
        "deepseek_v3", "fp8",
        {
            "n_routed_experts": 32, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
            "moe_intermediate_size": 128, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
    "gpt_oss": ("gpt_oss", "mxfp4", {"num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 32}),
    "qwen3": (
        "qwen3_moe", "fp8", {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "head_dim": 32},
    ),
    "mixtral": ("mixtral", "bf16", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}  # fmt: skip


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def made(name: str) -> Path:
        kind, storage, more = MIXTURES[name]
        out = tmp_path_factory.mktemp("mixtures") / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(make_checkpoint, "POOL_ELEMENTS", 300_000)
            patch.setitem(make_checkpoint.GEOMETRIES, "tiny", (kind, 8, {**WIDE, **more}))
            make_checkpoint.make_checkpoint("tiny", 3, out, storage=storage)
        return out

    return made


@pytest.mark.parametrize("name", quick_and_long(sorted(MIXTURES), quick=["deepseek"]))
def test_experts_are_unequally_popular_in_another_order_in_each_block(
    name: str, mixture: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mixture(name)
    expert_counts.main(["--checkpoint", str(folder), "--tokens", "1,24"])
    shown = capsys.readouterr().out.splitlines()
    report = json.loads(shown[-1])
    top = MIXTURES[name][2]["num_experts_per_tok"]
    num_blocks = 2 if name == "deepseek" else 3
    assert list(report["counts"]["1"].values()) == [top] * num_blocks
    assert all(top < count <= report["num_experts"] for count in report["counts"]["24"].values())
    assert [line.split()[0] for line in shown[:-1]] == ["tokens", "1", "24"]

    chosen: dict[str, list[Tensor]] = {}
    with slowllm.load(folder, dtype="float32") as lm, torch.no_grad():
        for key, router in expert_counts.routers_of(lm.model).items():
            router.register_forward_hook(
                lambda _m, _i, output, key=key: chosen.setdefault(key, []).append(output[2].flatten())
            )
        lm.model(torch.randperm(4000, generator=torch.Generator().manual_seed(0))[None, :600] + 5)
    orders = set()
    for indices in chosen.values():
        counts = torch.cat(indices).bincount(minlength=report["num_experts"]).sort(descending=True)
        share = counts.values / counts.values.sum()
        assert float(share[0]) > 1.6 / report["num_experts"], "the favourite is asked more often"
        orders.add(tuple(counts.indices[: len(counts.indices) // 2].tolist()))
    assert len(orders) == num_blocks
