"""Random weights as checkpoints store them: in bfloat16, or in the quantised formats of their makers.

Knows names and shapes of tensors; writes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Makes so many elements.
Draw = Callable[[int, torch.Generator], Tensor]
BLOCK = 128
# Of these matrices, makers leave the weights as they are.
_PLAIN = ("embed", "lm_head", "norm", "router", ".gate.weight")
_DEGREES = 4
# The standard deviation of codes of 4 bits.
_SPREAD = 2.5


@dataclass(frozen=True)
class StoredArray:
    """An array of a checkpoint.

    Attributes:
        name: on disk.
        dtype: safetensors' name of the dtype.
        shape: of the array.
        kind: of its numbers; arrays of one kind are cut from one pool.
        draw: makes the pool.
        content: of an array that is not random.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    draw: Draw
    content: Tensor | None = None

    @property
    def num_elements(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)


def _constant(value: float) -> Draw:
    return lambda count, _: torch.full((count,), value, dtype=torch.bfloat16)


def _normal(scale: float) -> Draw:
    return lambda count, generator: torch.randn(count, generator=generator).mul_(scale).to(torch.bfloat16)


def _heavy_tailed(count: int, generator: torch.Generator) -> Tensor:
    """Return numbers of Student's t-distribution, as quotients of normal ones and roots of chi-squared ones."""
    normal = torch.randn(count, generator=generator)
    squares = sum(torch.randn(count, generator=generator).square_() for _ in range(_DEGREES))
    assert isinstance(squares, Tensor)
    return normal.div_((squares / _DEGREES).sqrt_())


def _fp8_codes(count: int, generator: torch.Generator) -> Tensor:
    values = _heavy_tailed(count, generator)
    # The largest of a block is at the end of the range; blocks differ in where that is.
    largest = float(values.abs().topk(max(1, count // (BLOCK * BLOCK))).values.min())
    return values.mul_(448 / largest).clamp_(-448, 448).to(torch.float8_e4m3fn)


def _fp8_scales(width: int) -> Draw:
    typical = 8.0 / (448 * math.sqrt(width))
    return lambda count, generator: torch.randn(count, generator=generator).mul_(0.5).exp_().mul_(typical)


def bfloat16_array(name: str, tensor: Tensor) -> StoredArray:
    """Return how a tensor is stored in bfloat16: norms are one, biases zero, and weights normal."""
    shape = tuple(tensor.shape)
    if tensor.dim() == 1:
        value = 0.0 if name.endswith("bias") else 1.0
        return StoredArray(name, "BF16", shape, f"all {value}", _constant(value))
    scale = 0.02 if "embed" in name else 1 / math.sqrt(shape[-1])
    return StoredArray(name, "BF16", shape, f"normal {scale}", _normal(scale))


def fp8_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by DeepSeek-V3's format: matrices of blocks in e4m3, a scale for each 128 x 128."""
    if tensor.dim() < 2 or any(word in name for word in _PLAIN):
        return [bfloat16_array(name, tensor)]
    *outer, rows, width = tensor.shape
    grid = (*outer, -(-rows // BLOCK), -(-width // BLOCK))
    return [
        StoredArray(name, "F8_E4M3", tuple(tensor.shape), "fp8", _fp8_codes),
        StoredArray(f"{name}_scale_inv", "F32", grid, f"scales {width}", _fp8_scales(width)),
    ]


def _bytes(low: int, high: int) -> Draw:
    """Return what draws bytes from `low` to below `high`."""
    return lambda count, generator: torch.randint(low, high, (count,), generator=generator, dtype=torch.uint8)


def mxfp4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by gpt-oss: experts transposed, in e2m1, an exponent for each 32 numbers."""
    if tensor.dim() != 3:
        return [bfloat16_array(name, tensor)]
    experts, width, rows = tensor.shape
    grid = (experts, rows, width // 32)
    return [
        StoredArray(f"{name}_blocks", "U8", (*grid, 16), "e2m1", _bytes(0, 256)),
        StoredArray(f"{name}_scales", "U8", grid, "exponents", _bytes(118, 122)),
    ]


def fp4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by DeepSeek-V4's format: experts in e2m1, an exponent for each 32, the rest in float8."""
    if ".experts." not in name or not name.endswith(".weight"):
        return fp8_arrays(name, tensor)
    rows, width = tensor.shape
    return [
        StoredArray(name, "I8", (rows, width // 2), "e2m1", _bytes(0, 256)),
        StoredArray(f"{name}_scale_inv", "F8_E8M0", (rows, width // 32), "exponents", _bytes(118, 122)),
    ]


def _words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator, dtype=torch.int64).int()


def int4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by compressed-tensors: integers of 4 bits, a scale for each 128 of a row."""
    if tensor.dim() != 2 or any(word in name for word in _PLAIN):
        return [bfloat16_array(name, tensor)]
    if tensor.shape[1] % BLOCK:  # groups fill their rows
        return [bfloat16_array(name, tensor)]
    (rows, width), module = tensor.shape, name.removesuffix(".weight")
    scale = 1 / (8 * math.sqrt(width))
    return [
        StoredArray(f"{module}.weight_packed", "I32", (rows, width // 8), "words", _words),
        StoredArray(
            f"{module}.weight_scale", "BF16", (rows, width // BLOCK), f"all {scale}", _constant(scale)
        ),
    ]


def nvfp4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by modelopt: in e2m1, an e4m3 scale for each 16 numbers of a row."""
    if tensor.dim() != 2 or any(word in name for word in _PLAIN):
        return [bfloat16_array(name, tensor)]
    rows, width = tensor.shape
    number = 1 / (1000 * math.sqrt(width))
    return [
        StoredArray(name, "U8", (rows, width // 2), "e2m1", _bytes(0, 256)),
        StoredArray(f"{name}_scale", "F8_E4M3", (rows, width // 16), "e4m3", _bytes(104, 120)),
        StoredArray(
            f"{name}_scale_2", "F32", (1,), f"number {number}", lambda count, _: torch.full((count,), number)
        ),
    ]


def _packed_words(count: int, generator: torch.Generator) -> Tensor:
    """Return words of eight codes of 4 bits, most of them near the middle, as those of weights are."""
    words = torch.zeros(count, dtype=torch.int64)
    for place in range(8):
        codes = torch.randn(count, generator=generator).mul_(_SPREAD).add_(8).round_().clamp_(0, 15)
        words |= codes.to(torch.int64) << 4 * place
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _equal_words(word: int) -> Draw:
    return lambda count, _: torch.full((count,), word, dtype=torch.int32)


def _half_scales(width: int) -> Draw:
    draw = _fp8_scales(width)
    return lambda count, generator: draw(count, generator).mul_(448 / 8 / _SPREAD).to(torch.float16)


def packed_arrays(method: str) -> Callable[[str, Tensor], list[StoredArray]]:
    """Return what says how a tensor is stored by GPTQ or AWQ: 4 bits, groups of 128; experts each by themselves."""

    def arrays_of(name: str, tensor: Tensor) -> list[StoredArray]:
        if tensor.dim() < 2 or any(word in name for word in _PLAIN):
            return [bfloat16_array(name, tensor)]
        stem, (rows, width) = name.removesuffix(".weight"), tensor.shape
        groups = -(-width // BLOCK)
        codes = (width // 8, rows) if method == "gptq" else (width, rows // 8)
        zero = 0x77777777 if method == "gptq" else -0x77777778
        return [
            StoredArray(f"{stem}.qweight", "I32", codes, "packed words", _packed_words),
            StoredArray(f"{stem}.qzeros", "I32", (groups, rows // 8), f"zeros {zero}", _equal_words(zero)),
            StoredArray(f"{stem}.scales", "F16", (groups, rows), f"half {width}", _half_scales(width)),
        ]

    return arrays_of


def fbgemm_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by FBGEMM: e4m3 with a scale for each row."""
    if tensor.dim() != 2 or any(word in name for word in _PLAIN):
        return [bfloat16_array(name, tensor)]
    rows, width = tensor.shape
    return [
        StoredArray(name, "F8_E4M3", (rows, width), "fp8", _fp8_codes),
        StoredArray(f"{name}_scale", "F32", (rows, 1), f"scales {width}", _fp8_scales(width)),
    ]


# The numbers of nf4, and a table for scales.
_NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
_NF4_BLOCK = 64


def _random_bytes(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)


def _same(value: float) -> Draw:
    return lambda count, _: torch.full((count,), value)


def _written(name: str, dtype: str, content: Tensor) -> StoredArray:
    return StoredArray(name, dtype, tuple(content.shape), "", _random_bytes, content)


def nf4_arrays(name: str, tensor: Tensor) -> list[StoredArray]:
    """Return how a tensor is stored by bitsandbytes: nf4 in blocks of 64, whose scales are coded as well."""
    if tensor.dim() < 2 or any(word in name for word in _PLAIN):
        return [bfloat16_array(name, tensor)]
    size, typical = tensor.numel(), 1 / math.sqrt(tensor.shape[-1])
    blocks = -(-size // _NF4_BLOCK)
    state = {
        "quant_type": "nf4", "blocksize": _NF4_BLOCK, "dtype": "bfloat16", "shape": list(tensor.shape),
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.5 * typical,
    }  # fmt: skip
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    spread = f"spread {typical}"
    return [
        StoredArray(name, "U8", (-(-size // 2), 1), "bytes", _random_bytes),
        StoredArray(f"{name}.absmax", "U8", (blocks,), "bytes", _random_bytes),
        StoredArray(f"{name}.nested_absmax", "F32", (-(-blocks // 256),), spread, _same(0.5 * typical)),
        _written(f"{name}.quant_map", "F32", torch.tensor(_NF4)),
        _written(f"{name}.nested_quant_map", "F32", torch.linspace(-1, 1, 256)),
        _written(f"{name}.quant_state.bitsandbytes__nf4", "U8", text),
    ]


@dataclass(frozen=True)
class StorageFormat:
    """How a checkpoint stores its tensors.

    Attributes:
        arrays_of: returns the arrays of a tensor.
        settings: what config.json says of the format; None for a plain one.
    """

    arrays_of: Callable[[str, Tensor], Iterable[StoredArray]]
    settings: Mapping[str, Any] | None = None


_FP8_SETTINGS = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}
FORMATS: Mapping[str, StorageFormat] = {
    "bf16": StorageFormat(lambda name, tensor: [bfloat16_array(name, tensor)]),
    "fp4": StorageFormat(fp4_arrays, _FP8_SETTINGS),
    "fp8": StorageFormat(fp8_arrays, _FP8_SETTINGS),
    "compressed-int4": StorageFormat(
        int4_arrays,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": BLOCK},
                }
            },
        },
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
