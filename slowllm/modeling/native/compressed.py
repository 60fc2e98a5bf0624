"""Find weights that compressed-tensors stored: packed integers, float8, and float4, by the names and shapes of the arrays.

Which modules are left plain is seen in the arrays; config.json says how many numbers share a scale, and how many bits they have.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from slowllm.errors import CheckpointError
from slowllm.modeling.native.coded_tensor import CodedPart, CodedTensor
from slowllm.rounding import ceil_div
from slowllm.storage.codecs import mxfp4, nvfp4
from slowllm.storage.shard import open_shard
from slowllm.storage.spans import Span

# Scales of activations and of caches, which are not quantised here.
_ACTIVATIONS = re.compile(
    r"\.(input|output)_(scale|zero_point|global_scale|g_idx)$|\.[qkv]_(scale|zero_point|global_scale)$"
)
_COMPANIONS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale")
_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mixed-precision",
)  # fmt: skip
_SCALES = ("F32", "BF16", "F16")
_BITS = (4, 8)
# A pattern of config.json may need time without end: the module re cannot be told when to stop.
_MATCH_SECONDS = 2
# Dtypes of the shape that is stored beside a packed matrix.
_SHAPES: Mapping[str, str] = {"I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class _Scheme:
    """What config.json says of the weights of some modules.

    Attributes:
        targets: names of modules or of classes, or patterns behind ``re:``.
        bits: of a number.
        kind: of a number, float or int; None where config.json does not say.
        strategy: which numbers share a scale, by its name; None where config.json does not say.
        is_symmetric: whether there are no zeros.
        columns: that share a scale; None where a whole row does.
        block: rows and columns that share a scale, if blocks do.
    """

    targets: tuple[str, ...]
    bits: int
    kind: object
    strategy: object
    is_symmetric: bool
    columns: int | None
    block: tuple[int, int] | None

    def names(self, module: str) -> bool:
        """Whether a target is the name of a module.

        Raises:
            CheckpointError: a pattern tries more ways to match than there is time for.
        """
        return any(
            _matches(target[3:], module) if target.startswith("re:") else target == module
            for target in self.targets
        )


def _matches(pattern: str, module: str) -> bool:
    try:
        return regex.match(pattern, module, timeout=_MATCH_SECONDS) is not None
    except TimeoutError as error:
        raise CheckpointError(
            f"config.json: the target {reprlib.repr('re:' + pattern)} is not matched with {module} in {_MATCH_SECONDS} s; "
            "write it without repetitions inside of repetitions"
        ) from error


def find(settings: Mapping[str, Any], spans: Mapping[str, Span]) -> tuple[list[CodedTensor], set[str]]:
    """Return the weights of compressed-tensors, and the names of all spans that belong to them.

    Args:
        settings: of config.json.
        spans: of the checkpoint.
    Raises:
        CheckpointError: an array is missing, or does not go with its weight; or config.json names a format that is not read.
    """
    schemes = _schemes_of(settings)
    found, used = [], {name for name in spans if _ACTIVATIONS.search(name)}
    for module, codes in _weights_in(spans):
        own = {kind: spans[f"{module}.{kind}"] for kind in _COMPANIONS if f"{module}.{kind}" in spans}
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise CheckpointError(f"{codes.path.name}: {codes.name} is {codes.dtype} but is no matrix")
        if "weight_scale" not in own:
            raise CheckpointError(
                f"{codes.path.name}: {codes.name} is stored as {codes.dtype} but has no scale ({module}.weight_scale); fetch all "
                "shards and the index again"
            )
        # Those whose targets name the module count before those that name its class.
        order = sorted(schemes, key=lambda scheme: not scheme.names(module))
        found.append(_coded(module, codes, own, order))
        used |= {codes.name, *(span.name for span in own.values())}
    for name, span in spans.items():
        if name not in used and name.rpartition(".")[2] in _COMPANIONS:
            raise CheckpointError(
                f"{span.path.name}: {name} belongs to no quantised weight; fetch all shards and the index again"
            )
    return found, used


def _weights_in(spans: Mapping[str, Span]) -> Iterator[tuple[str, Span]]:
    """Yield the name of each module with a quantised weight, and the span of its codes."""
    for name, span in spans.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            if f"{module}.weight" in spans:
                raise CheckpointError(
                    f"{span.path.name}: {module}.weight stands in the checkpoint twice, packed and not"
                )
            yield module, span
        elif kind == "weight" and span.dtype in ("F8_E4M3", "I8"):
            yield module, span


def _schemes_of(settings: Mapping[str, Any]) -> list[_Scheme]:
    transforms = settings.get("transform_config")
    # None, and a table without groups, are usual.
    if transforms.get("config_groups") if isinstance(transforms, Mapping) else transforms:
        raise CheckpointError(
            "config.json: its transform_config says that activations are rotated before they meet the weights, which is not "
            "computed; use a checkpoint without it"
        )
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("config.json: its quantization_config has no config_groups")
    # A group's own format counts before that of all.
    whole = settings.get("format")
    found = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue  # activations only
        form = group.get("format") or whole
        if form not in _FORMATS:
            raise CheckpointError(
                f"config.json: the format {reprlib.repr(form)} of compressed-tensors is not read; there are {', '.join(_FORMATS)}"
            )
        found.append(_scheme(str(name), group, weights))
    return found


def _scheme(name: str, group: Mapping[str, Any], weights: Mapping[str, Any]) -> _Scheme:
    where = f"config.json: config_groups.{name}"
    targets, bits = group.get("targets", []), weights.get("num_bits", 8)
    strategy, size, block = (weights.get(key) for key in ("strategy", "group_size", "block_structure"))
    if bits not in _BITS or isinstance(bits, bool):
        raise CheckpointError(
            f"{where}: num_bits is {reprlib.repr(bits)}, which is not read; there are 4 and 8"
        )
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}: targets is {reprlib.repr(targets)}, not a list of names")
    for target in targets:
        try:
            regex.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except regex.error as error:
            raise CheckpointError(
                f"{where}: the target {reprlib.repr(target)} is no pattern ({error})"
            ) from error
    if size is not None and (not isinstance(size, int) or size == 0 or not -1 <= size < 1 << 31):
        raise CheckpointError(f"{where}: group_size is {reprlib.repr(size)}, not a number such as 128, or -1")
    if strategy in ("group", "tensor_group") and (size is None or size < 1):
        raise CheckpointError(f"{where}: has groups, but group_size is {reprlib.repr(size)}")
    if strategy == "block" and not (
        isinstance(block, list)
        and len(block) == 2
        and all(isinstance(one, int) and 0 < one < 1 << 31 for one in block)
    ):
        raise CheckpointError(
            f"{where}: block_structure is {reprlib.repr(block)}, not two numbers such as [128, 128]"
        )
    columns = size if size is not None and size > 0 and strategy != "block" else None
    pair = (block[0], block[1]) if strategy == "block" and block is not None else None
    is_symmetric, kind = weights.get("symmetric", True) is not False, weights.get("type")
    return _Scheme(tuple(targets), bits, kind, strategy, is_symmetric, columns, pair)


def _coded(module: str, codes: Span, own: Mapping[str, Span], schemes: list[_Scheme]) -> CodedTensor:
    if codes.name.endswith(".weight_packed") and codes.dtype == "U8":
        return _float4(module, codes, own)
    if codes.dtype not in ("I32", "I8", "F8_E4M3") or (codes.dtype == "F8_E4M3" and "packed" in codes.name):
        raise CheckpointError(
            f"{codes.path.name}: {codes.name} is {codes.dtype}, which no format of compressed-tensors packs"
        )
    for scheme in schemes:
        if (tensor := _by_scheme(module, codes, own, scheme)) is not None:
            return tensor
    about = ", ".join(
        f"{span.name.rpartition('.')[2]} {span.dtype} {list(span.shape)}" for span in (codes, *own.values())
    )
    raise CheckpointError(
        f"{codes.path.name}: {module} has {about}, which go with no group of config.json's quantization_config; config.json and "
        "the weights do not belong together"
    )


def _float4(module: str, codes: Span, own: Mapping[str, Span]) -> CodedTensor:
    scales, number = own["weight_scale"], own.get("weight_global_scale")
    rows, width = codes.shape[0], 2 * codes.shape[1]
    packed = CodedPart("codes", codes, codes.shape)
    parts: tuple[CodedPart, ...] = (packed, CodedPart("scales", scales, scales.shape))
    if number is None and scales.dtype in ("U8", "F8_E8M0"):
        if width % mxfp4.BLOCK == 0 and scales.shape == (rows, width // mxfp4.BLOCK):
            return CodedTensor(f"{module}.weight", (rows, width), "fp4", parts, (1, mxfp4.BLOCK))
    elif number is not None and (number.dtype, number.shape, scales.dtype) == ("F32", (1,), "F8_E4M3"):  # noqa: SIM102
        if width % nvfp4.BLOCK == 0 and scales.shape == (rows, width // nvfp4.BLOCK):
            parts = (CodedPart("divisor", number, (1,)), *parts)
            return CodedTensor(f"{module}.weight", (rows, width), "nvfp4", parts)
    about = "" if number is None else f", with {number.name} {number.dtype} {list(number.shape)},"
    raise CheckpointError(
        f"{scales.path.name}: {scales.name} is {scales.dtype} of shape {list(scales.shape)}{about} which are no scales for "
        f"{codes.name} of shape {list(codes.shape)}"
    )


def _by_scheme(module: str, codes: Span, own: Mapping[str, Span], scheme: _Scheme) -> CodedTensor | None:
    """Return a weight if its arrays go with a scheme."""
    is_packed, scales = codes.name.endswith(".weight_packed"), own["weight_scale"]
    rows, stored = codes.shape
    per_word = 32 // scheme.bits
    if not is_packed:
        width = stored
    elif scheme.columns is not None and len(scales.shape) == 2:
        width = scales.shape[1] * scheme.columns
    else:
        width = _width_of(own.get("weight_shape"), codes, per_word)
    group = _group_of(scales.shape, rows, width, scheme)
    if group is None or scales.dtype not in _SCALES or "weight_global_scale" in own:
        return None
    if scheme.kind == ("int" if codes.dtype == "F8_E4M3" else "float"):
        return None
    if is_packed and (stored != ceil_div(width, per_word) or codes.dtype != "I32"):
        return None
    if not is_packed and scheme.bits != 8:
        return None
    grid = (ceil_div(rows, group[0]), ceil_div(width, group[1]))
    parts = [CodedPart("scales", scales, grid)]
    zeros, order = own.get("weight_zero_point"), own.get("weight_g_idx")
    if codes.dtype == "F8_E4M3":
        if zeros is not None or order is not None:
            return None
        parts.append(CodedPart("codes", codes, codes.shape))
        return CodedTensor(f"{module}.weight", (rows, width), "fp8_rounded", tuple(parts), group)
    if (zeros is None) != scheme.is_symmetric:
        return None
    if zeros is not None:
        packed = (ceil_div(grid[0], per_word), grid[1])
        shapes, dtype = ((packed,), "I32") if is_packed else ((grid, scales.shape), "I8")
        if zeros.shape not in shapes or zeros.dtype != dtype or (is_packed and group[0] != 1):
            return None
        parts.append(CodedPart("zeros", zeros, packed if is_packed else grid))
    if order is not None:
        if order.shape != (width,) or order.dtype != "I32" or group[0] != 1:
            return None
        parts.append(CodedPart("blocks", order, (width,)))
    if is_packed:
        name = "pairs" if scheme.bits == 4 else "bytes"
        parts.append(CodedPart(name, codes, (rows, 4 * stored), is_bytes=True))
    else:
        parts.append(CodedPart("signed", codes, codes.shape))
    return CodedTensor(f"{module}.weight", (rows, width), "scaled_int", tuple(parts), group)


def _width_of(shape: Span | None, codes: Span, per_word: int) -> int:
    """Return the width of a packed matrix: the number that is stored beside it, or as many columns as its words hold.

    Raises:
        CheckpointError: what is stored beside it is not its shape.
    """
    if shape is None:
        return codes.shape[1] * per_word
    numbers = list[int]()
    if shape.dtype in _SHAPES and shape.shape == (2,):
        fd = open_shard(shape)
        try:
            numbers = np.frombuffer(
                os.pread(fd, shape.num_bytes, shape.offset), _SHAPES[shape.dtype]
            ).tolist()
        finally:
            os.close(fd)
    # A word has a column at least.
    if len(numbers) != 2 or numbers[0] != codes.shape[0] or not 0 < numbers[1] <= 32 * codes.shape[1]:
        raise CheckpointError(
            f"{shape.path.name}: {shape.name} is {shape.dtype} of shape {list(shape.shape)} and says {numbers}, which is no shape "
            f"for {codes.name} of shape {list(codes.shape)}; fetch this shard again"
        )
    return numbers[1]


def _group_of(shape: tuple[int, ...], rows: int, width: int, scheme: _Scheme) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None where the scales have another shape than a scheme says."""
    if scheme.block is not None:
        grid = (ceil_div(rows, scheme.block[0]), ceil_div(width, scheme.block[1]))
        return scheme.block if shape == grid else None
    if scheme.columns is not None:
        is_whole = width % scheme.columns == 0 and shape == (rows, width // scheme.columns)
        return (1, scheme.columns) if is_whole else None
    if shape in ((rows,), (rows, 1)) and scheme.strategy != "tensor":
        return 1, width
    return (rows, width) if shape in ((), (1,), (1, 1)) and scheme.strategy != "channel" else None
