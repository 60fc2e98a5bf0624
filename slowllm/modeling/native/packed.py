"""Find weights that are packed in words of 32 bits, with scales and zeros for groups of inputs: GPTQ and AWQ."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slowllm.errors import CheckpointError
from slowllm.modeling.native.coded_tensor import CodedPart, CodedTensor
from slowllm.rounding import ceil_div
from slowllm.storage.spans import Span

# Of these, a matrix is that of a linear layer, also where the layer is GPT-2's, which has it transposed.
PACKED_CODECS = ("gptq", "gptq_v2", "awq")
_BITS = (2, 3, 4, 8)
_LARGEST = 1 << 31
_SCALES = ("F16", "BF16")


@dataclass(frozen=True)
class _Arrays:
    """The arrays of a matrix as they are stored."""

    stem: str
    codes: Span
    zeros: Span
    scales: Span
    order: Span | None


def find_gptq(settings: Mapping[str, Any], spans: Mapping[str, Span]) -> tuple[list[CodedTensor], set[str]]:
    """Return the weights in GPTQ's format, and the names of all spans that belong to them.

    Args:
        settings: of config.json.
        spans: of the checkpoint.
    Raises:
        CheckpointError: an array is missing, or does not go with its weight; or config.json names a layout that is not read.
    """
    version = _word(settings, ("checkpoint_format", "format"), "gptq")
    if version not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise CheckpointError(
            f"config.json: a layout of GPTQ, {'marlin' if version == 'gptq' else version}, is not read; there are gptq and "
            "gptq_v2: use a checkpoint in one of these, or the original one in bfloat16 or float16"
        )
    bits, group = _bits_of(settings), _group_of(settings)
    # Rules for single modules, which the arrays' shapes show.
    varies = bool(settings.get("dynamic"))
    needs_order = settings.get("desc_act") is True

    def coded(arrays: _Arrays) -> CodedTensor:
        return _gptq(arrays, version, bits, group, varies, needs_order)

    return _found(spans, coded)


def find_awq(settings: Mapping[str, Any], spans: Mapping[str, Span]) -> tuple[list[CodedTensor], set[str]]:
    """Return the weights in AWQ's format, and the names of all spans that belong to them.

    Args:
        settings: of config.json.
        spans: of the checkpoint.
    Raises:
        CheckpointError: an array is missing, or does not go with its weight; or config.json names a layout that is not read.
    """
    version = _word(settings, ("version", "format"), "gemm")
    if version != "gemm" or settings.get("backend") == "llm-awq":
        raise CheckpointError(
            f"config.json: a layout of AWQ, {'llm-awq' if version == 'gemm' else version}, is not read; there is gemm: use a "
            "checkpoint of that version, or the original one in bfloat16 or float16"
        )
    bits, group = _bits_of(settings), _group_of(settings)
    if bits != 4:
        raise CheckpointError(f"config.json: AWQ has 4 bits, not {bits}")
    return _found(spans, lambda arrays: _awq(arrays, group))


def _word(settings: Mapping[str, Any], names: tuple[str, ...], usual: str) -> str:
    found = next((settings[name] for name in names if settings.get(name) is not None), usual)
    return str(found)[:40].lower()


def _bits_of(settings: Mapping[str, Any]) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in _BITS:
        raise CheckpointError(f"config.json: bits is {reprlib.repr(bits)}, not 2, 3, 4 or 8")
    return bits


def _group_of(settings: Mapping[str, Any]) -> int | None:
    """Return how many inputs share a scale; None if all do."""
    group = settings.get("group_size", settings.get("q_group_size", 128))
    if not isinstance(group, int) or isinstance(group, bool) or not (group == -1 or 0 < group < _LARGEST):
        raise CheckpointError(
            f"config.json: group_size is {reprlib.repr(group)}, not a number such as 128, or -1"
        )
    return None if group == -1 else group


def _found(
    spans: Mapping[str, Span], coded: Callable[[_Arrays], CodedTensor]
) -> tuple[list[CodedTensor], set[str]]:
    found, used = list[CodedTensor](), set[str]()
    for name, codes in spans.items():
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        for other in ("qzeros", "scales"):
            if f"{stem}.{other}" not in spans:
                raise CheckpointError(
                    f"{codes.path.name}: {name} has no {stem}.{other}; fetch all shards and the index again"
                )
        order = spans.get(f"{stem}.g_idx")
        arrays = _Arrays(stem, codes, spans[f"{stem}.qzeros"], spans[f"{stem}.scales"], order)
        used |= {name, arrays.zeros.name, arrays.scales.name} | ({order.name} if order else set())
        found.append(coded(arrays))
    for name, span in spans.items():
        # Scales of an activation, which AWQ has for some models, would have to be divided by.
        if name not in used and name.endswith((".qzeros", ".scales", ".g_idx")):
            raise CheckpointError(
                f"{span.path.name}: {name} has no {name.rpartition('.')[0]}.qweight; fetch all shards and the index again, or use "
                "another checkpoint of the model"
            )
    return found, used


def _gptq(
    arrays: _Arrays, version: str, bits: int, group: int | None, varies: bool, needs_order: bool
) -> CodedTensor:
    codes, order = arrays.codes, arrays.order
    if codes.dtype != "I32" or len(codes.shape) != 2 or 0 in codes.shape:
        raise _mismatch(codes, codes, "no codes that are packed in words of 32 bits")
    height, rows = codes.shape
    if order is not None:
        if order.dtype != "I32" or len(order.shape) != 1 or 0 in order.shape:
            raise _mismatch(order, codes, "no groups of its inputs")
        width = order.shape[0]
        if varies and 32 * height % width == 0:
            bits = 32 * height // width
    else:
        width = 32 * height // bits
    if bits not in _BITS or width * bits != 32 * height:
        raise _mismatch(order or codes, codes, f"not what codes of {bits} bits need")
    groups = arrays.scales.shape[0] if len(arrays.scales.shape) == 2 else 0
    size = group or width
    if varies and groups and ceil_div(width, size) != groups and width % groups == 0:
        size = width // groups
    if needs_order and order is None and groups > 1:
        raise CheckpointError(
            f"{codes.path.name}: {codes.name} has no {arrays.stem}.g_idx, which desc_act in config.json calls for; fetch all shards "
            "and the index again"
        )
    num_groups = ceil_div(width, size)
    _check(arrays.scales, codes, (num_groups, rows), _SCALES)
    if rows * bits % 32:
        raise _mismatch(codes, codes, f"codes of {bits} bits whose zeros fill no words")
    _check(arrays.zeros, codes, (num_groups, rows * bits // 32), ("I32",))
    parts = [
        CodedPart("codes", codes, codes.shape),
        CodedPart("zeros", arrays.zeros, arrays.zeros.shape),
        CodedPart("scales", arrays.scales, arrays.scales.shape),
    ]
    if order is not None:
        parts.append(CodedPart("order", order, order.shape))
    return CodedTensor(f"{arrays.stem}.weight", (rows, width), version, tuple(parts), (1, size))


def _awq(arrays: _Arrays, group: int | None) -> CodedTensor:
    codes = arrays.codes
    if codes.dtype != "I32" or len(codes.shape) != 2 or 0 in codes.shape:
        raise _mismatch(codes, codes, "no codes that are packed in words of 32 bits")
    width, rows = codes.shape[0], 8 * codes.shape[1]
    size = group or width
    num_groups = ceil_div(width, size)
    _check(arrays.scales, codes, (num_groups, rows), _SCALES)
    _check(arrays.zeros, codes, (num_groups, codes.shape[1]), ("I32",))
    if arrays.order is not None:
        raise _mismatch(arrays.order, codes, "which AWQ does not have")
    parts = (
        CodedPart("codes", codes, codes.shape),
        CodedPart("zeros", arrays.zeros, arrays.zeros.shape),
        CodedPart("scales", arrays.scales, arrays.scales.shape),
    )
    return CodedTensor(f"{arrays.stem}.weight", (rows, width), "awq", parts, (1, size))


def _check(span: Span, codes: Span, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if span.shape != shape or span.dtype not in dtypes:
        raise _mismatch(span, codes, f"not {' or '.join(dtypes)} of shape {list(shape)}")


def _mismatch(span: Span, codes: Span, said: str) -> CheckpointError:
    of = "" if span is codes else f" for {codes.name} of shape {list(codes.shape)}"
    return CheckpointError(
        f"{span.path.name}: {span.name} is {span.dtype} of shape {list(span.shape)}, {said}{of}; config.json and the weights do not "
        "belong together"
    )
