"""Which codecs are there? A matrix of a block is coded without loss, in 8 bits, or in 4.

Knows matrices and their parts; knows nothing of files or models. A codec says which parts a matrix becomes, encodes
it piece by piece, and decodes any range of rows to bfloat16; some multiply without decoding the whole. A matrix of
three dimensions (experts) is taken for one of two, whose rows are the first two dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from slowllm.errors import StoreError
from slowllm.storage.codecs.base import Codec, Team
from slowllm.storage.codecs.int4 import Int4
from slowllm.storage.codecs.int8 import Int8
from slowllm.storage.codecs.layout_constants import CHUNK
from slowllm.storage.codecs.lossless import Lossless
from slowllm.storage.spans import Coding

CODECS: Mapping[str, Codec] = {codec.name: codec for codec in (Lossless(), Int8(), Int4())}


def codec_of(coding: Coding) -> Codec:
    """Return the codec of a stored matrix, which `check_coding` has accepted."""
    return CODECS[coding.codec]


def warm_up(names: Iterable[str]) -> None:
    """Load the loops of some codecs, or compile them, before memory and time are measured."""
    team = Team(1)
    try:
        for name in sorted(set(names)):
            codec, matrix = CODECS[name], torch.ones(2, CHUNK // 2, dtype=torch.bfloat16)
            parts = codec.join([codec.encode(matrix.view(-1), CHUNK // 2)], 2, CHUNK // 2)
            codec.decode(parts, matrix, 0, 2, team)
    finally:
        team.close()


def check_coding(name: str, coding: Coding, shape: tuple[int, ...]) -> None:
    """Check that a coded matrix has the parts that its codec expects.

    Raises:
        StoreError: it has others.
    """
    if coding.codec not in CODECS:
        raise StoreError(f"{name}: its codec {coding.codec!r} is unknown; a newer slowllm may know it")
    parts = {part.name: (part.dtype, part.shape) for part in coding.parts}
    # The loops read parts as 64-bit words.
    aligned = all(part.offset % 8 == 0 for part in coding.parts)
    if (
        len(shape) < 2
        or not aligned
        or not CODECS[coding.codec].has_parts(parts, math.prod(shape[:-1]), shape[-1])
    ):
        raise StoreError(
            f"{name}: its parts do not make a matrix of shape {list(shape)}; delete the store and convert the model again"
        )
