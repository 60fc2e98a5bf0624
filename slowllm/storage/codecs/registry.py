"""Which codecs are there? A matrix of a block is coded without loss, in 8 bits, or in 4.

Knows matrices and their parts; knows nothing of files or models. A codec says which parts a matrix becomes, encodes
it piece by piece, and decodes any range of rows to bfloat16; some multiply without decoding the whole. A matrix of
three dimensions (experts) is taken for one of two, whose rows are the first two dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from slowllm.errors import StoreError
from slowllm.storage.codecs.awq import Awq
from slowllm.storage.codecs.base import Codec, StoreCodec
from slowllm.storage.codecs.bnb import BnbIntegers, BnbNibbles
from slowllm.storage.codecs.fp4 import Fp4
from slowllm.storage.codecs.fp8 import Fp8
from slowllm.storage.codecs.fp8_packed import FP8_PACKED
from slowllm.storage.codecs.gguf import GGUF_CODECS
from slowllm.storage.codecs.gptq import Gptq, GptqV2
from slowllm.storage.codecs.int4 import Int4
from slowllm.storage.codecs.int8 import Int8
from slowllm.storage.codecs.lossless import Lossless
from slowllm.storage.codecs.mxfp4 import Mxfp4
from slowllm.storage.codecs.nvfp4 import Nvfp4
from slowllm.storage.codecs.rounded import Fp8CastScales, Fp8Rounded
from slowllm.storage.codecs.scaled_int import ScaledInt
from slowllm.storage.codecs.stacked import Stacked
from slowllm.storage.codecs.team import Team
from slowllm.storage.spans import TORCH_DTYPES, Coding

# Those that stores are written in.
STORE_CODECS: Mapping[str, StoreCodec] = {codec.name: codec for codec in (Lossless(), Int8(), Int4())}
# Those of checkpoints as their makers publish them as well.
CODECS: Mapping[str, Codec] = {
    **STORE_CODECS,
    **{
        codec.name: codec
        for codec in (
            Fp8(),
            Fp4(),
            Mxfp4(),
            Nvfp4(),
            Fp8Rounded(),
            Fp8CastScales(),
            ScaledInt(),
            Gptq(),
            GptqV2(),
            Awq(),
            BnbNibbles(),
            BnbIntegers(),
            *GGUF_CODECS,
            *FP8_PACKED,
            Stacked(lambda name: CODECS[name]),
        )
    },
}


def codec_of(coding: Coding) -> Codec:
    """Return the codec of a stored matrix, which `check_coding` has accepted."""
    return CODECS[coding.codec]


def warm_up(names: Iterable[str]) -> None:
    """Load the loops of some codecs, or compile them, before memory and time are measured."""
    team = Team(1)
    try:
        for name in sorted(set(names)):
            CODECS[name].warm_up(team)
    finally:
        team.close()


def check_kept(name: str, coding: Coding, shape: tuple[int, ...], num_bytes: int) -> None:
    """Check that a matrix which a store keeps in its maker's format has the arrays that its codec expects.

    Args:
        name: for messages.
        coding: as the manifest has it.
        shape: of the parameter.
        num_bytes: of all its arrays.
    Raises:
        StoreError: it has others, or they reach out of these bytes.
    """
    for codec in sorted(coding.codecs - CODECS.keys()):
        raise StoreError(f"{name}: its codec {codec!r} is unknown; a newer slowllm may know it")
    if len(shape) >= 2 and coding.is_transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if not shape or not _is_whole(coding, math.prod(shape[:-1]), shape[-1], num_bytes):
        raise StoreError(
            f"{name}: its arrays do not make a matrix of shape {list(shape)}; delete the store and convert the model again"
        )


def _is_whole(coding: Coding, num_rows: int, width: int, num_bytes: int) -> bool:
    """Whether a coding's arrays lie in so many bytes, where words can be read, and make all rows once."""
    for part in coding.parts:
        if part.dtype not in TORCH_DTYPES or min(part.shape, default=0) < 0 or part.offset < 0:
            return False
        itemsize = TORCH_DTYPES[part.dtype].itemsize
        if part.offset % itemsize or part.offset + math.prod(part.shape) * itemsize > num_bytes:
            return False
    parts = {part.name: (part.dtype, part.shape) for part in coding.parts}
    if len(parts) < len(coding.parts) or not math.isfinite(coding.offset) or min(coding.group, default=1) < 1:
        return False
    at = 0
    for rows in coding.rows:
        is_next = rows.first == at and rows.num_rows > 0 and not rows.coding.rows
        if not is_next or not _is_whole(rows.coding, rows.num_rows, width, num_bytes):
            return False
        at += rows.num_rows
    if bool(coding.rows) != (coding.codec == Stacked.name) or (coding.rows and at != num_rows):
        return False
    return CODECS[coding.codec].has_parts(parts, num_rows, width, coding.group)


def check_coding(name: str, coding: Coding, shape: tuple[int, ...]) -> None:
    """Check that a coded matrix of a store has the parts that its codec expects.

    Raises:
        StoreError: it has others.
    """
    if coding.codec not in STORE_CODECS:
        raise StoreError(f"{name}: its codec {coding.codec!r} is unknown; a newer slowllm may know it")
    parts = {part.name: (part.dtype, part.shape) for part in coding.parts}
    # The loops read parts as 64-bit words.
    aligned = all(part.offset % 8 == 0 for part in coding.parts)
    if (
        len(shape) < 2
        or not aligned
        or not STORE_CODECS[coding.codec].has_parts(parts, math.prod(shape[:-1]), shape[-1])
    ):
        raise StoreError(
            f"{name}: its parts do not make a matrix of shape {list(shape)}; delete the store and convert the model again"
        )
