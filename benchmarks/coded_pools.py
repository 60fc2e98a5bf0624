"""Code matrices by the rules of the formats in which models are published: pools for `heavy_tails`.

Each function takes a matrix (rows, columns) in float32 whose rows are units of the format, or fill them, and returns its arrays.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.heavy_tails import STEP, Pool

BLOCK = 128
NF4_BLOCK, NF4_NESTED = 64, 256
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Where AWQ puts each of eight neighbouring outputs.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _in_steps(array: Tensor, lines: int, size: int, step: int) -> Tensor:
    """Return (rows, columns) as (units, lines, steps, elements), with a single step where steps do not come out even."""
    rows, columns = array.shape
    if size % step or columns % max(1, size // step):
        return array.reshape(rows // lines, lines, 1, columns)
    num_steps = size // step
    return array.reshape(rows // lines, lines, num_steps, columns // num_steps)


def bf16(matrix: Tensor) -> Pool:
    """Round to bfloat16."""
    return {"": _in_steps(matrix.to(torch.bfloat16), 1, matrix.shape[1], STEP)}


def fp8(matrix: Tensor) -> Pool:
    """Code in e4m3 with a scale for each 128 x 128: the largest of a block becomes 448."""
    return _fp8(matrix, _blocks(matrix).abs().amax((1, 3)).div_(448))


def fp8_exponents(matrix: Tensor) -> Pool:
    """Code in e4m3 with a power of two for each 128 x 128, of which the exponent is stored: no number exceeds 448."""
    exponents = _blocks(matrix).abs().amax((1, 3)).div_(448).log2_().ceil_()
    pool = _fp8(matrix, exponents.exp2())
    return {**pool, "scales": _in_steps(exponents.add_(127).to(torch.uint8), 1, matrix.shape[1], BLOCK)}


def _blocks(matrix: Tensor) -> Tensor:
    """Return a matrix as (blocks down, 128, blocks across, 128), with zeros where its columns do not fill blocks."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % BLOCK))
    return padded.view(len(matrix) // BLOCK, BLOCK, -1, BLOCK)


def _fp8(matrix: Tensor, scales: Tensor) -> Pool:
    rows, width = matrix.shape
    codes = (_blocks(matrix) / scales[:, None, :, None]).clamp_(-448, 448).view(rows, -1)[:, :width]
    return {
        "": _in_steps(codes.to(torch.float8_e4m3fn), BLOCK, width, BLOCK),
        "scales": _in_steps(scales, 1, width, BLOCK),
    }


def fp8_rows(matrix: Tensor) -> Pool:
    """Code in e4m3 with a scale for each row."""
    scales = matrix.abs().amax(1, keepdim=True).div_(448)
    codes = (matrix / scales).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return {"": _in_steps(codes, 1, matrix.shape[1], STEP), "scales": scales.view(-1, 1, 1, 1)}


def _e2m1(scaled: Tensor) -> Tensor:
    """Return the nearest codes of 4 bits, uint8."""
    levels = torch.tensor(_E2M1)
    codes = torch.bucketize(scaled.abs(), (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes.add_((scaled < 0).to(torch.uint8), alpha=8)


def _pairs(codes: Tensor) -> Tensor:
    """Return two codes in a byte, the first in the lower half."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def mxfp4(matrix: Tensor) -> Pool:
    """Code in e2m1 with an exponent for each 32 of a row: two below that of the largest."""
    rows, width = matrix.shape
    groups = matrix.view(rows, width // 32, 32)
    exponents = groups.abs().amax(2).log2_().floor_().sub_(2)
    codes = _pairs(_e2m1(groups / exponents.exp2()[..., None]))
    return {
        "": _in_steps(codes.view(rows, -1), 1, width, 32),
        "scales": _in_steps(exponents.add_(127).to(torch.uint8), 1, width, 32),
    }


def nvfp4(matrix: Tensor) -> Pool:
    """Code in e2m1 with an e4m3 scale for each 16 of a row, and one in float32 for all."""
    rows, width = matrix.shape
    groups = matrix.view(rows, width // 16, 16)
    largest = groups.abs().amax(2)
    whole = largest.max() / (6 * 448)
    scales = (largest / 6 / whole).clamp_(2**-9, 448).to(torch.float8_e4m3fn)
    codes = _pairs(_e2m1(groups / (scales.float() * whole)[..., None]))
    return {
        "": _in_steps(codes.view(rows, -1), 1, width, 16),
        "scales": _in_steps(scales, 1, width, 16),
        "whole": whole.view(1, 1, 1, 1),
    }


def _words(codes: Tensor) -> Tensor:
    """Return eight codes (..., 8) in a word of 32 bits, the first in the lowest."""
    words = functools.reduce(torch.bitwise_or, (codes[..., n].int() << 4 * n for n in range(8)))
    return words.to(torch.int32)


def int4(matrix: Tensor) -> Pool:
    """Code in integers of 4 bits from -8, with a bfloat16 scale for each 128 of a row."""
    rows, width = matrix.shape
    groups = matrix.view(rows, width // BLOCK, BLOCK)
    scales = groups.abs().amax(2).div_(7.5).to(torch.bfloat16)
    codes = (groups / scales[..., None].float()).round_().clamp_(-8, 7).add_(8)
    return {
        "": _in_steps(_words(codes.view(rows, width // 8, 8)), 1, width, BLOCK),
        "scales": _in_steps(scales, 1, width, BLOCK),
    }


def gptq(matrix: Tensor) -> Pool:
    """Code the transposed matrix (inputs, outputs) in 4 bits, with a scale for 128 inputs of an output, and zeros of 8."""
    inputs, outputs = matrix.shape
    groups = matrix.view(inputs // BLOCK, BLOCK, outputs)
    scales = groups.abs().amax(1).div_(7.5).to(torch.float16)
    codes = (groups / scales[:, None].float()).round_().clamp_(-8, 7).add_(8)
    words = _words(codes.view(inputs // 8, 8, outputs).movedim(1, 2))
    zeros = torch.full((inputs // BLOCK, outputs // 8), 0x77777777, dtype=torch.int32)
    return {
        "": _in_steps(words, BLOCK // 8, outputs, STEP),
        "zeros": _in_steps(zeros, 1, outputs, STEP),
        "scales": _in_steps(scales, 1, outputs, STEP),
    }


def awq(matrix: Tensor) -> Pool:
    """Code the transposed matrix (inputs, outputs) in 4 bits, with a scale and a zero for 128 inputs of an output."""
    inputs, outputs = matrix.shape
    groups = matrix.view(inputs // BLOCK, BLOCK, outputs)
    lowest, highest = groups.amin(1).clamp_(max=0), groups.amax(1).clamp_(min=0)
    scales = (highest - lowest).div_(15).to(torch.float16)
    zeros = (-lowest / scales.float()).round_().clamp_(0, 15)
    codes = (groups / scales[:, None].float()).add_(zeros[:, None]).round_().clamp_(0, 15)
    words = [_words(x.reshape(len(x), -1, 8)[..., _AWQ_ORDER]) for x in (codes.view(inputs, outputs), zeros)]
    return {
        "": _in_steps(words[0], BLOCK, outputs, STEP),
        "zeros": _in_steps(words[1], 1, outputs, STEP),
        "scales": _in_steps(scales, 1, outputs, STEP),
    }


def nf4(matrix: Tensor, offset: float) -> Pool:
    """Code in nf4 in blocks of 64 that run on from row to row, whose scales, less an offset, are coded in 8 bits."""
    size = matrix.numel() // (NF4_BLOCK * NF4_NESTED) * NF4_BLOCK * NF4_NESTED
    blocks = matrix.reshape(-1)[:size].view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1)
    table = torch.tensor(NF4)
    codes = torch.bucketize(blocks / largest[:, None], (table[1:] + table[:-1]) / 2, out_int32=True).byte()
    rest = largest.view(-1, NF4_NESTED) - offset
    nested = rest.abs().amax(1, keepdim=True)
    return {
        "": (codes[:, ::2] << 4 | codes[:, 1::2]).view(len(rest), 1, 1, -1),
        "scales": (rest / nested).add_(1).mul_(127.5).round_().byte().view(len(rest), 1, 1, -1),
        "nested": nested.view(-1, 1, 1, 1),
    }
