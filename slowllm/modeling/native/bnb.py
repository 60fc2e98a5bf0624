"""Find weights that bitsandbytes stored: numbers of 4 bits (nf4, fp4) in blocks, and whole numbers of 8 bits."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slowllm.errors import CheckpointError
from slowllm.modeling.native.coded_tensor import CodedPart, CodedTensor
from slowllm.rounding import ceil_div
from slowllm.storage.codecs.bnb import NESTED
from slowllm.storage.shard import open_shard
from slowllm.storage.spans import Span

_STATE = re.compile(r"\.quant_state\.bitsandbytes__(nf4|fp4)$")
_COMPANION = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB|weight_format)$"
)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# A text of the state is about 160 bytes.
_LONGEST_STATE = 4096


@dataclass(frozen=True)
class _State:
    """What the text beside a weight of 4 bits says."""

    shape: tuple[int, int]
    block: int
    offset: float | None


def find(settings: Mapping[str, Any], spans: Mapping[str, Span]) -> tuple[list[CodedTensor], set[str]]:
    """Return the weights that bitsandbytes stored, and the names of all spans that belong to them.

    Args:
        settings: of config.json; which weights are stored in how many bits is in the files.
        spans: of the checkpoint; the texts that belong to weights of 4 bits are read.
    Raises:
        CheckpointError: an array is missing, or does not go with its weight.
        OSError: a file cannot be read.
    """
    found, used = list[CodedTensor](), set[str]()
    states: dict[str, list[Span]] = {}
    for name, span in spans.items():
        if match := _STATE.search(name):
            states.setdefault(name[: match.start()], []).append(span)
    for name, span in spans.items():
        if name in states:
            found.append(_nibbles(span, states[name], spans))
        elif f"{name.removesuffix('.weight')}.SCB" in spans and name.endswith(".weight"):
            found.append(_integers(span, spans))
        elif span.dtype in ("U8", "I8") and name.endswith(".weight"):
            raise CheckpointError(
                f"{span.path.name}: {name} is stored as {span.dtype}, and the checkpoint has no scales for it; fetch all shards and "
                "the index again"
            )
        else:
            continue
        used |= {part.span.name for part in found[-1].parts}
    for tensor in found:
        used |= {span.name for span in states.get(tensor.name, [])}
        used.add(f"{tensor.name.removesuffix('.weight')}.weight_format")
    for name, span in spans.items():
        if name not in used and _COMPANION.search(name):
            raise CheckpointError(
                f"{span.path.name}: {name} belongs to no weight that bitsandbytes stored; fetch all shards and the index again"
            )
    return found, used & set(spans)


def _nibbles(weight: Span, states: list[Span], spans: Mapping[str, Span]) -> CodedTensor:
    if len(states) > 1:
        raise CheckpointError(
            f"{weight.path.name}: {weight.name} is said to be {' and '.join(sorted(span.name for span in states))}; one must go"
        )
    state = _state_of(states[0])
    size = math.prod(state.shape)
    num_blocks = ceil_div(size, state.block)
    _check(weight, "U8", (ceil_div(size, 2), 1), state.shape)
    is_nested = state.offset is not None
    wanted: dict[str, tuple[str, str, tuple[int, ...]]] = {
        "table": ("quant_map", "F32", (16,)),
        "scales": ("absmax", "U8" if is_nested else "F32", (num_blocks,)),
    }
    if is_nested:
        wanted |= {
            "scale_table": ("nested_quant_map", "F32", (256,)),
            "scale_scales": ("nested_absmax", "F32", (ceil_div(num_blocks, NESTED),)),
        }
    parts = [CodedPart("codes", weight, (ceil_div(size, 2),))]
    for part, (end, dtype, shape) in wanted.items():
        span = _companion(weight, f"{weight.name}.{end}", spans)
        _check(span, dtype, shape, state.shape)
        parts.append(CodedPart(part, span, shape))
    return CodedTensor(
        weight.name, state.shape, "bnb_4bit", tuple(parts), (state.block,), offset=state.offset or 0.0
    )


def _integers(weight: Span, spans: Mapping[str, Span]) -> CodedTensor:
    stem = weight.name.removesuffix(".weight")
    scales = spans[f"{stem}.SCB"]
    if len(weight.shape) != 2 or weight.dtype != "I8":
        raise CheckpointError(
            f"{weight.path.name}: {weight.name} is {weight.dtype} of shape {list(weight.shape)}, but {scales.name} is for a matrix "
            "of I8; config.json and the weights do not belong together"
        )
    rows, width = weight.shape
    _check(scales, "F32", (rows,), (rows, width))
    layout = spans.get(f"{stem}.weight_format")
    if layout is not None and (layout.num_bytes != 1 or _read(layout) != b"\0"):
        raise CheckpointError(
            f"{layout.path.name}: {layout.name} is not 0, so {weight.name} is not stored row by row, which is not read; save the "
            "model again with a newer bitsandbytes"
        )
    parts = (CodedPart("codes", weight, (rows, width)), CodedPart("scales", scales, (rows,)))
    return CodedTensor(weight.name, (rows, width), "bnb_8bit", parts)


def _companion(weight: Span, name: str, spans: Mapping[str, Span]) -> Span:
    if name not in spans:
        raise CheckpointError(
            f"{weight.path.name}: {weight.name} has no {name}; fetch all shards and the index again"
        )
    return spans[name]


def _check(span: Span, dtype: str, shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    if span.dtype != dtype or span.shape != shape:
        raise CheckpointError(
            f"{span.path.name}: {span.name} is {span.dtype} of shape {list(span.shape)}, not {dtype} of shape {list(shape)} as a "
            f"matrix of shape {list(matrix)} needs"
        )


def _state_of(span: Span) -> _State:
    """Return what the text of a state says.

    Raises:
        CheckpointError: it is none.
    """
    if span.dtype != "U8" or len(span.shape) != 1 or span.num_bytes > _LONGEST_STATE:
        raise _no_state(span, f"{span.dtype} of shape {list(span.shape)}")
    try:
        table = json.loads(_read(span))
    except (ValueError, RecursionError) as error:
        raise _no_state(span, "not JSON") from error
    if not isinstance(table, dict):
        raise _no_state(span, "not a table")
    kind = span.name.rpartition("__")[2]
    if table.get("quant_type") != kind:
        raise _no_state(span, f"of {str(table.get('quant_type'))[:20]!r}")
    shape, block, offset = table.get("shape"), table.get("blocksize"), table.get("nested_offset")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_count(side) for side in shape):
        raise _no_state(span, f"for a shape {str(shape)[:40]}")
    if not _is_count(block) or block not in _BLOCKS:
        raise _no_state(span, f"for blocks of {str(block)[:20]}")
    if offset is not None:
        is_number = isinstance(offset, int | float) and not isinstance(offset, bool)
        if not is_number or not abs(offset) < 1e38 or table.get("nested_blocksize") != NESTED:
            raise _no_state(
                span,
                f"for scales coded with {str(offset)[:20]} and blocks of {str(table.get('nested_blocksize'))[:20]}",
            )
        offset = float(offset)
    return _State((shape[0], shape[1]), block, offset)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _no_state(span: Span, said: str) -> CheckpointError:
    return CheckpointError(
        f"{span.path.name}: {span.name} is {said}, which is no state of bitsandbytes that is read; fetch this shard again"
    )


def _read(span: Span) -> bytes:
    fd = open_shard(span)
    try:
        return os.pread(fd, span.num_bytes, span.offset)
    finally:
        os.close(fd)
