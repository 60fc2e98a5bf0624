"""Random weights as checkpoints store them: in bfloat16, or in the quantised formats of their makers.

Knows names and shapes of tensors; writes nothing. How weights are spread is in `heavy_tails`, how they are coded in `coded_pools`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import coded_pools, deepseek_v4, heavy_tails
from benchmarks.coded_pools import BLOCK, NF4, NF4_BLOCK, NF4_NESTED
from benchmarks.heavy_tails import Encode, Pool
from benchmarks.routers import is_router, router_content
from slowllm.storage.spans import DTYPE_NAMES

# Of these matrices, makers leave the weights as they are.
_PLAIN = ("embed", "head.weight", "norm", "router", ".gate.weight", "compressor", "weights_proj")
# What these matrices return is added to the residual stream.
_RESIDUAL = (
    "o_proj",
    "down_proj",
    ".w2.",
    "dense_4h_to_h",
    "attention.dense",
    "attn_output",
    "ffn_down",
    "wo_b",
)
# Of the deviation of other matrices, so that the stream grows slowly and tokens keep what sets them apart.
_OF_RESIDUAL = 0.25


@dataclass(frozen=True)
class PoolKind:
    """What a pool holds.

    Attributes:
        form: name of the format.
        width: number of columns of its matrix.
        deviation: of the weights.
        encode: codes the matrix.
        unit: number of rows that are coded together.
        common: how much of the common direction each row has.
    """

    form: str
    width: int
    deviation: float
    encode: Encode
    unit: int = 1
    common: float = 0.0

    @property
    def name(self) -> str:
        """Name by which pools are kept."""
        return f"{self.form} {self.width} {self.deviation} {self.common}"

    def draw(self, num_elements: int, generator: torch.Generator) -> Pool:
        """Draw the pool, of about as many weights as are given."""
        units = max(2, num_elements // (self.width * self.unit))
        drawn = heavy_tails.matrix(units * self.unit, self.width, self.deviation, generator)
        if self.common:
            drawn += self.common * heavy_tails.common_direction(self.width)
        return self.encode(drawn)


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint.

    Attributes:
        name: on disk.
        dtype: safetensors' name of the dtype.
        shape: of the array.
        origin: name of the tensor of which it is a part.
        kind: of the pool from which it is cut; None for one that has its content.
        part: name of the array in the pool.
        content: of an array that is not cut from a pool; a single element is repeated.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: str = ""
    kind: PoolKind | None = None
    part: str = ""
    content: Tensor | None = None

    @property
    def num_elements(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)


def _is_plain(name: str, tensor: Tensor) -> bool:
    return tensor.dim() < 2 or any(word in name for word in _PLAIN)


def deviation_of(name: str, width: int) -> float:
    """Return the deviation of a matrix's weights, by its name and its number of inputs."""
    return (_OF_RESIDUAL if any(word in name for word in _RESIDUAL) else 1.0) / math.sqrt(width)


def bfloat16_array(name: str, tensor: Tensor) -> StoredArray:
    """Return how a tensor is stored in bfloat16: norms are one, biases zero, and weights heavy-tailed."""
    shape = tuple(tensor.shape)
    if tensor.dim() == 1:
        value = torch.tensor([0.0 if name.endswith("bias") else 1.0], dtype=torch.bfloat16)
        return StoredArray(name, "BF16", shape, content=value)
    common, deviation = 0.0, deviation_of(name, shape[-1])
    if "embed_tokens" in name or name == "embed.weight":
        common, deviation = heavy_tails.COMMON, 1.0
    elif "embed" in name:  # of models that norm it, or whose head it is
        deviation = 0.02
    kind = PoolKind("bf16", shape[-1], deviation, coded_pools.bf16, common=common)
    return StoredArray(name, "BF16", shape, name, kind)


def fp8_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by DeepSeek-V3's format: matrices of blocks in e4m3, a scale for each 128 x 128."""
    if _is_plain(name, tensor):
        return [bfloat16_array(name, tensor)]
    *outer, rows, width = tensor.shape
    assert not outer or rows % BLOCK == 0, "experts side by side have whole blocks"
    grid = (*outer, -(-rows // BLOCK), -(-width // BLOCK))
    kind = PoolKind("fp8", width, deviation_of(name, width), coded_pools.fp8, BLOCK)
    return [
        StoredArray(name, "F8_E4M3", tuple(tensor.shape), name, kind),
        StoredArray(f"{name}_scale_inv", "F32", grid, name, kind, "scales"),
    ]


def mxfp4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by gpt-oss: experts transposed, in e2m1, an exponent for each 32 numbers."""
    if tensor.dim() != 3:
        return [bfloat16_array(name, tensor)]
    experts, width, rows = tensor.shape
    grid = (experts, rows, width // 32)
    kind = PoolKind("mxfp4", width, deviation_of(name, width), coded_pools.mxfp4)
    return [
        StoredArray(f"{name}_blocks", "U8", (*grid, 16), name, kind),
        StoredArray(f"{name}_scales", "U8", grid, name, kind, "scales"),
    ]


def fp4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by DeepSeek-V4's format: experts in e2m1, an exponent for each 32, the rest in e4m3, one for a block."""
    if _is_plain(name, tensor):
        return [bfloat16_array(name, tensor)]
    (rows, width), scales = tensor.shape, f"{name.removesuffix('.weight')}.scale"
    deviation = deviation_of(name, width)
    if ".experts." in name:
        kind = PoolKind("mxfp4", width, deviation, coded_pools.mxfp4)
        dtype, codes, grid = "I8", (rows, width // 2), (rows, width // 32)
    else:
        kind = PoolKind("fp8 exponents", width, deviation, coded_pools.fp8_exponents, BLOCK)
        dtype, codes, grid = "F8_E4M3", (rows, width), (-(-rows // BLOCK), -(-width // BLOCK))
    return [
        StoredArray(name, dtype, codes, name, kind),
        StoredArray(scales, "F8_E8M0", grid, name, kind, "scales"),
    ]


def int4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by compressed-tensors: integers of 4 bits, a scale for each 128 of a row."""
    # Groups fill their rows.
    if _is_plain(name, tensor) or tensor.dim() != 2 or tensor.shape[1] % BLOCK:
        return [bfloat16_array(name, tensor)]
    (rows, width), module = tensor.shape, name.removesuffix(".weight")
    kind = PoolKind("int4", width, deviation_of(name, width), coded_pools.int4)
    return [
        StoredArray(f"{module}.weight_packed", "I32", (rows, width // 8), name, kind),
        StoredArray(f"{module}.weight_scale", "BF16", (rows, width // BLOCK), name, kind, "scales"),
    ]


def compressed_mxfp4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by compressed-tensors in e2m1, an exponent for each 32 numbers of a row."""
    if _is_plain(name, tensor) or tensor.dim() != 2 or tensor.shape[1] % 32:
        return [bfloat16_array(name, tensor)]
    (rows, width), module = tensor.shape, name.removesuffix(".weight")
    kind = PoolKind("mxfp4", width, deviation_of(name, width), coded_pools.mxfp4)
    return [
        StoredArray(f"{module}.weight_packed", "U8", (rows, width // 2), name, kind),
        StoredArray(f"{module}.weight_scale", "U8", (rows, width // 32), name, kind, "scales"),
    ]


def nvfp4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by modelopt: in e2m1, an e4m3 scale for each 16 numbers of a row."""
    if _is_plain(name, tensor) or tensor.dim() != 2:
        return [bfloat16_array(name, tensor)]
    rows, width = tensor.shape
    kind = PoolKind("nvfp4", width, deviation_of(name, width), coded_pools.nvfp4)
    return [
        StoredArray(name, "U8", (rows, width // 2), name, kind),
        StoredArray(f"{name}_scale", "F8_E4M3", (rows, width // 16), name, kind, "scales"),
        StoredArray(f"{name}_scale_2", "F32", (1,), name, kind, "whole"),
    ]


def packed_arrays(method: str) -> Callable[[str, Tensor], list[StoredArray]]:
    """Return what says how a tensor is stored by GPTQ or AWQ: 4 bits, groups of 128; experts each by themselves."""

    def arrays_of(name: str, tensor: Tensor) -> list[StoredArray]:
        if _is_plain(name, tensor):
            return [bfloat16_array(name, tensor)]
        stem, (rows, width) = name.removesuffix(".weight"), tensor.shape
        groups = -(-width // BLOCK)
        codes = (width // 8, rows) if method == "gptq" else (width, rows // 8)
        encode = coded_pools.gptq if method == "gptq" else coded_pools.awq
        # Of the transposed matrix: its columns are outputs.
        kind = PoolKind(method, rows, deviation_of(name, width), encode, BLOCK)
        return [
            StoredArray(f"{stem}.qweight", "I32", codes, name, kind),
            StoredArray(f"{stem}.qzeros", "I32", (groups, rows // 8), name, kind, "zeros"),
            StoredArray(f"{stem}.scales", "F16", (groups, rows), name, kind, "scales"),
        ]

    return arrays_of


def fbgemm_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by FBGEMM: e4m3 with a scale for each row."""
    if _is_plain(name, tensor) or tensor.dim() != 2:
        return [bfloat16_array(name, tensor)]
    rows, width = tensor.shape
    kind = PoolKind("fp8 rows", width, deviation_of(name, width), coded_pools.fp8_rows)
    return [
        StoredArray(name, "F8_E4M3", (rows, width), name, kind),
        StoredArray(f"{name}_scale", "F32", (rows, 1), name, kind, "scales"),
    ]


def _written(name: str, dtype: str, content: Tensor) -> StoredArray:
    return StoredArray(name, dtype, tuple(content.shape), content=content)


def nf4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by bitsandbytes: nf4 in blocks of 64, whose scales are coded as well."""
    if _is_plain(name, tensor):
        return [bfloat16_array(name, tensor)]
    size, width = tensor.numel(), tensor.shape[-1]
    blocks, deviation = -(-size // NF4_BLOCK), deviation_of(name, width)
    offset = 2.5 * deviation  # about the mean of the scales
    state = {
        "quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": "bfloat16", "shape": list(tensor.shape),
        "nested_blocksize": NF4_NESTED, "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    encode = functools.partial(coded_pools.nf4, offset=offset)
    kind = PoolKind("nf4", width, deviation, encode, -(-NF4_BLOCK * NF4_NESTED // width))
    return [
        StoredArray(name, "U8", (-(-size // 2), 1), name, kind),
        StoredArray(f"{name}.absmax", "U8", (blocks,), name, kind, "scales"),
        StoredArray(f"{name}.nested_absmax", "F32", (-(-blocks // NF4_NESTED),), name, kind, "nested"),
        _written(f"{name}.quant_map", "F32", torch.tensor(NF4)),
        _written(f"{name}.nested_quant_map", "F32", torch.linspace(-1, 1, 256)),
        _written(f"{name}.quant_state.bitsandbytes__nf4", "U8", text),
    ]


@dataclass(frozen=True)
class StorageFormat:
    """How a checkpoint stores its tensors.

    Attributes:
        arrays_of: returns the arrays of a tensor.
        settings: what config.json says of the format; None for a plain one.
        is_by_dtype: whether a shard's arrays are in the order of safetensors' own writer, by dtype and name, so that an expert's codes
            lie side by side and its scales elsewhere; else each tensor's arrays lie together.
    """

    arrays_of: Callable[[str, Tensor], Iterable[StoredArray]]
    settings: Mapping[str, Any] | None = None
    is_by_dtype: bool = False


def arrays_of(form: StorageFormat, tensors: Mapping[str, Tensor]) -> Iterator[StoredArray]:
    """Yield the arrays of a checkpoint; of routers and of DeepSeek-V4's small arrays, as they are in all formats.

    Args:
        form: of the checkpoint.
        tensors: of the model by their names on disk; only shapes are looked at.
    """
    num_experts = next((len(tensors[name]) for name in tensors if name.endswith(".ffn.gate.weight")), 0)
    for name, tensor in tensors.items():
        content = deepseek_v4.content_of(name, tensor, num_experts) if num_experts else None
        if content is None and is_router(name):
            content = router_content(name, tuple(tensor.shape), tensors)
        if content is None:
            yield from form.arrays_of(name, tensor)
        else:
            yield _written(name, DTYPE_NAMES[content.dtype], content)


def _compressed(layout: str, kind: str, group: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": kind, "strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


_FP8_SETTINGS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}
FORMATS: Mapping[str, StorageFormat] = {
    "bf16": StorageFormat(lambda name, tensor: [bfloat16_array(name, tensor)]),
    "fp4": StorageFormat(fp4_arrays, {**_FP8_SETTINGS, "scale_fmt": "ue8m0"}, is_by_dtype=True),
    "fp8": StorageFormat(fp8_arrays, _FP8_SETTINGS),
    "compressed-int4": StorageFormat(int4_arrays, _compressed("pack-quantized", "int", BLOCK)),
    "compressed-mxfp4": StorageFormat(
        compressed_mxfp4_arrays, _compressed("mxfp4-pack-quantized", "float", 32)
    ),
    "nvfp4": StorageFormat(nvfp4_arrays, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "mxfp4": StorageFormat(mxfp4_arrays, {"quant_method": "mxfp4"}),
    "gptq": StorageFormat(
        packed_arrays("gptq"),
        {"quant_method": "gptq", "bits": 4, "group_size": BLOCK, "desc_act": False, "sym": True},
    ),
    "awq": StorageFormat(
        packed_arrays("awq"),
        {"quant_method": "awq", "bits": 4, "group_size": BLOCK, "zero_point": True, "version": "gemm"},
    ),
    "fbgemm_fp8": StorageFormat(
        fbgemm_arrays, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    ),
    "nf4": StorageFormat(
        nf4_arrays,
        {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
        },
    ),
}  # fmt: skip
